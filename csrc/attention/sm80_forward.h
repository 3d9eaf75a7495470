// Forward with mma.sync. A CTA takes one work item of one kv head: 128 packed rows against every key tile they need.
//
// Queries stay in shared memory; key tiles pass through two stages, the next one copied while this one is used, with
// one barrier per tile. A warp owns 16 * kM rows from scores to output, so rows need no other exchange than shuffles
// within a quad; only tiles at the edge of an interval are masked.
#pragma once

#include "attention/sm80_queries.h"

namespace dflash::gpu::sm80 {

struct ForwardParameters {
  Rows rows;
  const int32_t* order;
  const void* q;
  Keys keys;
  void* out;
  float* lse;
  int q_heads;
  float scale;  // times log2(e)
};

template <Half kHalf, int kHeadDim>
struct ForwardTraits {
  static constexpr Half kType = kHalf;
  static constexpr int kDim = kHeadDim;
  // 32 rows per warp read each key from shared memory for twice the arithmetic; at D = 256 the output fills the
  // registers with 16.
  static constexpr int kM = kDim <= 128 ? 2 : 1;
  static constexpr int kThreads = kItemRows / (16 * kM) * 32;
  static constexpr int kBlocks = kDim <= 128 ? 2 : 1;  // per multiprocessor, as registers go
  static constexpr int kKeys = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kQueryBytes = tile_bytes<kDim>(kItemRows);
  static constexpr int kTileBytes = tile_bytes<kDim>(kKeys);
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, values
  static constexpr int kStagesAt = kQueryBytes;
  static constexpr int kBoundsAt = kStagesAt + 2 * kStageBytes;
  static constexpr int kShared = kBoundsAt + 2 * kItemRows * static_cast<int>(sizeof(Interval));
};

// One warp's rows: the online softmax in base 2 over the tiles seen so far. Peaks are of raw scores, and may lag.
template <typename Traits>
struct ForwardWarp {
  static constexpr int kM = Traits::kM, kDim = Traits::kDim, kKeys = Traits::kKeys;
  static constexpr Half kType = Traits::kType;

  float out[kM][kDim / 8][4] = {};
  float peak[kM][2], total[kM][2];  // totals are of this lane's columns
  float scale;                      // of scores, times log2(e)

  DFLASH_DEVICE void begin(float log2_scale) {
    scale = log2_scale;
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) {
      peak[i / 2][i % 2] = -INFINITY;
      total[i / 2][i % 2] = 0;
    }
  }

  // A tile of keys from p on. bounds: of the warp's rows.
  template <bool kAll>
  DFLASH_DEVICE void add_tile(uint32_t queries, uint32_t keys, const Interval* bounds, const Cover& cover, int p) {
    const Steps steps = Steps::of(cover, p);
    float s[kM][kKeys / 8][4] = {};
    multiply_rows<kType, kDim, kAll>(s, queries, keys, steps);
    if constexpr (!kAll) mask_keys(s, bounds, p);
    raise_peaks(s);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // A row that has seen nothing yet has peak -inf; -inf - -inf would be NaN.
        const float shift = peak[m][half] == -INFINITY ? 0 : peak[m][half] * scale;
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i) {
          float& x = s[m][i / 2][2 * half + i % 2];
          x = exp2_fast(x * scale - shift);
          total[m][half] += x;
        }
      }
    }
    multiply_columns<kType, kDim, kAll>(out, s, keys + Traits::kTileBytes, steps);
  }

  // lse of a row, natural, and the factor that normalises its output.
  DFLASH_DEVICE float finish(int m, int half, float& factor) {
    float sum = total[m][half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    factor = 1 / sum;
    return (peak[m][half] * scale) * (1 / kLog2E) + logf(sum);
  }

 private:
  // Peaks only have to keep exponentials in range, so they rise when one of the warp's has become too low by 2^kSlack,
  // which after the first tiles is rare, and the output is seldom rescaled.
  DFLASH_DEVICE void raise_peaks(const float (&s)[kM][kKeys / 8][4]) {
    constexpr float kSlack = 8;
    float top[kM][2];
    bool low = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = s[m][0][2 * half];
#pragma unroll
        for (int i = 1; i < kKeys / 4; ++i) x = fmaxf(x, s[m][i / 2][2 * half + i % 2]);
        x = fmaxf(x, shuffle_xor(x, 1));
        top[m][half] = fmaxf(x, shuffle_xor(x, 2));
        low = low || top[m][half] * scale > peak[m][half] * scale + kSlack;
      }
    }
    if (ballot(low) == 0) return;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float raised = fmaxf(peak[m][half], top[m][half]);
        const float ratio = raised == -INFINITY ? 1 : exp2_fast((peak[m][half] - raised) * scale);
        peak[m][half] = raised;
        total[m][half] *= ratio;
#pragma unroll
        for (int i = 0; i < kDim / 4; ++i) out[m][i / 2][2 * half + i % 2] *= ratio;
      }
    }
  }
};

// Normalises a warp's rows and writes them by way of the rows of `memory` that held its queries.
template <typename Traits>
DFLASH_DEVICE void write_output(ForwardWarp<Traits>& state, const ItemRows& item_rows, char* memory, int row0,
                                const ForwardParameters& p) {
  constexpr int kM = Traits::kM, kDim = Traits::kDim;
  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float lse = state.finish(m, half, factor[m][half]);
      const int64_t row = item_rows.at(row0 + 16 * m + 8 * half + lane() / 4);
      if (row >= 0 && lane() % 4 == 0) p.lse[row] = lse;
    }
  }
  stage_rows<Traits::kType, kDim>(memory, row0, state.out, factor);
  store_rows<kDim, 16 * kM>(memory, row0, [&](int r) {
    const int64_t row = item_rows.at(row0 + r);
    return row >= 0 ? static_cast<char*>(p.out) + row * kDim * 2 : nullptr;
  });
}

template <typename Traits>
DFLASH_GLOBAL void DFLASH_BOUNDS(Traits::kThreads, Traits::kBlocks)
    forward(const DFLASH_PARAMETER ForwardParameters p) {
  constexpr int kDim = Traits::kDim, kWarpRows = 16 * Traits::kM;
  char* const memory = shared_memory();
  const uint32_t queries = shared_address(memory);
  Interval* bounds = reinterpret_cast<Interval*>(memory + Traits::kBoundsAt);
  const int item = p.order[block_index() / p.keys.kv_heads], head = block_index() % p.keys.kv_heads;
  const ItemRows item_rows{p.rows, item, p.q_heads, head * p.rows.group.by};

  KeyWalk walk = KeyWalk::of(p.rows, item * 2 * p.rows.unit_positions, 2 * p.rows.unit_positions);
  copy_queries<kDim, kItemRows, Traits::kThreads>(p.q, item_rows, 0, queries);
  const uint32_t stages = queries + Traits::kStagesAt;
  uint32_t now = 0;  // the stage in use; the other one is at kStageBytes - now
  copy_keys<kDim, Traits::kKeys, Traits::kThreads>(p.keys, head, walk, stages);
  write_bounds(p.rows, item, 0, kItemRows, bounds);
  sync_threads();

  const int row0 = warp() * kWarpRows;
  Cover cover = warp_cover<kWarpRows>(p.rows, bounds + row0, item, row0);
  Segment segment = Segment::kContext;
  ForwardWarp<Traits> state;
  state.begin(p.scale);
  while (!walk.done()) {
    KeyWalk next = walk;
    next.advance(Traits::kKeys);
    copy_async_wait<0>();
    sync_threads();  // this stage has arrived for all, and all have left the other one
    if (!next.done())
      copy_keys<kDim, Traits::kKeys, Traits::kThreads>(p.keys, head, next, stages + Traits::kStageBytes - now);
    if (walk.segment != segment) {
      segment = walk.segment;
      bounds += kItemRows;
      cover = warp_cover<kWarpRows>(p.rows, bounds + row0, item, row0);
    }
    const uint32_t warp_queries = queries + tile_bytes<kDim>(row0);
    // Dead first: a warp of padding alone has an empty cover, which every tile is inside of.
    if (!cover.dead(walk.p, Traits::kKeys)) {
      if (cover.interior(walk.p, Traits::kKeys)) {
        state.template add_tile<true>(warp_queries, stages + now, bounds + row0, cover, walk.p);
      } else {
        state.template add_tile<false>(warp_queries, stages + now, bounds + row0, cover, walk.p);
      }
    }
    walk = next;
    now = Traits::kStageBytes - now;
  }
  write_output(state, item_rows, memory, row0, p);
}

}  // namespace dflash::gpu::sm80
