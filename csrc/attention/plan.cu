// The plan on the GPU: one launch of one CTA, nothing read back. The same integers as plan.cpp.
//
// A row has some thousands of tokens and anchors, so one CTA takes microseconds, and one CTA needs no grid barrier:
//   1. document starts as bits: word w of `bits` marks the positions 32w..32w+31 at which a document starts
//   2. before[w] = the last document start in words 0..w-1 (a scan), so any position finds its document in O(1)
//   3. starts and ends, and a histogram of the blocks' weights
//   4. the work order: a stable counting sort by falling weight
//   5. the block range of each key tile, by binary search in starts and ends
#include <cuda_runtime.h>

#include "attention/plan.h"

namespace dflash {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kWeights == kThreads, "the work order gives each thread one weight");

struct Sum {
  __device__ static int apply(int a, int b) { return a + b; }
};
struct Max {
  __device__ static int apply(int a, int b) { return a > b ? a : b; }
};

// Exclusive scan over the CTA with identity 0. All threads must call it; `partial` is (kWarps,) shared memory that
// nobody else may use until the call returns in all threads.
template <typename Op>
__device__ int scan_exclusive(int value, int* partial) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, inclusive, step);
    if (lane >= step) inclusive = Op::apply(inclusive, other);
  }
  if (lane == 31) partial[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    int total = partial[lane];
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAll, total, step);
      if (lane >= step) total = Op::apply(total, other);
    }
    partial[lane] = total;
  }
  __syncthreads();
  const int left = __shfl_up_sync(kAll, inclusive, 1);
  const int inside = lane == 0 ? 0 : left;
  const int result = warp == 0 ? inside : Op::apply(partial[warp - 1], inside);
  __syncthreads();
  return result;
}
static_assert(kWarps == 32, "the second level of the scan is one full warp");

__device__ void mark_document_starts(const PlanArgs& args, int words, unsigned* bits) {
  const int lane = threadIdx.x % 32;
  // Whole warps leave the loop together, so every ballot has 32 lanes.
  for (int word = threadIdx.x / 32; word < words; word += kWarps) {
    const int p = word * 32 + lane;
    const bool first = p < args.num_tokens && (p == 0 || args.doc_ids[p] != args.doc_ids[p - 1]);
    const unsigned ballot = __ballot_sync(kAll, first);
    if (lane == 0) bits[word] = ballot;
  }
}

// before[w] = last document start in words 0..w-1, or 0. Each thread scans a run of consecutive words.
__device__ void scan_document_starts(int words, const unsigned* bits, int* before, int* partial) {
  const int run = (words + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * run, words), end = min(begin + run, words);
  int last = 0;
  for (int w = begin; w < end; ++w) {
    if (bits[w] != 0) last = w * 32 + 31 - __clz(bits[w]);
  }
  last = scan_exclusive<Max>(last, partial);
  for (int w = begin; w < end; ++w) {
    before[w] = last;
    if (bits[w] != 0) last = w * 32 + 31 - __clz(bits[w]);
  }
}

__device__ void find_intervals(const PlanArgs& args, const unsigned* bits, const int* before, int* histogram) {
  for (int j = threadIdx.x; j < args.num_anchors; j += kThreads) {
    const int anchor = min(max(args.anchors[j], 0), args.num_tokens);
    int document = 0;
    if (args.num_tokens > 0) {
      const int p = min(anchor, args.num_tokens - 1), word = p / 32;
      const unsigned upto = bits[word] & (kAll >> (31 - p % 32));
      document = upto != 0 ? word * 32 + 31 - __clz(upto) : before[word];
    }
    const int lower = args.window > 0 ? anchor - args.window + 1 : 0;
    const int start = min(max(document, lower), anchor);
    args.starts[j] = start;
    args.ends[j] = anchor;
    atomicAdd(&histogram[weight(start, anchor)], 1);
  }
}

// One warp places 32 blocks at a time, so equal weights keep their order and the result is the same on every run.
// `next` is the histogram turned into each weight's first place.
__device__ void place_blocks(const PlanArgs& args, int* next) {
  const int lane = threadIdx.x % 32;
  for (int base = 0; base < args.num_anchors; base += 32) {
    const int j = base + lane;
    const bool live = j < args.num_anchors;
    const int bucket = live ? weight(args.starts[j], args.ends[j]) : -1;
    const unsigned peers = __match_any_sync(kAll, bucket);
    const int rank = __popc(peers & ((1u << lane) - 1));
    const int place = live ? next[bucket] + rank : 0;
    __syncwarp();
    if (live && rank == 0) next[bucket] += __popc(peers);
    __syncwarp();
    if (live) args.order[place] = j;
  }
}

__global__ void __launch_bounds__(kThreads) plan_kernel(const PlanArgs args) {
  extern __shared__ unsigned bits[];
  __shared__ int partial[kWarps];
  __shared__ int histogram[kWeights];
  const int words = (args.num_tokens + 31) / 32;
  int* before = reinterpret_cast<int*>(bits + words);

  mark_document_starts(args, words, bits);
  histogram[threadIdx.x] = 0;
  __syncthreads();
  scan_document_starts(words, bits, before, partial);
  __syncthreads();
  find_intervals(args, bits, before, histogram);
  __syncthreads();
  // Heaviest first: thread i owns weight kWeights - 1 - i, so a plain scan counts the heavier blocks.
  const int mine = kWeights - 1 - static_cast<int>(threadIdx.x);
  const int count = histogram[mine];
  const int heavier = scan_exclusive<Sum>(count, partial);
  histogram[mine] = heavier;
  __syncthreads();
  if (threadIdx.x < 32) {
    place_blocks(args, histogram);
    return;
  }
  const int tiles = (args.num_tokens + kTile - 1) / kTile;
  for (int t = threadIdx.x - 32; t < tiles; t += kThreads - 32) {
    const int last = min((t + 1) * kTile, args.num_tokens) - 1;
    args.tile_ranges[2 * t] = first_above(args.ends, args.num_anchors, t * kTile);
    args.tile_ranges[2 * t + 1] = first_above(args.starts, args.num_anchors, last);
  }
}

}  // namespace

int plan_cuda(const PlanArgs& args, void* stream) {
  const int words = (args.num_tokens + 31) / 32;
  const int shared = words * 2 * static_cast<int>(sizeof(int));
  // 48 KiB needs no permission, and includes the kernel's static shared memory.
  if (shared > 32 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  plan_kernel<<<1, kThreads, shared, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace dflash
