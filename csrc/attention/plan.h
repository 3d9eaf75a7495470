// The plan: which tile. O(A + T/128 + A*S*G/128) integers that serve every layer, forward and backward, of one step.
//
// T tokens in a packed row · A anchors, ascending · S block size · G query heads per kv head
// N = ceil(T / kTile) key tiles · I work items, see item_positions
//
// Block j (the block of anchor j) sees the context interval [starts[j], ends[j]) at slot 0; with a window the lower
// bound of slot k is k higher, which the attention kernels apply themselves. Documents are contiguous, so both bounds
// never decrease with j, and the blocks that see a tile of keys are one contiguous range, found by binary search.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DFLASH_HOST_DEVICE __host__ __device__
#else
#define DFLASH_HOST_DEVICE
#endif

namespace dflash {

inline constexpr int32_t kTile = 128;
// Work is ordered by weights below this: an item of more than 1022 key tiles is as heavy as one of 1023.
inline constexpr int32_t kWeights = 1024;

struct PlanArgs {
  const int32_t* anchors;  // (A,) ascending
  const int32_t* doc_ids;  // (T,) -1 = padding
  int32_t num_anchors, num_tokens, block_size;
  int32_t window;        // 0 = none
  int32_t group;         // G
  int32_t* starts;       // (A,)
  int32_t* ends;         // (A,)
  int32_t* tile_ranges;  // (N, 2): first and one past the last block that sees the tile
  int32_t* order;        // (I,) work items, most key tiles first, equal ones ascending
  int32_t* tile_order;   // (N,) key tiles, seen by most blocks first, equal ones ascending
};

// Query positions of a work item: the GPU kernels pack the G query heads of a kv head into one row each, and a work
// item is two units of up to 64 rows. More heads than that they do not take; the plan is still made.
DFLASH_HOST_DEVICE inline int32_t item_positions(int32_t group) { return group > 64 ? 2 : 64 / group * 2; }

DFLASH_HOST_DEVICE inline int32_t item_count(int32_t num_anchors, int32_t block_size, int32_t group) {
  const int64_t positions = static_cast<int64_t>(num_anchors) * block_size, each = item_positions(group);
  return static_cast<int32_t>((positions + each - 1) / each);
}

DFLASH_HOST_DEVICE inline int32_t tile_count(int32_t num_tokens) { return (num_tokens + kTile - 1) / kTile; }

// First index in [0, count) whose value is greater than `bound`, or count.
DFLASH_HOST_DEVICE inline int32_t first_above(const int32_t* values, int32_t count, int32_t bound) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (values[middle] > bound) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Kept inside [0, kWeights) whatever the anchors are: the GPU, which cannot refuse them, counts weights in an array.
DFLASH_HOST_DEVICE inline int32_t bounded_weight(int64_t weight) {
  return static_cast<int32_t>(weight < 0 ? 0 : weight < kWeights ? weight : kWeights - 1);
}

// Weight of a work item: key tiles from the first key of its first block to the last key of its last block.
DFLASH_HOST_DEVICE inline int32_t item_weight(const PlanArgs& args, int32_t item) {
  const int64_t positions = static_cast<int64_t>(args.num_anchors) * args.block_size, each = item_positions(args.group);
  const int64_t begin = item * each, end = begin + each < positions ? begin + each : positions;
  const int64_t keys = args.ends[(end - 1) / args.block_size] - args.starts[begin / args.block_size];
  return bounded_weight((keys + kTile - 1) / kTile);
}

// Weight of a key tile: its share of the blocks, in steps of 1/1023.
DFLASH_HOST_DEVICE inline int32_t tile_weight(const PlanArgs& args, int32_t tile) {
  const int64_t blocks = args.tile_ranges[2 * tile + 1] - args.tile_ranges[2 * tile];
  return bounded_weight(blocks * (kWeights - 1) / (args.num_anchors > 1 ? args.num_anchors : 1));
}

void plan_cpu(const PlanArgs& args);

// One launch on `stream` (a cudaStream_t), no host sync. Returns a cudaError_t.
int plan_cuda(const PlanArgs& args, void* stream);
// Tokens that plan_cuda can take: its document bits live in shared memory, of which the smallest GPUs have 99 KiB.
inline constexpr int32_t kMaxPlanTokens = 360000;

}  // namespace dflash
