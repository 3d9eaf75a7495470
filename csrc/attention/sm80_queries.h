// What the query-stationary kernels (forward, dq) share: the rows of a work item, their masks, and key tiles.
#pragma once

#include <cmath>

#include "attention/sm80_tile.h"

namespace dflash::gpu::sm80 {

// Both segments' tensors, (rows, Hkv, D).
struct Keys {
  const void *k_ctx, *v_ctx, *k_blk, *v_blk;
  int kv_heads;
};

// A work item's query rows in an (A*S, Hq, D) tensor.
struct ItemRows {
  const Rows& rows;
  int item, q_heads, head0;  // head0: the kv head's first query head

  // Row of the tensor, of D numbers, or -1 for a row of padding.
  DFLASH_DEVICE int64_t at(int r) const {
    const int position = rows.item_position(item, r);
    if (position < 0) return -1;
    return static_cast<int64_t>(position) * q_heads + head0 + rows.group_head(r % kUnitRows);
  }
};

// Fills the CTA's table of intervals: for each segment, one per row; rows of padding see nothing.
DFLASH_DEVICE void write_bounds(const Rows& rows, int item, int row0, int count, Interval* bounds) {
  for (int r = thread_index(); r < count; r += block_threads()) {
    const int position = rows.item_position(item, row0 + r);
    bounds[r] = position >= 0 ? rows.sees(Segment::kContext, position) : Interval{0, 0};
    bounds[count + r] = position >= 0 ? rows.sees(Segment::kOwn, position) : Interval{0, 0};
  }
}

// What a warp's kRows rows of an item, from row0 on, see of one segment. bounds: of these rows.
template <int kRows>
DFLASH_DEVICE Cover warp_cover(const Rows& rows, const Interval* bounds, int item, int row0) {
  Cover cover;
  const int r = lane() % kRows;
  if (rows.item_position(item, row0 + r) >= 0) cover.add(bounds[r]);
#pragma unroll
  for (int mask = 1; mask < kRows; mask *= 2) {
    cover.add(Cover{shuffle_xor(cover.first, mask), shuffle_xor(cover.last, mask), shuffle_xor(cover.from, mask),
                    shuffle_xor(cover.until, mask)});
  }
  return cover;
}

// Scores of keys that a row does not see become -inf. Key p is the tile's first; bounds: of the warp's rows.
template <int kM, int kColumns>
DFLASH_DEVICE void mask_keys(float (&s)[kM][kColumns][4], const Interval* bounds, int p) {
  const int g = lane() / 4, c = lane() % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Interval row = bounds[16 * m + 8 * half + g];
#pragma unroll
      for (int i = 0; i < 2 * kColumns; ++i) {
        const int key = p + i / 2 * 8 + 2 * c + i % 2;
        if (key < row.lo || key >= row.hi) s[m][i / 2][2 * half + i % 2] = -INFINITY;
      }
    }
  }
}

// Starts copying the walk's tile, keys then values, as one group.
template <int kDim, int kKeys, int kThreads>
DFLASH_DEVICE void copy_keys(const Keys& keys, int head, const KeyWalk& walk, uint32_t stage) {
  const bool own = walk.segment == Segment::kOwn;
  const KeyRows k = KeyRows::of<kDim>(own ? keys.k_blk : keys.k_ctx, keys.kv_heads, head);
  const KeyRows v = KeyRows::of<kDim>(own ? keys.v_blk : keys.v_ctx, keys.kv_heads, head);
  const int valid = walk.limits().hi - walk.p;
  copy_key_rows<kDim, kKeys, kThreads>(stage, k, walk.p, valid);
  copy_key_rows<kDim, kKeys, kThreads>(stage + tile_bytes<kDim>(kKeys), v, walk.p, valid);
  copy_async_commit();
}

// Starts copying kRows rows of an item's queries, or of their output's gradient, from row0 on; padding becomes zeros.
template <int kDim, int kRows, int kThreads>
DFLASH_DEVICE void copy_queries(const void* tensor, const ItemRows& item_rows, int row0, uint32_t tile) {
  copy_rows<kDim, kRows, kThreads>(tile, [&](int r) {
    const int64_t row = item_rows.at(row0 + r);
    return row >= 0 ? static_cast<const char*>(tensor) + row * kDim * 2 : nullptr;
  });
}

}  // namespace dflash::gpu::sm80
