// Backward with mma.sync, in two kernels on one stream, without atomics: every gradient row has one writer.
//   dq    query-stationary, like the forward: a CTA takes one unit of one kv head; also computes delta, which dkv reads
//   dkv   key-stationary: a CTA takes one tile of keys of one kv head, of the context or of the blocks' own rows, and
//         all packed query rows of the blocks that may see it
// Both recompute the weights p = exp(score - lse). With dp = dout v and ds = p (dp - delta), where delta is the sum
// over D of out times dout: dq = scale ds k, dk = scale ds^T q, dv = p^T dout.
#pragma once

#include "attention/sm80_queries.h"

namespace dflash::gpu::sm80 {

struct BackwardParameters {
  Rows rows;
  const int32_t *order, *tile_ranges, *tile_order;
  int context_tiles;  // of kTile keys
  const void *dout, *q, *out;
  Keys keys;
  const float* lse;
  float* delta;
  void *dq, *dk_ctx, *dv_ctx, *dk_blk, *dv_blk;
  int q_heads;
  float scale, log2_scale;  // the second times log2(e)
};

// --- dq ---

template <Half kHalf, int kHeadDim>
struct QueryGradientTraits {
  static constexpr Half kType = kHalf;
  static constexpr int kDim = kHeadDim;
  static constexpr int kThreads = kUnitRows / 16 * 32;
  static constexpr int kBlocks = kDim <= 96 ? 3 : kDim <= 128 ? 2 : 1;  // per multiprocessor, as registers go
  static constexpr int kKeys = kDim <= 128 ? 32 : 16;
  static constexpr int kQueryBytes = tile_bytes<kDim>(kUnitRows);
  static constexpr int kTileBytes = tile_bytes<kDim>(kKeys);
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, values
  static constexpr int kStagesAt = 2 * kQueryBytes;   // after queries, output gradients
  static constexpr int kBoundsAt = kStagesAt + 2 * kStageBytes;
  static constexpr int kShared = kBoundsAt + 2 * kUnitRows * static_cast<int>(sizeof(Interval));
};

// Sum over D of out times dout for one row, by the four lanes of a quad; all get it.
template <Half kType, int kDim>
DFLASH_DEVICE float quad_delta(const BackwardParameters& p, int64_t row) {
  float sum = 0;
  if (row >= 0) {
    const Chunk* out = reinterpret_cast<const Chunk*>(static_cast<const char*>(p.out) + row * kDim * 2);
    const Chunk* dout = reinterpret_cast<const Chunk*>(static_cast<const char*>(p.dout) + row * kDim * 2);
#pragma unroll
    for (int i = lane() % 4; i < kDim / 8; i += 4) sum += dot<kType>(out[i], dout[i]);
  }
  sum += shuffle_xor(sum, 1);
  return sum + shuffle_xor(sum, 2);
}

// One warp's 16 query rows.
template <typename Traits>
struct QueryGradientWarp {
  static constexpr int kDim = Traits::kDim, kKeys = Traits::kKeys;
  static constexpr Half kType = Traits::kType;

  float dq[1][kDim / 8][4] = {};
  float log2_lse[2], delta[2];

  // Reads the rows' statistics and writes their delta.
  DFLASH_DEVICE void begin(const BackwardParameters& p, const ItemRows& item_rows, int row0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = item_rows.at(row0 + 8 * half + lane() / 4);
      delta[half] = quad_delta<kType, kDim>(p, row);
      log2_lse[half] = row >= 0 ? p.lse[row] * kLog2E : 0;
      if (row >= 0 && lane() % 4 == 0) p.delta[row] = delta[half];
    }
  }

  template <bool kAll>
  DFLASH_DEVICE void add_tile(uint32_t queries, uint32_t keys, const Interval* bounds, const Cover& cover, int p,
                              float log2_scale) {
    const Steps steps = Steps::of(cover, p);
    const uint32_t douts = queries + Traits::kQueryBytes, values = keys + Traits::kTileBytes;
    float s[1][kKeys / 8][4] = {}, dp[1][kKeys / 8][4] = {};
    multiply_rows<kType, kDim, kAll>(s, queries, keys, steps);
    if constexpr (!kAll) mask_keys(s, bounds, p);
    multiply_rows<kType, kDim, kAll>(dp, douts, values, steps);
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int half = i / 2 % 2;
      const float weight = exp2_fast(s[0][i / 4][i % 4] * log2_scale - log2_lse[half]);
      s[0][i / 4][i % 4] = weight * (dp[0][i / 4][i % 4] - delta[half]);
    }
    multiply_columns<kType, kDim, kAll>(dq, s, keys, steps);
  }
};

template <typename Traits>
DFLASH_GLOBAL void DFLASH_BOUNDS(Traits::kThreads, Traits::kBlocks)
    query_gradient(const DFLASH_PARAMETER BackwardParameters p) {
  constexpr int kDim = Traits::kDim, kKeys = Traits::kKeys, kThreads = Traits::kThreads;
  char* const memory = shared_memory();
  const uint32_t queries = shared_address(memory);
  Interval* bounds = reinterpret_cast<Interval*>(memory + Traits::kBoundsAt);
  const int head = block_index() % p.keys.kv_heads, unit = block_index() / p.keys.kv_heads;
  const int item = p.order[unit / 2], unit_row0 = unit % 2 * kUnitRows;
  const int position = (2 * item + unit % 2) * p.rows.unit_positions;
  if (position >= p.rows.positions) return;  // the last item may have one unit
  const ItemRows item_rows{p.rows, item, p.q_heads, head * p.rows.group.by};

  KeyWalk walk = KeyWalk::of(p.rows, position, p.rows.unit_positions);
  copy_queries<kDim, kUnitRows, kThreads>(p.q, item_rows, unit_row0, queries);
  copy_queries<kDim, kUnitRows, kThreads>(p.dout, item_rows, unit_row0, queries + Traits::kQueryBytes);
  const uint32_t stages = queries + Traits::kStagesAt;
  uint32_t now = 0;  // the stage in use; the other one is at kStageBytes - now
  copy_keys<kDim, kKeys, kThreads>(p.keys, head, walk, stages);
  write_bounds(p.rows, item, unit_row0, kUnitRows, bounds);
  sync_threads();

  const int row0 = warp() * 16;
  Cover cover = warp_cover<16>(p.rows, bounds + row0, item, unit_row0 + row0);
  Segment segment = Segment::kContext;
  QueryGradientWarp<Traits> state;
  state.begin(p, item_rows, unit_row0 + row0);
  while (!walk.done()) {
    KeyWalk next = walk;
    next.advance(kKeys);
    copy_async_wait<0>();
    sync_threads();  // this stage has arrived for all, and all have left the other one
    if (!next.done()) copy_keys<kDim, kKeys, kThreads>(p.keys, head, next, stages + Traits::kStageBytes - now);
    if (walk.segment != segment) {
      segment = walk.segment;
      bounds += kUnitRows;
      cover = warp_cover<16>(p.rows, bounds + row0, item, unit_row0 + row0);
    }
    const uint32_t warp_queries = queries + tile_bytes<kDim>(row0);
    // Dead first: a warp of padding alone has an empty cover, which every tile is inside of.
    if (!cover.dead(walk.p, kKeys)) {
      if (cover.interior(walk.p, kKeys)) {
        state.template add_tile<true>(warp_queries, stages + now, bounds + row0, cover, walk.p, p.log2_scale);
      } else {
        state.template add_tile<false>(warp_queries, stages + now, bounds + row0, cover, walk.p, p.log2_scale);
      }
    }
    walk = next;
    now = Traits::kStageBytes - now;
  }
  stage_rows<Traits::kType, kDim>(memory, row0, state.dq, {{p.scale, p.scale}});
  store_rows<kDim, 16>(memory, row0, [&](int r) {
    const int64_t row = item_rows.at(unit_row0 + row0 + r);
    return row >= 0 ? static_cast<char*>(p.dq) + row * kDim * 2 : nullptr;
  });
}

// --- dk, dv ---

// What one stage's query rows see, and their statistics; a row of padding sees nothing.
template <int kQueries>
struct QueryStatistics {
  Interval bounds[kQueries];
  float log2_lse[kQueries], delta[kQueries];
  Cover cover;
};

struct QueryStatistic {
  Interval bounds{0, 0};
  float log2_lse = 0, delta = 0;
};

// kDk, kDv: which gradients a CTA makes. At D = 256 their sums do not fit the registers together.
template <Half kHalf, int kHeadDim, bool kWantDk, bool kWantDv>
struct KeyGradientTraits {
  static constexpr Half kType = kHalf;
  static constexpr int kDim = kHeadDim;
  static constexpr bool kDk = kWantDk, kDv = kWantDv;
  static constexpr int kKeys = kDim <= 128 ? kTile : kTile / 2;
  static constexpr int kThreads = kKeys / 16 * 32;
  static constexpr int kBlocks = 1;
  static constexpr int kQueries = kDim <= 128 ? 32 : 16;
  static_assert(kQueries <= 32, "one warp prepares a stage's rows, a lane each");
  static constexpr int kKeyBytes = tile_bytes<kDim>(kKeys);
  static constexpr int kTileBytes = tile_bytes<kDim>(kQueries);
  static constexpr int kStageBytes = 2 * kTileBytes;  // queries, output gradients
  static constexpr int kStagesAt = 2 * kKeyBytes;     // after keys, values
  static constexpr int kStatisticsAt = kStagesAt + 2 * kStageBytes;
  static constexpr int kShared = kStatisticsAt + 2 * static_cast<int>(sizeof(QueryStatistics<kQueries>));
};

// One CTA's keys and the packed query rows that may see them.
struct KeyTile {
  Segment segment;
  int head;
  int p, end;               // rows of the segment's tensors from p on, less than `end`
  int first_row, last_row;  // packed query rows [first, last)

  template <int kKeys>
  DFLASH_DEVICE static KeyTile of(const BackwardParameters& p, int index) {
    const Rows& rows = p.rows;
    constexpr int kParts = kTile / kKeys;
    const int per_tile = kParts * p.keys.kv_heads, context = p.context_tiles * per_tile;
    const int block_rows = rows.block_size.by * rows.group.by;
    KeyTile tile;
    if (index < context) {
      const int planned = p.tile_order[index / per_tile];
      tile.segment = Segment::kContext;
      tile.head = index % p.keys.kv_heads;
      tile.p = planned * kTile + index % per_tile / p.keys.kv_heads * kKeys;
      tile.end = rows.tokens;
      tile.first_row = p.tile_ranges[2 * planned] * block_rows;
      tile.last_row = p.tile_ranges[2 * planned + 1] * block_rows;
      return tile;
    }
    tile.segment = Segment::kOwn;
    tile.head = (index - context) % p.keys.kv_heads;
    tile.p = (index - context) / p.keys.kv_heads * kKeys;
    tile.end = rows.positions;
    tile.first_row = rows.block_size.quotient(tile.p) * block_rows;
    tile.last_row = (rows.block_size.quotient(smaller(tile.p + kKeys, tile.end) - 1) + 1) * block_rows;
    return tile;
  }
};

// Row of the (A*S, Hq, D) tensors that holds a packed row.
DFLASH_DEVICE int64_t packed_row(const BackwardParameters& p, const KeyTile& tile, int row) {
  return static_cast<int64_t>(p.rows.group.quotient(row)) * p.q_heads + tile.head * p.rows.group.by +
         p.rows.group_head(row);
}

// Starts copying a stage's queries and output gradients, packed rows from `row0` on, as one group.
template <typename Traits>
DFLASH_DEVICE void copy_stage(const BackwardParameters& p, const KeyTile& tile, int row0, uint32_t stage) {
  constexpr int kDim = Traits::kDim;
  const auto rows_of = [&](const void* tensor) {
    return [&, tensor](int r) {
      return row0 + r < tile.last_row ? static_cast<const char*>(tensor) + packed_row(p, tile, row0 + r) * kDim * 2
                                      : nullptr;
    };
  };
  copy_rows<kDim, Traits::kQueries, Traits::kThreads>(stage, rows_of(p.q));
  copy_rows<kDim, Traits::kQueries, Traits::kThreads>(stage + Traits::kTileBytes, rows_of(p.dout));
  copy_async_commit();
}

// This lane's row of a stage.
template <int kQueries>
DFLASH_DEVICE QueryStatistic read_statistic(const BackwardParameters& p, const KeyTile& tile, int row0) {
  QueryStatistic mine;
  const int packed = row0 + lane();
  if (lane() < kQueries && packed < tile.last_row) {
    const int64_t row = packed_row(p, tile, packed);
    mine.bounds = p.rows.sees(tile.segment, p.rows.group.quotient(packed));
    mine.log2_lse = p.lse[row] * kLog2E;
    mine.delta = p.delta[row];
  }
  return mine;
}

// By one whole warp.
template <int kQueries>
DFLASH_DEVICE void write_statistics(const QueryStatistic& mine, QueryStatistics<kQueries>& stage) {
  Cover cover;
  if (lane() < kQueries) {
    stage.bounds[lane()] = mine.bounds;
    stage.log2_lse[lane()] = mine.log2_lse;
    stage.delta[lane()] = mine.delta;
    cover.add(mine.bounds);
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    cover.add(Cover{shuffle_xor(cover.first, mask), shuffle_xor(cover.last, mask), shuffle_xor(cover.from, mask),
                    shuffle_xor(cover.until, mask)});
  }
  if (lane() == 0) stage.cover = cover;
}

// One warp's 16 keys. Scores are transposed: rows are keys, columns queries.
template <typename Traits>
struct KeyGradientWarp {
  static constexpr int kDim = Traits::kDim, kQueries = Traits::kQueries;
  static constexpr Half kType = Traits::kType;

  // Of the two only what the traits want is ever touched, and so held.
  float dk[1][kDim / 8][4] = {}, dv[1][kDim / 8][4] = {};

  // keys: address of the warp's rows, of which the first is row p of the segment.
  template <bool kAll>
  DFLASH_DEVICE void add_stage(uint32_t keys, uint32_t stage, const QueryStatistics<kQueries>& rows, int p,
                               float log2_scale) {
    const Steps every{0, kQueries / 16};
    const uint32_t douts = stage + Traits::kTileBytes, values = keys + Traits::kKeyBytes;
    float s[1][kQueries / 8][4] = {}, dp[1][kQueries / 8][4] = {};
    multiply_rows<kType, kDim, true>(s, keys, stage, every);
    if constexpr (Traits::kDk) multiply_rows<kType, kDim, true>(dp, values, douts, every);
#pragma unroll
    for (int i = 0; i < kQueries / 2; ++i) {
      const int column = i / 4 * 8 + lane() % 4 * 2 + i % 2, key = p + i / 2 % 2 * 8 + lane() / 4;
      float &weight = s[0][i / 4][i % 4], &slope = dp[0][i / 4][i % 4];
      weight = exp2_fast(weight * log2_scale - rows.log2_lse[column]);
      slope = weight * (slope - rows.delta[column]);
      if constexpr (!kAll) {
        // Not by weight 0: what a key that nobody sees holds may be NaN.
        const bool seen = rows.bounds[column].lo <= key && key < rows.bounds[column].hi;
        weight = seen ? weight : 0;
        slope = seen ? slope : 0;
      }
    }
    if constexpr (Traits::kDv) multiply_columns<kType, kDim, true>(dv, s, douts, every);
    if constexpr (Traits::kDk) multiply_columns<kType, kDim, true>(dk, dp, stage, every);
  }
};

// Writes a warp's 16 rows of dk or dv, from key row0 of the tile on, by way of the rows of `memory` that held its keys.
template <typename Traits>
DFLASH_DEVICE void write_gradient(const float (&sum)[1][Traits::kDim / 8][4], float factor, void* gradient,
                                  const BackwardParameters& p, const KeyTile& tile, int row0, char* memory) {
  constexpr int kDim = Traits::kDim;
  stage_rows<Traits::kType, kDim>(memory, row0, sum, {{factor, factor}});
  const KeyRows rows = KeyRows::of<kDim>(gradient, p.keys.kv_heads, tile.head);
  store_rows<kDim, 16>(memory, row0, [&](int r) {
    const int row = tile.p + row0 + r;
    return row < tile.end ? const_cast<char*>(rows.at(row)) : nullptr;
  });
}

template <typename Traits>
DFLASH_GLOBAL void DFLASH_BOUNDS(Traits::kThreads, Traits::kBlocks)
    key_gradient(const DFLASH_PARAMETER BackwardParameters p) {
  constexpr int kDim = Traits::kDim, kQueries = Traits::kQueries;
  using Statistics = QueryStatistics<kQueries>;
  char* const memory = shared_memory();
  const uint32_t keys = shared_address(memory);
  Statistics* const statistics = reinterpret_cast<Statistics*>(memory + Traits::kStatisticsAt);
  const uint32_t stages = keys + Traits::kStagesAt;
  uint32_t now = 0;  // the stage in use; the other one is at kStageBytes - now
  const KeyTile tile = KeyTile::of<Traits::kKeys>(p, block_index());
  if (tile.p >= tile.end) return;  // the context's last tile may be short of its second half
  const bool own = tile.segment == Segment::kOwn;

  if (tile.first_row < tile.last_row) {
    const auto rows_of = [&](const void* tensor) {
      const KeyRows rows = KeyRows::of<kDim>(tensor, p.keys.kv_heads, tile.head);
      return [&tile, rows](int r) { return tile.p + r < tile.end ? rows.at(tile.p + r) : nullptr; };
    };
    copy_rows<kDim, Traits::kKeys, Traits::kThreads>(keys, rows_of(own ? p.keys.k_blk : p.keys.k_ctx));
    if constexpr (Traits::kDk)
      copy_rows<kDim, Traits::kKeys, Traits::kThreads>(keys + Traits::kKeyBytes,
                                                       rows_of(own ? p.keys.v_blk : p.keys.v_ctx));
    copy_stage<Traits>(p, tile, tile.first_row, stages);
    if (warp() == 0) write_statistics(read_statistic<kQueries>(p, tile, tile.first_row), *statistics);
  }
  const int row0 = warp() * 16;
  KeyGradientWarp<Traits> state;
  for (int row = tile.first_row; row < tile.last_row; row += kQueries) {
    const bool more = row + kQueries < tile.last_row;
    copy_async_wait<0>();
    sync_threads();  // this stage has arrived for all, and all have left the other one
    QueryStatistic ahead;
    if (more) {
      copy_stage<Traits>(p, tile, row + kQueries, stages + Traits::kStageBytes - now);
      if (warp() == 0) ahead = read_statistic<kQueries>(p, tile, row + kQueries);
    }
    const Statistics& rows = statistics[now != 0];
    const Cover cover = rows.cover;
    const uint32_t warp_keys = keys + tile_bytes<kDim>(row0);
    // Dead first: a warp of padding alone has an empty cover, which every tile is inside of.
    if (!cover.dead(tile.p + row0, 16)) {
      if (cover.interior(tile.p + row0, 16)) {
        state.template add_stage<true>(warp_keys, stages + now, rows, tile.p + row0, p.log2_scale);
      } else {
        state.template add_stage<false>(warp_keys, stages + now, rows, tile.p + row0, p.log2_scale);
      }
    }
    // Read before the products and written after them, so that nobody waits for global memory.
    if (more && warp() == 0) write_statistics(ahead, statistics[now == 0]);
    now = Traits::kStageBytes - now;
  }
  if constexpr (Traits::kDk) {
    write_gradient<Traits>(state.dk, p.scale, own ? p.dk_blk : p.dk_ctx, p, tile, row0, memory);
  }
  if constexpr (Traits::kDv) {
    char* const values = memory + Traits::kKeyBytes;
    write_gradient<Traits>(state.dv, 1, own ? p.dv_blk : p.dv_ctx, p, tile, row0, values);
  }
}

}  // namespace dflash::gpu::sm80
