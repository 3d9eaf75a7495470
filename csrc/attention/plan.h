// The plan: which tile. O(A + T/128) integers that serve every layer, forward and backward, of one step.
//
// T tokens in a packed row · A anchors, ascending · N = ceil(T / kTile) key tiles
//
// Block j (the block of anchor j) sees the context interval [starts[j], ends[j]) at slot 0; with a window the lower
// bound of slot k is k higher, which the attention kernels apply themselves. Documents are contiguous, so both bounds
// never decrease with j, and the blocks that see a tile of keys are one contiguous range, found by binary search.
#pragma once

#include <cstdint>

namespace dflash {

inline constexpr int32_t kTile = 128;
// Blocks are ordered by their number of key tiles, counted up to here: beyond 131072 keys all are equally heavy.
inline constexpr int32_t kWeights = 1024;

struct PlanArgs {
  const int32_t* anchors;  // (A,) ascending
  const int32_t* doc_ids;  // (T,) -1 = padding
  int32_t num_anchors;
  int32_t num_tokens;
  int32_t window;        // 0 = none
  int32_t* starts;       // (A,)
  int32_t* ends;         // (A,)
  int32_t* tile_ranges;  // (N, 2): first and one past the last block that sees the tile
  int32_t* order;        // (A,) blocks, most key tiles first, equal ones ascending
};

#ifdef __CUDACC__
#define DFLASH_HOST_DEVICE __host__ __device__
#else
#define DFLASH_HOST_DEVICE
#endif

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

// Weight of a block in the work order: its number of key tiles, capped.
DFLASH_HOST_DEVICE inline int32_t weight(int32_t start, int32_t end) {
  const int32_t tiles = (end - start + kTile - 1) / kTile;
  return tiles < kWeights ? tiles : kWeights - 1;
}

void plan_cpu(const PlanArgs& args);

// One launch on `stream` (a cudaStream_t), no host sync. Returns a cudaError_t.
int plan_cuda(const PlanArgs& args, void* stream);
// Tokens that plan_cuda can take: its document bits live in shared memory.
inline constexpr int32_t kMaxPlanTokens = 1 << 19;

}  // namespace dflash
