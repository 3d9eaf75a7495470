// Backward on Hopper, second kernel: the gradients of keys and values. Key-stationary: a block of threads is one tile
// of 128 key rows of one kv head, of the context or of the blocks' own; each of its two consumer warpgroups keeps 64
// keys and their two 64 x D accumulators, and both walk the units of queries that may see the tile:
//   P^T = exp2(S^T - lse), dv += P^T dout, dS^T = P^T (dP^T - delta), dk += dS^T q
// Every key row is written by one block, so the result is the same on every run.
#pragma once

#include "attention/sm90_tile.h"

namespace dflash::gpu::sm90 {

struct DkvParameters {
  Rows rows;
  TensorMap q, dout;
  KeyMaps keys;
  const int32_t *tile_ranges, *tile_order;
  int tiles;  // of the context
  int q_heads, kv_heads;
  float scale, scale_log2;
  const float *lse, *delta;
  void *dk_ctx, *dv_ctx, *dk_blk, *dv_blk;
};

// What a unit's rows need beside their numbers; one for each stage, written by the producer's second warp.
struct RowStatistics {
  float lse[kUnitRows];  // to base 2
  float delta[kUnitRows];
  int lo[kUnitRows], hi[kUnitRows];  // the keys that a row sees
  Cover cover;                       // over all rows but padding
};

template <typename X>
struct alignas(8) Pair {
  X x[2];
};
// Elements i and i + 1 of an array, i even.
template <typename X>
DFLASH_DEVICE Pair<X> pair_at(const X* array, int i) {
  return *reinterpret_cast<const Pair<X>*>(array + i);
}

template <int kD>
struct DkvShape {
  static constexpr int kKeys = kTile;
  static constexpr int kStages = kD <= 64 ? 4 : 3;
  static constexpr int kKeyTile = tile_bytes(kD, kKeys), kUnit = tile_bytes(kD, kUnitRows);
  // Keys, values, the stages (queries, gradients), their statistics, the barriers: the keys', full and empty stages.
  static constexpr int kValues = kKeyTile, kUnits = 2 * kKeyTile, kStage = 2 * kUnit;
  static constexpr int kStatistics = kUnits + kStages * kStage;
  static constexpr int kBarriers = kStatistics + kStages * static_cast<int>(sizeof(RowStatistics));
  static constexpr int kShared = kBarriers + 8 * (1 + 2 * kStages);
};
static_assert(sizeof(RowStatistics) % 8 == 0);

// Which keys a block of threads has, and the units of query positions that may see them. Units are walked from the last
// to the first: tiles of one document have their last unit in common, so that blocks of threads that run at the same
// time read the same units from the second-level cache.
struct KeyTile {
  Segment segment;
  int first_key, keys;  // keys: those that exist
  int first_position, units;

  DFLASH_DEVICE static KeyTile of(const DkvParameters& p, int rank) {
    const int size = p.rows.block_size.by;
    if (rank < p.tiles) {
      const int tile = p.tile_order[rank];
      return over({Segment::kContext, tile * kTile, smaller(kTile, p.rows.tokens - tile * kTile), 0, 0}, p.rows,
                  p.tile_ranges[2 * tile] * size, p.tile_ranges[2 * tile + 1] * size);
    }
    const int first = (rank - p.tiles) * kTile, keys = smaller(kTile, p.rows.positions - first);
    return over({Segment::kOwn, first, keys, 0, 0}, p.rows, p.rows.block_size.quotient(first) * size,
                (p.rows.block_size.quotient(first + keys - 1) + 1) * size);
  }
  DFLASH_DEVICE int position(const Rows& rows, int unit) const { return first_position + unit * rows.unit_positions; }

 private:
  DFLASH_DEVICE static KeyTile over(KeyTile tile, const Rows& rows, int first, int last) {
    tile.first_position = first;
    tile.units = (larger(0, last - first) + rows.unit_positions - 1) / rows.unit_positions;
    return tile;
  }
};

template <int kD>
struct DkvStages {
  using Shape = DkvShape<kD>;

  char* shared;
  uint32_t base;

  DFLASH_DEVICE uint32_t queries(int stage) const { return base + Shape::kUnits + stage * Shape::kStage; }
  DFLASH_DEVICE uint32_t gradients(int stage) const { return queries(stage) + Shape::kUnit; }
  DFLASH_DEVICE RowStatistics* statistics(int stage) const {
    return reinterpret_cast<RowStatistics*>(shared + Shape::kStatistics) + stage;
  }
  DFLASH_DEVICE uint32_t keys_full() const { return base + Shape::kBarriers; }
  DFLASH_DEVICE uint32_t full(int stage) const { return base + Shape::kBarriers + 8 * (1 + stage); }
  DFLASH_DEVICE uint32_t empty(int stage) const { return full(Shape::kStages + stage); }

  DFLASH_DEVICE void init() const {
    barrier_init(keys_full(), 1);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      barrier_init(full(stage), 2);  // the copies and the statistics
      barrier_init(empty(stage), kConsumerWarps);
    }
  }
  // Rows that no copy fills, where G does not divide 64, must not hold NaN: P^T has a zero for them, and 0 * NaN is
  // NaN.
  DFLASH_DEVICE void clear() const {
    for (int i = thread_index(); i < Shape::kStages * Shape::kStage / 16; i += kThreads)
      reinterpret_cast<Chunk*>(shared + Shape::kUnits)[i] = {};
    async_fence();
  }
};

// The producer's first warp, one thread: the keys, then every unit.
template <int kD>
DFLASH_DEVICE void feed_dkv(const DkvParameters& p, const KeyTile& tile, int head, const DkvStages<kD>& stages) {
  using Shape = DkvShape<kD>;
  const bool own = tile.segment == Segment::kOwn;
  barrier_arrive_expect(stages.keys_full(), 2 * Shape::kKeyTile);
  for (int panel = 0; panel < panels(kD); ++panel) {
    const uint32_t to = stages.base + panel * kTile * kPanelRowBytes;
    copy_box(to, own ? &p.keys.k_blk : &p.keys.k_ctx, stages.keys_full(), panel * kPanel, head, tile.first_key);
    copy_box(to + Shape::kValues, own ? &p.keys.v_blk : &p.keys.v_ctx, stages.keys_full(), panel * kPanel, head,
             tile.first_key);
  }
  Cursor<Shape::kStages> cursor;
  for (int unit = tile.units - 1; unit >= 0; --unit) {
    const int position = tile.position(p.rows, unit);
    barrier_wait(stages.empty(cursor.stage), cursor.parity ^ 1);
    const uint32_t full = stages.full(cursor.stage);
    barrier_arrive_expect(full, 2 * unit_bytes<kD>(p.rows));
    copy_unit<kD>(stages.queries(cursor.stage), &p.q, full, p.rows, head, position);
    copy_unit<kD>(stages.gradients(cursor.stage), &p.dout, full, p.rows, head, position);
    cursor.advance();
  }
}

inline constexpr int kDescribers = 3;  // warps

// The producer's other warps: the statistics of every unit, two rows a lane. They take turns, because one warp's loads
// and shuffles take longer than a unit's products where the head dim is small.
template <int kD>
DFLASH_DEVICE void describe_units(const DkvParameters& p, const KeyTile& tile, int head, const DkvStages<kD>& stages) {
  const int lane = thread_index() % 32;
  for (int turn = thread_index() / 32 - 1; turn < tile.units; turn += kDescribers) {
    const int first = tile.position(p.rows, tile.units - 1 - turn);
    const int stage = turn % DkvShape<kD>::kStages, parity = turn / DkvShape<kD>::kStages % 2;
    float lse[2], delta[2];
    Interval sees[2];
    Cover cover;
    for (int half = 0; half < 2; ++half) {
      const int row = lane + 32 * half, offset = p.rows.group.quotient(row);
      const int position = offset < p.rows.unit_positions && first + offset < p.rows.positions ? first + offset : -1;
      const int64_t at = query_row(p.rows, p.q_heads, head, position, row);
      // A row of padding is all zeros, and adds nothing whatever its weight.
      lse[half] = at < 0 ? 0.0f : p.lse[at] * kLog2E;
      delta[half] = at < 0 ? 0.0f : p.delta[at];
      sees[half] = at < 0 ? Interval{0, 0} : p.rows.sees(tile.segment, position);
      if (at >= 0) cover.add(sees[half]);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
      cover.add(Cover{shuffle_xor(cover.first, mask), shuffle_xor(cover.last, mask), shuffle_xor(cover.from, mask),
                      shuffle_xor(cover.until, mask)});
    barrier_wait(stages.empty(stage), parity ^ 1);
    RowStatistics* statistics = stages.statistics(stage);
    for (int half = 0; half < 2; ++half) {
      const int row = lane + 32 * half;
      statistics->lse[row] = lse[half];
      statistics->delta[row] = delta[half];
      statistics->lo[row] = sees[half].lo;
      statistics->hi[row] = sees[half].hi;
    }
    if (lane == 0) statistics->cover = cover;
    sync_warp();
    if (lane == 0) barrier_arrive(stages.full(stage));
  }
}

// P^T from S^T: element i is the weight of one of the thread's two keys for one query row of the unit.
DFLASH_DEVICE void weigh(float (&d)[kUnitRows / 2], float scale_log2, const RowStatistics& rows, bool interior,
                         int first_key) {
  const int lane = thread_index() % 32, key = first_key + thread_index() % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kUnitRows / 2; i += 4) {
    const Pair<float> lse = pair_at(rows.lse, register_column(lane, i));
#pragma unroll
    for (int j = 0; j < 4; ++j) d[i + j] = exp2_fast(d[i + j] * scale_log2 - lse.x[j % 2]);
  }
  if (interior) return;
#pragma unroll
  for (int i = 0; i < kUnitRows / 2; i += 4) {
    const Pair<int> lo = pair_at(rows.lo, register_column(lane, i)), hi = pair_at(rows.hi, register_column(lane, i));
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (key + j / 2 * 8 < lo.x[j % 2] || key + j / 2 * 8 >= hi.x[j % 2]) d[i + j] = 0.0f;
  }
}

// dP^T becomes dS^T, by the weights that dv is made with: in 16 bits, two in a register.
template <Half kType>
DFLASH_DEVICE void differentiate(float (&d)[kUnitRows / 2], const uint32_t (&weights)[kUnitRows / 4],
                                 const RowStatistics& rows) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int i = 0; i < kUnitRows / 2; i += 2) {
    const Pair<float> delta = pair_at(rows.delta, register_column(lane, i));
    Pair<float> weight;
    unpack<kType>(weights[i / 2], weight.x[0], weight.x[1]);
    for (int j = 0; j < 2; ++j) d[i + j] = weight.x[j] * (d[i + j] - delta.x[j]);
  }
}

// d (64 x D) += a (64 x 64, registers) rows (64, D) of a unit; in the background.
template <int kD, Half kType>
DFLASH_DEVICE void accumulate_unit(Sums<kD>& d, const uint32_t (&a)[kUnitRows / 4], uint32_t rows) {
#pragma unroll
  for (int step = 0; step < kUnitRows / 16; ++step) accumulate<kD, kType>(d, a + 4 * step, rows, kUnitRows, step);
  products_commit();
}

template <int kD, Half kType>
DFLASH_DEVICE void consume_dkv(const DkvParameters& p, const KeyTile& tile, int head, const DkvStages<kD>& stages) {
  using Shape = DkvShape<kD>;
  const int index = consumer_index();
  const uint32_t keys = stages.base + static_cast<uint32_t>(index * kUnitRows * kPanelRowBytes);
  const int first_key = tile.first_key + index * kUnitRows;
  Sums<kD> dk = {}, dv = {};
  Cursor<Shape::kStages> cursor;
  barrier_wait(stages.keys_full(), 0);
  for (int unit = 0; unit < tile.units; ++unit) {
    barrier_wait(stages.full(cursor.stage), cursor.parity);
    const RowStatistics& rows = *stages.statistics(cursor.stage);
    const Cover cover = rows.cover;
    if (!cover.dead(first_key, kUnitRows)) {
      float weights[kUnitRows / 2], scores[kUnitRows / 2];
      uint32_t packed_weights[kUnitRows / 4], packed_scores[kUnitRows / 4];
      const uint32_t queries = stages.queries(cursor.stage), gradients = stages.gradients(cursor.stage);
      products_fence();
      score<kUnitRows, kD, kType>(weights, keys, kTile, queries, kUnitRows);
      products_commit();
      score<kUnitRows, kD, kType>(scores, keys + Shape::kValues, kTile, gradients, kUnitRows);
      products_commit();
      products_wait<1>();
      settle(weights);
      weigh(weights, p.scale_log2, rows, cover.interior(first_key, kUnitRows), first_key);
      pack_all<kType>(weights, packed_weights);
      // dv's product runs while dS^T is made, from the packed weights: the others' registers are dS^T's by now.
      products_fence();
      accumulate_unit<kD, kType>(dv, packed_weights, gradients);
      products_wait<1>();
      settle(scores);
      differentiate<kType>(scores, packed_weights, rows);
      pack_all<kType>(scores, packed_scores);
      products_fence();
      accumulate_unit<kD, kType>(dk, packed_scores, queries);
      products_wait<0>();
      settle(dv);
      settle(dk);
    }
    release(stages.empty(cursor.stage));
    cursor.advance();
  }
  const bool own = tile.segment == Segment::kOwn;
  const auto place = [&](void* gradients) {
    return [=, &p](int row) -> void* {
      const int key = index * kUnitRows + row;
      if (key >= tile.keys) return nullptr;
      const int64_t at = static_cast<int64_t>(tile.first_key + key) * p.kv_heads + head;
      return static_cast<char*>(gradients) + at * kD * 2;
    };
  };
  // This warpgroup alone reads its 64 keys and values: their tiles carry the results out.
  char* staging = stages.shared + index * kUnitRows * kPanelRowBytes;
  const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
  store_rows<kD, kType>(dk, scale, staging, kTile, place(own ? p.dk_blk : p.dk_ctx));
  store_rows<kD, kType>(dv, one, staging + Shape::kValues, kTile, place(own ? p.dv_blk : p.dv_ctx));
}

template <int kD, Half kType>
DFLASH_GLOBAL void DFLASH_BOUNDS(kThreads, 1) backward_dkv(const DFLASH_PARAMETER DkvParameters p) {
#ifdef DFLASH_HOPPER
  char* shared = shared_memory();
  const DkvStages<kD> stages{shared, shared_address(shared)};
  const int head = block_index() % p.kv_heads;
  const KeyTile tile = KeyTile::of(p, block_index() / p.kv_heads);
  if (p.rows.unit_positions * p.rows.group.by < kUnitRows) stages.clear();
  if (thread_index() == 0) {
    stages.init();
    barrier_init_fence();
    async_fence();
  }
  sync_threads();
  if (thread_index() < kWarpgroup) {
    give_registers<40>();
    if (thread_index() == 0) feed_dkv<kD>(p, tile, head, stages);
    if (thread_index() >= 32) describe_units<kD>(p, tile, head, stages);
  } else {
    take_registers<232>();
    consume_dkv<kD, kType>(p, tile, head, stages);
  }
#endif
}

template <int kD, Half kType>
int launch_dkv(const GpuBackward& args, void* stream) {
  using Shape = DkvShape<kD>;
  const AttentionShape& s = args.shape;
  const int64_t slots = s.anchors * s.block_size;
  DkvParameters p{};
  p.rows = Rows::of(s);
  p.tile_ranges = args.tile_ranges;
  p.tile_order = args.tile_order;
  p.tiles = static_cast<int>((s.tokens + kTile - 1) / kTile);
  p.q_heads = s.q_heads;
  p.kv_heads = s.kv_heads;
  p.scale = static_cast<float>(s.scale);
  p.scale_log2 = p.scale * kLog2E;
  p.lse = args.lse;
  p.delta = args.delta;
  p.dk_ctx = args.dk_ctx;
  p.dv_ctx = args.dv_ctx;
  p.dk_blk = args.dk_blk;
  p.dv_blk = args.dv_blk;
  int error = encode_queries(&p.q, args.q, s, kType);
  if (error == 0) error = encode_queries(&p.dout, args.dout, s, kType);
  if (error == 0)
    error = encode_key_maps(&p.keys, {args.k_ctx, args.v_ctx, args.k_blk, args.v_blk}, s, kTile, kTile, kType);
  if (error != 0) return error;
  const int64_t own_tiles = (slots + kTile - 1) / kTile;
  return launch(backward_dkv<kD, kType>, {(p.tiles + own_tiles) * s.kv_heads, kThreads, Shape::kShared}, p, stream);
}

}  // namespace dflash::gpu::sm90
