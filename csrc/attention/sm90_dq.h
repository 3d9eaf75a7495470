// Backward on Hopper, first kernel: dq, and delta = sum over D of the output times its gradient, which the second
// kernel reads. Query-stationary, the same walk over key tiles as the forward:
//   P = exp2(S - lse), dP = dout V^T, dS = P (dP - delta), dq += dS K
#pragma once

#include "attention/sm90_items.h"

namespace dflash::gpu::sm90 {

struct DqParameters {
  Rows rows;
  TensorMap q, dout;
  KeyMaps keys;
  WorkList list;
  int q_heads;
  float scale, scale_log2;
  const void *dout_rows, *out_rows;  // (A*S, Hq, D)
  const float* lse;
  float* delta;
  void* dq;
};

template <int kD>
struct DqShape {
  // Units are queries and gradients.
  using Memory = ItemMemory<kD, 2, kD <= 64 ? 2 : 1, kD <= 64 ? 3 : 2>;
  // Behind it both units' results on their way out, so that the next item's units, which have no second set at D = 128,
  // are copied meanwhile, and delta.
  static constexpr int kStaging = (Memory::kBytes + kSharedAlign - 1) / kSharedAlign * kSharedAlign;
  static constexpr int kDelta = kStaging + kConsumers * Memory::kUnit;
  static constexpr int kShared = kDelta + kConsumers * kUnitRows * 4;
};

// A warp's 16 rows of delta, half a warp a row, to global memory and to `delta`, (64,) in shared memory. All of a
// lane's loads are issued before the first is waited for.
template <int kD, Half kType>
DFLASH_DEVICE void make_delta(const DqParameters& p, const Work& work, float* delta) {
  constexpr int kPairs = 8;
  const int thread = fresh_thread_index();
  const int index = thread / kWarpgroup - 1, warp = thread % kWarpgroup / 32, lane = thread % 32;
  const int chunk = smaller(lane % 16, kD / 8 - 1);
  const Chunk *dout = static_cast<const Chunk*>(p.dout_rows), *out = static_cast<const Chunk*>(p.out_rows);
  float sums[kPairs];
  int64_t rows[kPairs];
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const int row = warp * 16 + pair * 2 + lane / 16;
    const int position = p.rows.item_position(work.item, index * kUnitRows + row);
    rows[pair] = query_row(p.rows, p.q_heads, work.head, position, row);
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
  using Memory = typename DqShape<kD>::Memory;
  static constexpr int kKeys = Memory::kKeys;

  const DqParameters& p;
  typename Memory::Rings rings;
  uint32_t queries, gradients;
  typename Memory::Ring& ring;
  int item;
  Cover context;
  float lse[2], delta[2];  // lse to base 2
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
    ThreadRows::of(p.rows, item).see(p.rows, Segment::kContext, sees);
    for (; !walk.done() && walk.segment == Segment::kContext; walk.advance(kKeys)) {
      if (context.dead(walk.p, kKeys)) {
        skip();
        continue;
      }
      wait_tile();
      keys<kKeys>(walk.p, 0, context.interior(walk.p, kKeys), dq);
      release_tile();
    }
    // From the start again: kept, it would be too many registers for the loop.
    ThreadRows::of(p.rows, item).see(p.rows, Segment::kOwn, sees);
    const Interval own = Unit::of(p.rows, item, consumer_index()).own(p.rows);
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
DFLASH_DEVICE void consume_dq(const DqParameters& p, const typename DqShape<kD>::Memory& memory) {
  using Shape = DqShape<kD>;
  // A consumer's index is asked for where it is used: kept, it would be one register too many for the loop over tiles.
  typename Shape::Memory::Ring ring;
  for (typename Shape::Memory::Sets sets;; sets.advance()) {
    const Work work = memory.next_work(ring);
    if (work.item < 0) return;
    const int index = consumer_index();
    float* delta = reinterpret_cast<float*>(memory.shared + Shape::kDelta) + index * kUnitRows;
    make_delta<kD, kType>(p, work, delta);
    const uint32_t queries = memory.unit(sets.stage, 0, index), gradients = memory.unit(sets.stage, 1, index);
    DqConsumer<kD, kType> consumer{p,
                                   memory.rings(),
                                   queries,
                                   gradients,
                                   ring,
                                   work.item,
                                   Unit::of(p.rows, work.item, index).context(p.rows),
                                   {},
                                   {},
                                   {}};
    const ThreadRows mine = ThreadRows::of(p.rows, work.item);
    for (int r = 0; r < 2; ++r) {
      const int64_t at = query_row(p.rows, p.q_heads, work.head, mine.position[r], mine.row[r]);
      consumer.lse[r] = at < 0 ? 0.0f : p.lse[at] * kLog2E;
      consumer.delta[r] = delta[mine.row[r]];
    }
    Sums<kD> dq = {};
    memory.wait_units(sets);
    consumer.run(item_walk(p.rows, work.item), dq);
    memory.release_units(sets);
    const float factor[2] = {p.scale, p.scale};
    char* staging = memory.shared + Shape::kStaging + consumer_index() * Shape::Memory::kUnit;
    store_unit<kD, kType>(dq, factor, staging, p.dq, p, work);
  }
}

template <int kD, Half kType>
DFLASH_GLOBAL void DFLASH_BOUNDS(kThreads, 1) backward_dq(const DFLASH_PARAMETER DqParameters p) {
#ifdef DFLASH_HOPPER
  char* shared = shared_memory();
  const typename DqShape<kD>::Memory memory{shared, shared_address(shared)};
  const TensorMap* const tensors[] = {&p.q, &p.dout};
  run_items(memory, [&] { memory.feed(p.list, p.rows, tensors, p.keys); }, [&] { consume_dq<kD, kType>(p, memory); });
#endif
}

template <int kD, Half kType>
int launch_dq(const GpuBackward& args, void* stream) {
  using Shape = DqShape<kD>;
  const AttentionShape& s = args.shape;
  DqParameters p{};
  p.rows = Rows::of(s);
  p.list = {args.order, args.taken, args.items, s.kv_heads};
  p.q_heads = s.q_heads;
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
    error = encode_key_maps(&p.keys, {args.k_ctx, args.v_ctx, args.k_blk, args.v_blk}, s, Shape::Memory::kKeys,
                            kOwnStep, kType);
  if (error != 0) return error;
  return launch_items(backward_dq<kD, kType>, Shape::kShared, p, stream);
}

}  // namespace dflash::gpu::sm90
