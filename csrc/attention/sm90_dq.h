// Backward on Hopper, first kernel: dq, and delta = sum over D of the output times its gradient, which the second
// kernel reads. Query-stationary, the same walk over key tiles as the forward:
//   P = exp2(S - lse), dP = dout V^T, dS = P (dP - delta), dq += dS K
#pragma once

#include "attention/sm90_tile.h"

namespace dflash::gpu::sm90 {

struct DqParameters {
  Rows rows;
  TensorMap q, dout;
  KeyMaps keys;
  const int32_t* order;
  int q_heads, kv_heads;
  float scale, scale_log2;
  const void *dout_rows, *out_rows;  // (A*S, Hq, D)
  const float* lse;
  float* delta;
  void* dq;
};

template <int kD>
struct DqShape {
  static constexpr int kKeys = 128;
  static constexpr int kStages = kD <= 64 ? 3 : 2;
  static constexpr int kUnit = tile_bytes(kD, kUnitRows);
  using Rings = KeyRings<kD, kKeys, kStages>;
  // Queries of both units, gradients of both, the rings, delta, the barriers: one for each unit, then the rings'.
  static constexpr int kGradients = kConsumers * kUnit, kRings = 2 * kGradients, kDelta = kRings + Rings::kBytes;
  static constexpr int kBarriers = kDelta + kConsumers * kUnitRows * 4;
  static constexpr int kShared = kBarriers + 8 * (kConsumers + Rings::kBarriers);
};

// A warp's 16 rows of delta, half a warp a row, to global memory and to `delta`, (64,) in shared memory. All of a
// lane's loads are issued before the first is waited for.
template <int kD, Half kType>
DFLASH_DEVICE void make_delta(const DqParameters& p, int item, int head, float* delta) {
  constexpr int kPairs = 8;
  const int index = thread_index() / kWarpgroup - 1, warp = thread_index() % kWarpgroup / 32,
            lane = thread_index() % 32;
  const int chunk = smaller(lane % 16, kD / 8 - 1);
  const Chunk *dout = static_cast<const Chunk*>(p.dout_rows), *out = static_cast<const Chunk*>(p.out_rows);
  float sums[kPairs];
  int64_t rows[kPairs];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const int row = warp * 16 + pair * 2 + lane / 16;
    rows[pair] = query_row(p.rows, p.q_heads, head, p.rows.item_position(item, index * kUnitRows + row), row);
    // Padding reads row 0, and throws it away.
    const int64_t at = (rows[pair] < 0 ? 0 : rows[pair]) * (kD / 8) + chunk;
    sums[pair] = dot<kType>(dout[at], out[at]);
    if (rows[pair] < 0 || lane % 16 >= kD / 8) sums[pair] = 0.0f;
  }
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) sums[pair] += shuffle_xor(sums[pair], mask);
    if (lane % 16 != 0) continue;
    delta[warp * 16 + pair * 2 + lane / 16] = sums[pair];
    if (rows[pair] >= 0) p.delta[rows[pair]] = sums[pair];
  }
  sync_warp();
}

template <int kD, Half kType>
struct DqConsumer {
  using Shape = DqShape<kD>;
  static constexpr int kKeys = Shape::kKeys;

  const DqParameters& p;
  typename Shape::Rings rings;
  uint32_t queries, gradients;
  ThreadRows mine;
  UnitCover unit;
  float lse[2], delta[2];  // lse to base 2
  Cursor<Shape::kStages> ring;
  Interval sees[2];

  DFLASH_DEVICE void wait_tile() {
    barrier_wait(rings.keys_full(ring.stage), ring.parity);
    barrier_wait(rings.values_full(ring.stage), ring.parity);
  }
  DFLASH_DEVICE void release_tile() {
    release(rings.keys_empty(ring.stage));
    release(rings.values_empty(ring.stage));
    ring.advance();
  }
  DFLASH_DEVICE void skip() {
    wait_tile();
    release_tile();
  }

  // kN keys from row `row` of the tile on, the first of them key `at`. Both scores run in the background at once.
  template <int kN>
  DFLASH_DEVICE void keys(int at, int row, bool interior, Sums<kD>& dq) {
    float weights[kN / 2], scores[kN / 2];
    uint32_t packed[kN / 4];
    const uint32_t offset = static_cast<uint32_t>(row * kPanelRowBytes);
    products_fence();
    score<kN, kD, kType>(weights, queries, kUnitRows, rings.keys(ring.stage) + offset, kKeys);
    products_commit();
    score<kN, kD, kType>(scores, gradients, kUnitRows, rings.values(ring.stage) + offset, kKeys);
    products_commit();
    products_wait<1>();
    settle(weights);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) weights[i] = exp2_fast(weights[i] * p.scale_log2 - lse[register_row(i)]);
    // After the exponentials, not before: this branch keeps the wait behind them (`before_wait`).
    if (!interior) hide(weights, at, sees, 0.0f);
    products_wait<0>();
    settle(scores);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) scores[i] = weights[i] * (scores[i] - delta[register_row(i)]);
    pack_all<kType>(scores, packed);
    products_fence();
#pragma unroll
    for (int step = 0; step < kN / 16; ++step)
      accumulate<kD, kType>(dq, packed + 4 * step, rings.keys(ring.stage), kKeys, row / 16 + step);
    products_commit();
    products_wait<0>();
    settle(dq);
  }

  DFLASH_DEVICE void run(KeyWalk walk, Sums<kD>& dq) {
    mine.see(p.rows, Segment::kContext, sees);
    for (; !walk.done() && walk.segment == Segment::kContext; walk.advance(kKeys)) {
      if (unit.count == 0 || unit.context.dead(walk.p, kKeys)) {
        skip();
        continue;
      }
      wait_tile();
      keys<kKeys>(walk.p, 0, unit.context.interior(walk.p, kKeys), dq);
      release_tile();
    }
    mine.see(p.rows, Segment::kOwn, sees);
    const Interval own = unit.own(p.rows);
    for (; !walk.done(); walk.advance(kKeys)) {
      wait_tile();
      for (int row = 0; row < kKeys; row += kOwnStep) {
        const int key = walk.p + row;
        if (own.hi <= key || key + kOwnStep <= own.lo) continue;
        keys<kOwnStep>(key, row, false, dq);
      }
      release_tile();
    }
  }
};

template <int kD, Half kType>
DFLASH_DEVICE void consume_dq(const DqParameters& p, int item, int head, char* shared) {
  using Shape = DqShape<kD>;
  const uint32_t base = shared_address(shared);
  const int index = consumer_index();
  float* delta = reinterpret_cast<float*>(shared + Shape::kDelta) + index * kUnitRows;
  make_delta<kD, kType>(p, item, head, delta);
  DqConsumer<kD, kType> consumer{p,
                                 item_rings<Shape>(base),
                                 base + index * Shape::kUnit,
                                 base + Shape::kGradients + index * Shape::kUnit,
                                 ThreadRows::of(p.rows, item),
                                 UnitCover::of(p.rows, (2 * item + index) * p.rows.unit_positions),
                                 {},
                                 {},
                                 {},
                                 {}};
  for (int r = 0; r < 2; ++r) {
    const int row = consumer.mine.row[r];
    const int64_t at = query_row(p.rows, p.q_heads, head, consumer.mine.position[r], row);
    consumer.lse[r] = at < 0 ? 0.0f : p.lse[at] * kLog2E;
    consumer.delta[r] = delta[row];
  }
  Sums<kD> dq = {};
  if (consumer.unit.count > 0) barrier_wait(unit_full<Shape>(base, index), 0);
  consumer.run(item_walk(p.rows, item), dq);
  const float factor[2] = {p.scale, p.scale};
  store_unit<kD, kType>(dq, factor, shared + index * Shape::kUnit, p.dq, p, item, head);
}

template <int kD, Half kType>
DFLASH_GLOBAL void DFLASH_BOUNDS(kThreads, 1) backward_dq(const DFLASH_PARAMETER DqParameters p) {
#ifdef DFLASH_HOPPER
  using Shape = DqShape<kD>;
  char* shared = shared_memory();
  const uint32_t base = shared_address(shared);
  const int item = p.order[block_index() / p.kv_heads], head = block_index() % p.kv_heads;
  const TensorMap* const tensors[] = {&p.q, &p.dout};
  run_item<Shape>(
      base, [&] { feed_item<kD, Shape>(p.rows, tensors, p.keys, item, head, base); },
      [&] { consume_dq<kD, kType>(p, item, head, shared); });
#endif
}

template <int kD, Half kType>
int launch_dq(const GpuBackward& args, void* stream) {
  using Shape = DqShape<kD>;
  const AttentionShape& s = args.shape;
  DqParameters p{};
  p.rows = Rows::of(s);
  p.order = args.order;
  p.q_heads = s.q_heads;
  p.kv_heads = s.kv_heads;
  p.scale = static_cast<float>(s.scale);
  p.scale_log2 = p.scale * kLog2E;
  p.dout_rows = args.dout;
  p.out_rows = args.out;
  p.lse = args.lse;
  p.delta = args.delta;
  p.dq = args.dq;
  int error = encode_queries(&p.q, args.q, s, kType);
  if (error == 0) error = encode_queries(&p.dout, args.dout, s, kType);
  if (error == 0)
    error =
        encode_key_maps(&p.keys, {args.k_ctx, args.v_ctx, args.k_blk, args.v_blk}, s, Shape::kKeys, kOwnStep, kType);
  if (error != 0) return error;
  return launch(backward_dq<kD, kType>, {static_cast<int64_t>(args.items) * s.kv_heads, kThreads, Shape::kShared}, p,
                stream);
}

}  // namespace dflash::gpu::sm90
