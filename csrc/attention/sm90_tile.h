// How to do a tile on Hopper: pieces that the forward and backward kernels share.
//
// A block of threads has one producer warpgroup and two consumer warpgroups. The producer's copies fill tiles of shared
// memory; each tile has a barrier `full`, on which its bytes arrive, and a barrier `empty`, on which every consumer
// warp arrives once it has done with the tile. A consumer waits for `full` also of a tile that it skips: it could
// otherwise run ahead and be counted twice in one phase of `empty`.
#pragma once

#include <cmath>

#include "attention/hopper.h"
#include "attention/launch.h"

namespace dflash::gpu::sm90 {

inline constexpr int kWarpgroup = 128;
inline constexpr int kConsumers = 2;
inline constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
inline constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
inline constexpr int kOwnStep = 16;  // keys of the own block that are copied and multiplied at a time
inline constexpr float kLn2 = 0.6931471805599453f;

DFLASH_HOST_DEVICE constexpr int panels(int head_dim) { return (head_dim + kPanel - 1) / kPanel; }
// A head dim that fills only half of its last panel has zeros there, from the copies' bounds.
DFLASH_HOST_DEVICE constexpr int tile_bytes(int head_dim, int rows) { return panels(head_dim) * rows * kPanelRowBytes; }

// A thread's registers of a warpgroup's sums (64 x D). They are of whole panels, because products are: the columns
// beyond D are never stored, and what they cost (D = 96) is the price of using no product of half a swizzled panel,
// which CUTLASS, for one, never issues.
template <int kD>
using Sums = float[panels(kD) * kPanel / 2];

// Which consumer a thread belongs to. All lanes have lane 0's answer, so that the compiler knows it to be the same:
// what follows from it, descriptors above all, is then worked out once a warp.
DFLASH_DEVICE int consumer_index() { return shuffle(thread_index() / kWarpgroup - 1, 0); }

// (A*S, Hq, D) by units: a box is `unit_positions` positions of one group of heads, in the order of packed rows.
inline int encode_queries(TensorMap* map, const void* base, const AttentionShape& s, Half type) {
  const int group = s.q_heads / s.kv_heads;
  const uint64_t row = static_cast<uint64_t>(s.head_dim) * 2;
  return encode(map,
                {base,
                 {static_cast<uint64_t>(s.head_dim), static_cast<uint64_t>(s.q_heads),
                  static_cast<uint64_t>(s.anchors) * s.block_size},
                 {row, row * s.q_heads},
                 {kPanel, static_cast<uint32_t>(group), static_cast<uint32_t>(kUnitRows / group)}},
                type);
}

// (rows, Hkv, D), `box` rows of one head at a time.
inline int encode_keys(TensorMap* map, const void* base, const AttentionShape& s, int64_t rows, int box, Half type) {
  const uint64_t row = static_cast<uint64_t>(s.head_dim) * 2;
  return encode(map,
                {base,
                 {static_cast<uint64_t>(s.head_dim), static_cast<uint64_t>(s.kv_heads), static_cast<uint64_t>(rows)},
                 {row, row * s.kv_heads},
                 {kPanel, 1, static_cast<uint32_t>(box)}},
                type);
}

// Bytes that a unit's box brings, and its copy to `to`, panels of kUnitRows rows.
template <int kD>
DFLASH_DEVICE int unit_bytes(const Rows& rows) {
  return panels(kD) * rows.unit_positions * rows.group.by * kPanelRowBytes;
}
template <int kD>
DFLASH_DEVICE void copy_unit(uint32_t to, const TensorMap* map, uint32_t barrier, const Rows& rows, int head,
                             int position) {
  for (int panel = 0; panel < panels(kD); ++panel)
    copy_box(to + panel * kUnitRows * kPanelRowBytes, map, barrier, panel * kPanel, head * rows.group.by, position);
}

// Index of a unit's row in a (A*S, Hq) tensor, or -1 for padding.
DFLASH_DEVICE int64_t query_row(const Rows& rows, int q_heads, int head, int position, int row) {
  if (position < 0) return -1;
  return static_cast<int64_t>(position) * q_heads + head * rows.group.by + rows.group_head(row);
}

// A ring's next tile, and the parity of the phase in which that tile is filled.
template <int kStages>
struct Cursor {
  int stage = 0, parity = 0;

  DFLASH_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// One warpgroup's unit of query positions: [position, position + count).
struct Unit {
  int position, count;

  DFLASH_DEVICE static Unit of(const Rows& rows, int item, int index) {
    const int position = (2 * item + index) * rows.unit_positions;
    return {position, larger(0, smaller(rows.unit_positions, rows.positions - position))};
  }
  // What it sees of the context, in closed form. Rows of padding are left out: what is computed for them is not stored.
  DFLASH_DEVICE Cover context(const Rows& rows) const {
    if (count == 0) return {};
    const int first = rows.block_size.quotient(position);
    const int last = rows.block_size.quotient(position + count - 1);
    // Bounds never decrease from block to block; a window's lower bound is highest at the last block's last slot.
    const int highest = rows.ends[last] + rows.block_size.by - rows.window;
    return {rows.starts[first], rows.ends[last],
            rows.window > 0 ? larger(rows.starts[last], highest) : rows.starts[last], rows.ends[first]};
  }
  // Own rows, counted over all blocks, that the unit's rows may see.
  DFLASH_DEVICE Interval own(const Rows& rows) const {
    if (count == 0) return {0, 0};
    const int size = rows.block_size.by;
    return {rows.block_size.quotient(position) * size, (rows.block_size.quotient(position + count - 1) + 1) * size};
  }
};

// d (64 x kN) = left (64, D) right (kN, D) transposed, D along the rows of both; in the background.
template <int kN, int kD, Half kType>
DFLASH_DEVICE void score(float* d, uint32_t left, int left_rows, uint32_t right, int right_rows) {
#pragma unroll
  for (int step = 0; step < kD / 16; ++step)
    product<kN, kType>(d, operand(left, left_rows, step), operand(right, right_rows, step), step > 0);
}

// d (64 x D) += a (64 x 16, registers) right (16 rows from 16 * step on, D); in the background.
template <int kD, Half kType>
DFLASH_DEVICE void accumulate(Sums<kD>& d, const uint32_t* a, uint32_t right, int rows, int step) {
  product_transposed<panels(kD) * kPanel, kType>(d, a, operand_transposed(right, rows, step), true);
}

// A warpgroup's accumulator (64 x 2 kCount) in 16 bits: left operands of 16 columns, four registers each.
template <Half kType, int kCount>
DFLASH_DEVICE void pack_all(const float (&d)[kCount], uint32_t (&a)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) a[i] = pack<kType>(d[2 * i], d[2 * i + 1]);
}

// Row (0 or 1: the lane's upper or lower) and column of a thread's register i of an accumulator.
DFLASH_DEVICE int register_row(int i) { return i / 2 % 2; }
DFLASH_DEVICE int register_column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

// Sets to `nothing` what the thread's two rows do not see; column 0 of d is key p.
template <int kCount>
DFLASH_DEVICE void hide(float (&d)[kCount], int p, const Interval (&sees)[2], float nothing) {
  const int lane = thread_index() % 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int key = p + register_column(lane, i);
    const Interval row = sees[register_row(i)];
    if (key < row.lo || key >= row.hi) d[i] = nothing;
  }
}

// The thread's two rows of a unit: their positions, or -1 for padding.
struct ThreadRows {
  int row[2], position[2];

  DFLASH_DEVICE static ThreadRows of(const Rows& rows, int item) {
    const int index = fresh_thread_index(), thread = index % kWarpgroup, warpgroup = index / kWarpgroup - 1;
    ThreadRows mine;
    for (int r = 0; r < 2; ++r) {
      mine.row[r] = thread / 32 * 16 + thread % 32 / 4 + 8 * r;
      mine.position[r] = rows.item_position(item, warpgroup * kUnitRows + mine.row[r]);
    }
    return mine;
  }
  DFLASH_DEVICE void see(const Rows& rows, Segment segment, Interval (&sees)[2]) const {
    for (int r = 0; r < 2; ++r) sees[r] = position[r] < 0 ? Interval{0, 0} : rows.sees(segment, position[r]);
  }
};

DFLASH_DEVICE void sync_warpgroup() { sync_named(1 + thread_index() / kWarpgroup, kWarpgroup); }

// One arrival per consumer warp: products are done for a warp when its own wait returns. The other lanes' reads and
// waits come first, or one of them could miss a phase that lane 0's arrival lets begin.
DFLASH_DEVICE void release(uint32_t barrier) {
  sync_warp();
  if (thread_index() % 32 == 0) barrier_arrive(barrier);
}

// Writes a warpgroup's accumulator (64 x kD), row r times factor[r], as 16-bit rows to global memory, through
// `staging`: panels of `staging_rows` rows in shared memory whose first 64 rows nothing else uses any more. place(row)
// is where a row goes, or nullptr.
template <int kD, Half kType, typename Place>
DFLASH_DEVICE void store_rows(const Sums<kD>& d, const float (&factor)[2], char* staging, int staging_rows,
                              const Place& place) {
  const int thread = thread_index() % kWarpgroup, lane = thread % 32;
  const auto at = [&](int row, int column) {
    const int byte = row * kPanelRowBytes + column % kPanel * 2;
    return staging + column / kPanel * staging_rows * kPanelRowBytes + (byte ^ (byte >> 3 & 0x70));
  };
  sync_warpgroup();
#pragma unroll
  for (int i = 0; i < kD / 2; i += 2) {
    const int r = register_row(i), row = thread / 32 * 16 + lane / 4 + 8 * r;
    *reinterpret_cast<uint32_t*>(at(row, register_column(lane, i))) =
        pack<kType>(d[i] * factor[r], d[i + 1] * factor[r]);
  }
  sync_warpgroup();
  constexpr int kChunks = kD / 8;
  for (int i = thread; i < kUnitRows * kChunks; i += kWarpgroup) {
    void* row = place(i / kChunks);
    if (row == nullptr) continue;
    static_cast<Chunk*>(row)[i % kChunks] = *reinterpret_cast<const Chunk*>(at(i / kChunks, i % kChunks * 8));
  }
}

// The maps that a stream of key tiles reads.
struct KeyMaps {
  TensorMap k_ctx, v_ctx, k_blk, v_blk;
};

struct KeyTensors {
  const void *k_ctx, *v_ctx, *k_blk, *v_blk;
};

// Boxes of `keys` rows of the context, and of `own` rows of the blocks.
inline int encode_key_maps(KeyMaps* maps, const KeyTensors& tensors, const AttentionShape& s, int keys, int own,
                           Half type) {
  const int64_t slots = s.anchors * s.block_size;
  int error = encode_keys(&maps->k_ctx, tensors.k_ctx, s, s.tokens, keys, type);
  if (error == 0) error = encode_keys(&maps->v_ctx, tensors.v_ctx, s, s.tokens, keys, type);
  if (error == 0) error = encode_keys(&maps->k_blk, tensors.k_blk, s, slots, own, type);
  if (error == 0) error = encode_keys(&maps->v_blk, tensors.v_blk, s, slots, own, type);
  return error;
}

// Shared addresses of two rings of key tiles, one of keys and one of values, and of their barriers: full[kStages] and
// empty[kStages] of each.
template <int kD, int kKeys, int kStages>
struct KeyRings {
  static constexpr int kTile = tile_bytes(kD, kKeys);
  static constexpr int kBytes = 2 * kStages * kTile;
  static constexpr int kBarriers = 4 * kStages;

  uint32_t tiles, barriers;

  DFLASH_DEVICE uint32_t keys(int stage) const { return tiles + stage * kTile; }
  DFLASH_DEVICE uint32_t values(int stage) const { return tiles + (kStages + stage) * kTile; }
  DFLASH_DEVICE uint32_t keys_full(int stage) const { return barriers + 8 * stage; }
  DFLASH_DEVICE uint32_t values_full(int stage) const { return barriers + 8 * (kStages + stage); }
  DFLASH_DEVICE uint32_t keys_empty(int stage) const { return barriers + 8 * (2 * kStages + stage); }
  DFLASH_DEVICE uint32_t values_empty(int stage) const { return barriers + 8 * (3 * kStages + stage); }

  DFLASH_DEVICE void init() const {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(keys_full(stage), 1);
      barrier_init(values_full(stage), 1);
      barrier_init(keys_empty(stage), kConsumerWarps);
      barrier_init(values_empty(stage), kConsumerWarps);
    }
  }

  // The producer's part, by one thread: the tile that the walk is at, keys then values.
  DFLASH_DEVICE void feed(const KeyWalk& walk, const KeyMaps& maps, int head, Cursor<kStages>& ring) const {
    const bool own = walk.segment == Segment::kOwn;
    const int steps = own ? smaller(kKeys, walk.limits().hi - walk.p + kOwnStep - 1) / kOwnStep : 0;
    barrier_wait(keys_empty(ring.stage), ring.parity ^ 1);
    load(own ? &maps.k_blk : &maps.k_ctx, keys(ring.stage), keys_full(ring.stage), head, walk.p, steps);
    barrier_wait(values_empty(ring.stage), ring.parity ^ 1);
    load(own ? &maps.v_blk : &maps.v_ctx, values(ring.stage), values_full(ring.stage), head, walk.p, steps);
    ring.advance();
  }

 private:
  // One tile of the context, or `steps` times kOwnStep own rows.
  DFLASH_DEVICE static void load(const TensorMap* map, uint32_t tile, uint32_t barrier, int head, int p, int steps) {
    barrier_arrive_expect(barrier, steps == 0 ? kTile : tile_bytes(kD, steps * kOwnStep));
    for (int panel = 0; panel < panels(kD); ++panel) {
      const uint32_t to = tile + panel * kKeys * kPanelRowBytes;
      if (steps == 0) copy_box(to, map, barrier, panel * kPanel, head, p);
      for (int step = 0; step < steps; ++step)
        copy_box(to + step * kOwnStep * kPanelRowBytes, map, barrier, panel * kPanel, head, p + step * kOwnStep);
    }
  }
};

}  // namespace dflash::gpu::sm90
