// The plan on the GPU: one CTA, nothing read back. The same integers as plan.cpp.
//
// A row has some thousands of tokens and anchors, so one CTA takes microseconds, and one CTA needs no grid barrier:
//   1. document starts as bits: word w of `bits` marks the positions 32w..32w+31 at which a document starts
//   2. before[w] = the last document start in words 0..w-1 (a scan), so any position finds its document in O(1)
//   3. starts and ends
//   4. the block range of each key tile, by binary search in starts and ends
//   5. the order of the work items and of the key tiles: stable counting sorts by falling weight, a warp each
#pragma once

#include "attention/plan.h"
#include "attention/ptx.h"
#include "attention/rows.h"

namespace dflash::gpu {

inline constexpr int kPlanThreads = 1024;
inline constexpr int kPlanWarps = kPlanThreads / 32;
static_assert(kWeights == kPlanThreads, "a counting sort gives each thread one weight");
static_assert(kPlanWarps == 32, "the second level of the scan is one full warp");

// Shared memory of the CTA, all of it dynamic.
struct PlanScratch {
  int* partial;      // (32,) sums of the warps inside a scan
  int* item_places;  // (kWeights,) histogram of the items' weights, then each weight's next place in the order
  int* tile_places;  // (kWeights,) the same for key tiles
  unsigned* bits;    // (W,) W = ceil(T / 32)
  int* before;       // (W,)

  DFLASH_DEVICE PlanScratch(char* base, int words)
      : partial(reinterpret_cast<int*>(base)),
        item_places(partial + kPlanWarps),
        tile_places(item_places + kWeights),
        bits(reinterpret_cast<unsigned*>(tile_places + kWeights)),
        before(reinterpret_cast<int*>(bits + words)) {}
};

DFLASH_HOST_DEVICE inline int plan_words(int num_tokens) { return (num_tokens + 31) / 32; }
inline int plan_scratch_bytes(int num_tokens) {
  return (kPlanWarps + 2 * kWeights + 2 * plan_words(num_tokens)) * static_cast<int>(sizeof(int));
}

struct Sum {
  DFLASH_DEVICE static int apply(int a, int b) { return a + b; }
};
struct Max {
  DFLASH_DEVICE static int apply(int a, int b) { return larger(a, b); }
};

template <typename Op>
DFLASH_DEVICE int scan_warp_inclusive(int value) {
  for (int step = 1; step < 32; step *= 2) {
    const int other = shuffle_up(value, step);
    if (thread_index() % 32 >= step) value = Op::apply(value, other);
  }
  return value;
}

// Exclusive scan over the CTA with identity 0. All threads must call it; nobody else may use `partial` until the call
// returns in all threads.
template <typename Op>
DFLASH_DEVICE int scan_exclusive(int value, int* partial) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int inclusive = scan_warp_inclusive<Op>(value);
  if (lane == 31) partial[warp] = inclusive;
  sync_threads();
  if (warp == 0) partial[lane] = scan_warp_inclusive<Op>(partial[lane]);
  sync_threads();
  const int left = shuffle_up(inclusive, 1);
  const int inside = lane == 0 ? 0 : left;
  const int result = warp == 0 ? inside : Op::apply(partial[warp - 1], inside);
  sync_threads();
  return result;
}

DFLASH_DEVICE void mark_document_starts(const PlanArgs& args, int words, unsigned* bits) {
  const int lane = thread_index() % 32;
  // Whole warps leave the loop together, so every ballot has 32 lanes.
  for (int word = thread_index() / 32; word < words; word += kPlanWarps) {
    const int p = word * 32 + lane;
    const bool first = p < args.num_tokens && (p == 0 || args.doc_ids[p] != args.doc_ids[p - 1]);
    const unsigned marks = ballot(first);
    if (lane == 0) bits[word] = marks;
  }
}

DFLASH_DEVICE int last_mark(int word, unsigned marks) { return word * 32 + 31 - clz(marks); }

// before[w] = last document start in words 0..w-1, or 0. Each thread scans a run of consecutive words.
DFLASH_DEVICE void scan_document_starts(int words, const PlanScratch& scratch) {
  const int run = (words + kPlanThreads - 1) / kPlanThreads;
  const int begin = smaller(thread_index() * run, words), end = smaller(begin + run, words);
  int last = 0;
  for (int w = begin; w < end; ++w) {
    if (scratch.bits[w] != 0) last = last_mark(w, scratch.bits[w]);
  }
  last = scan_exclusive<Max>(last, scratch.partial);
  for (int w = begin; w < end; ++w) {
    scratch.before[w] = last;
    if (scratch.bits[w] != 0) last = last_mark(w, scratch.bits[w]);
  }
}

DFLASH_DEVICE void find_intervals(const PlanArgs& args, const PlanScratch& scratch) {
  for (int j = thread_index(); j < args.num_anchors; j += kPlanThreads) {
    const int anchor = smaller(larger(args.anchors[j], 0), args.num_tokens);
    int document = 0;
    if (args.num_tokens > 0) {
      const int p = smaller(anchor, args.num_tokens - 1), word = p / 32;
      const unsigned upto = scratch.bits[word] & (0xffffffffu >> (31 - p % 32));
      document = upto != 0 ? last_mark(word, upto) : scratch.before[word];
    }
    const int lower = args.window > 0 ? anchor - args.window + 1 : 0;
    args.starts[j] = smaller(larger(document, lower), anchor);
    args.ends[j] = anchor;
  }
}

DFLASH_DEVICE void find_tile_ranges(const PlanArgs& args, int tiles) {
  for (int t = thread_index(); t < tiles; t += kPlanThreads) {
    const int last = smaller((t + 1) * kTile, args.num_tokens) - 1;
    args.tile_ranges[2 * t] = first_above(args.ends, args.num_anchors, t * kTile);
    args.tile_ranges[2 * t + 1] = first_above(args.starts, args.num_anchors, last);
  }
}

// Turns a histogram of weights into each weight's first place. Heaviest first: thread i owns weight kWeights - 1 - i,
// so a plain scan counts what is heavier.
DFLASH_DEVICE void first_places(int* histogram, int* partial) {
  int& mine = histogram[kWeights - 1 - thread_index()];
  mine = scan_exclusive<Sum>(mine, partial);
}

// One warp places 32 weights at a time, so equal ones keep their order and the result is the same on every run.
template <typename Weight>
DFLASH_DEVICE void place(int count, int* next, int32_t* order, const Weight& weight_of) {
  const int lane = thread_index() % 32;
  for (int base = 0; base < count; base += 32) {
    const int i = base + lane;
    const bool live = i < count;
    const int bucket = live ? weight_of(i) : -1;
    const unsigned peers = match_any(bucket);
    const int rank = popc(peers & ((1u << lane) - 1));
    const int at = live ? next[bucket] + rank : 0;
    sync_warp();
    if (live && rank == 0) next[bucket] += popc(peers);
    sync_warp();
    if (live) order[at] = i;
  }
}

DFLASH_DEVICE void find_orders(const PlanArgs& args, int tiles, const PlanScratch& scratch) {
  const int items = item_count(args.num_anchors, args.block_size, args.group);
  const auto weight_of_item = [&](int item) { return item_weight(args, item); };
  const auto weight_of_tile = [&](int tile) { return tile_weight(args, tile); };
  for (int i = thread_index(); i < items; i += kPlanThreads) {
    atomic_add(&scratch.item_places[weight_of_item(i)], 1);
  }
  for (int t = thread_index(); t < tiles; t += kPlanThreads) {
    atomic_add(&scratch.tile_places[weight_of_tile(t)], 1);
  }
  sync_threads();
  first_places(scratch.item_places, scratch.partial);
  first_places(scratch.tile_places, scratch.partial);
  sync_threads();
  const int warp = thread_index() / 32;
  if (warp == 0) place(items, scratch.item_places, args.order, weight_of_item);
  if (warp == 1) place(tiles, scratch.tile_places, args.tile_order, weight_of_tile);
}

// All of it, by one CTA of kPlanThreads threads with plan_scratch_bytes of dynamic shared memory.
static DFLASH_GLOBAL void DFLASH_BOUNDS(kPlanThreads, 1) plan_kernel(DFLASH_PARAMETER const PlanArgs args) {
  const int words = plan_words(args.num_tokens), tiles = tile_count(args.num_tokens);
  const PlanScratch scratch(shared_memory(), words);

  mark_document_starts(args, words, scratch.bits);
  scratch.item_places[thread_index()] = 0;
  scratch.tile_places[thread_index()] = 0;
  sync_threads();
  scan_document_starts(words, scratch);
  sync_threads();
  find_intervals(args, scratch);
  sync_threads();
  find_tile_ranges(args, tiles);
  sync_threads();
  find_orders(args, tiles, scratch);
}

}  // namespace dflash::gpu
