// Forward on Hopper. A block of threads takes one work item of one kv head after another: each of its two consumer
// warpgroups keeps a unit's 64 query rows and its 64 x D accumulator in registers, and both walk the item's key tiles.
// While a tile's values are multiplied, the next tile's scores already are (as FlashAttention-3 does, arXiv 2407.08608,
// section 3.2).
#pragma once

#include "attention/sm90_items.h"

namespace dflash::gpu::sm90 {

struct ForwardParameters {
  Rows rows;
  TensorMap q;
  KeyMaps keys;
  WorkList list;
  int q_heads;
  float scale_log2;  // scale * log2(e): exponentials are taken to base 2
  void* out;
  float* lse;
};

// The consumers issue products in turns, so that one's softmax runs beside the other's products (as FlashAttention-3
// does, arXiv 2407.08608, section 3.1). Each has one turn for each tile of the context, also where it skips the tile.
struct Turns {
  uint32_t mine, other;  // barriers
  int parity;

  DFLASH_DEVICE void take() {
    barrier_wait(mine, parity);
    parity ^= 1;
  }
  DFLASH_DEVICE void give() const { release(other); }
};

template <int kD>
struct ForwardMemory : ItemMemory<kD, 1, 2, kD <= 64 ? 4 : 2> {
  using Items = ItemMemory<kD, 1, 2, kD <= 64 ? 4 : 2>;
  static constexpr int kTurns = Items::kBytes, kBytes = kTurns + 8 * kConsumers;

  DFLASH_DEVICE uint32_t turn(int index) const { return Items::base + kTurns + 8 * index; }
  DFLASH_DEVICE void init() const {
    Items::init();
    for (int index = 0; index < kConsumers; ++index) barrier_init(turn(index), kWarpgroup / 32);
  }
  // The first consumer begins: the phase before a barrier's first counts as over.
  DFLASH_DEVICE Turns turns(int index) const { return {turn(index), turn(1 - index), 1 - index}; }
};

// Online softmax of a thread's two rows; `total` is this thread's part of the sum. What is subtracted from a row's
// scores follows the row's largest score only where that is kSlack higher (to base 2), because earlier results then
// have to be rescaled (as FlashAttention-4 does). Weights reach 2^kSlack, which 16-bit numbers hold as precisely as 1.
struct Softmax {
  static constexpr float kSlack = 8;

  float peak[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};

  // Turns scores into exp2((score - peak) * scale). Where the answer, which a warp has in common, is true, earlier
  // results must be multiplied with `rescale`; elsewhere that is 1.
  template <int kCount>
  DFLASH_DEVICE bool step(float (&d)[kCount], float scale, float (&rescale)[2]) {
    float used[2];
    bool rises = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = peak[r];
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (register_row(i) == r) highest = fmaxf(highest, d[i]);
      highest = fmaxf(highest, shuffle_xor(highest, 1));
      highest = fmaxf(highest, shuffle_xor(highest, 2));
      // A row's first key is higher than -inf by any measure.
      const bool follows = highest * scale > peak[r] * scale + kSlack;
      const float earlier = peak[r] * scale;
      if (follows) peak[r] = highest;
      // A row that has not seen a key yet: -inf - (-inf) would be NaN.
      used[r] = peak[r] == -INFINITY ? 0.0f : peak[r] * scale;
      rescale[r] = follows ? exp2_fast(earlier - used[r]) : 1.0f;
      total[r] *= rescale[r];
      rises |= follows;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      d[i] = exp2_fast(d[i] * scale - used[register_row(i)]);
      total[register_row(i)] += d[i];
    }
    return ballot(rises) != 0;
  }
};

template <int kCount>
DFLASH_DEVICE void multiply_rows(float (&d)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] *= factor[register_row(i)];
}

// One consumer warpgroup's way through an item's walk.
template <int kD, Half kType>
struct ForwardConsumer {
  using Memory = ForwardMemory<kD>;
  static constexpr int kKeys = Memory::kKeys;

  const ForwardParameters& p;
  typename Memory::Rings rings;
  uint32_t queries;
  typename Memory::Ring &keys, &values;
  Turns& turns;
  int item;
  Cover context;
  Softmax softmax;
  Interval sees[2];

  // `out` and `weights` are the caller's locals, so that they stay registers: the output so far, and the weights of a
  // tile whose values have not been multiplied yet. What products run in the background is straight-line code: ptxas
  // runs them one by one where it finds branches between their issue and their wait.
  DFLASH_DEVICE void score_tile(float (&scores)[kKeys / 2]) {
    score<kKeys, kD, kType>(scores, queries, kUnitRows, rings.keys(keys.stage), kKeys);
    products_commit();
  }
  DFLASH_DEVICE void multiply_values(Sums<kD>& out, const uint32_t (&weights)[kKeys / 4]) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      accumulate<kD, kType>(out, weights + 4 * step, rings.values(values.stage), kKeys, step);
    products_commit();
  }
  DFLASH_DEVICE void release_keys() {
    release(rings.keys_empty(keys.stage));
    keys.advance();
  }
  DFLASH_DEVICE void release_values() {
    release(rings.values_empty(values.stage));
    values.advance();
  }

  DFLASH_DEVICE void skip() {
    barrier_wait(rings.keys_full(keys.stage), keys.parity);
    turns.take();
    turns.give();
    release_keys();
    barrier_wait(rings.values_full(values.stage), values.parity);
    release_values();
  }

  DFLASH_DEVICE void first_tile(int at, uint32_t (&weights)[kKeys / 4]) {
    float scores[kKeys / 2], rescale[2];
    barrier_wait(rings.keys_full(keys.stage), keys.parity);
    turns.take();
    products_fence();
    score_tile(scores);
    turns.give();
    products_wait<0>();
    settle(scores);
    release_keys();
    if (!context.interior(at, kKeys)) hide(scores, at, sees, -INFINITY);
    softmax.step(scores, p.scale_log2, rescale);  // the output is still zero: nothing to rescale
    pack_all<kType>(scores, weights);
  }

  // Scores of the tile at key row `at`, and meanwhile the values of the tile before.
  DFLASH_DEVICE void next_tile(int at, Sums<kD>& out, uint32_t (&weights)[kKeys / 4]) {
    float scores[kKeys / 2], rescale[2];
    barrier_wait(rings.keys_full(keys.stage), keys.parity);
    barrier_wait(rings.values_full(values.stage), values.parity);
    turns.take();
    products_fence();
    score_tile(scores);
    multiply_values(out, weights);
    turns.give();
    products_wait<1>();
    settle(scores);
    release_keys();
    if (!context.interior(at, kKeys)) hide(scores, at, sees, -INFINITY);
    const bool rises = softmax.step(scores, p.scale_log2, rescale);
    before_wait(softmax.total[0] + softmax.total[1]);
    products_wait<0>();
    settle(out);
    release_values();
    if (rises) multiply_rows(out, rescale);
    pack_all<kType>(scores, weights);
  }

  DFLASH_DEVICE void last_values(Sums<kD>& out, const uint32_t (&weights)[kKeys / 4]) {
    barrier_wait(rings.values_full(values.stage), values.parity);
    products_fence();
    multiply_values(out, weights);
    products_wait<0>();
    settle(out);
    release_values();
  }

  // A tile of own rows, in steps of 16 keys, those that this unit's blocks hold.
  DFLASH_DEVICE void own_tile(int at, const Interval& own, Sums<kD>& out) {
    barrier_wait(rings.keys_full(keys.stage), keys.parity);
    barrier_wait(rings.values_full(values.stage), values.parity);
    for (int step = 0; step < kKeys / kOwnStep; ++step) {
      const int key = at + step * kOwnStep;
      if (own.hi <= key || key + kOwnStep <= own.lo) continue;
      float scores[kOwnStep / 2], rescale[2];
      uint32_t weights[4];
      const uint32_t offset = static_cast<uint32_t>(step * kOwnStep * kPanelRowBytes);
      products_fence();
      score<kOwnStep, kD, kType>(scores, queries, kUnitRows, rings.keys(keys.stage) + offset, kKeys);
      products_commit();
      products_wait<0>();
      settle(scores);
      hide(scores, key, sees, -INFINITY);
      if (softmax.step(scores, p.scale_log2, rescale)) multiply_rows(out, rescale);
      pack_all<kType>(scores, weights);
      products_fence();
      accumulate<kD, kType>(out, weights, rings.values(values.stage), kKeys, step);
      products_commit();
      products_wait<0>();
      settle(out);
    }
    release_keys();
    release_values();
  }

  DFLASH_DEVICE bool in_context(const KeyWalk& walk) const { return !walk.done() && walk.segment == Segment::kContext; }
  DFLASH_DEVICE bool dead(const KeyWalk& walk) const { return context.dead(walk.p, kKeys); }

  // The tiles that a unit needs follow one another: others come before and after.
  DFLASH_DEVICE void run(KeyWalk walk, Sums<kD>& out) {
    ThreadRows::of(p.rows, item).see(p.rows, Segment::kContext, sees);
    for (; in_context(walk) && dead(walk); walk.advance(kKeys)) skip();
    if (in_context(walk)) {
      uint32_t weights[kKeys / 4];
      first_tile(walk.p, weights);
      walk.advance(kKeys);
      for (; in_context(walk) && !dead(walk); walk.advance(kKeys)) next_tile(walk.p, out, weights);
      last_values(out, weights);
    }
    for (; in_context(walk); walk.advance(kKeys)) skip();
    ThreadRows::of(p.rows, item).see(p.rows, Segment::kOwn, sees);
    const Interval own = Unit::of(p.rows, item, consumer_index()).own(p.rows);
    for (; !walk.done(); walk.advance(kKeys)) own_tile(walk.p, own, out);
  }
};

template <int kD, Half kType>
DFLASH_DEVICE void consume_forward(const ForwardParameters& p, const ForwardMemory<kD>& memory) {
  typename ForwardMemory<kD>::Ring keys, values;
  Turns turns = memory.turns(consumer_index());
  for (typename ForwardMemory<kD>::Sets sets;; sets.advance()) {
    const Work work = memory.next_work(keys);
    if (work.item < 0) return;
    const int index = consumer_index();
    const uint32_t queries = memory.unit(sets.stage, 0, index);
    ForwardConsumer<kD, kType> consumer{p,         memory.rings(),
                                        queries,   keys,
                                        values,    turns,
                                        work.item, Unit::of(p.rows, work.item, index).context(p.rows),
                                        {},        {}};
    Sums<kD> out = {};
    memory.wait_units(sets);
    consumer.run(item_walk(p.rows, work.item), out);

    const ThreadRows mine = ThreadRows::of(p.rows, work.item);
    float inverse[2];
    for (int r = 0; r < 2; ++r) {
      float total = consumer.softmax.total[r];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      inverse[r] = 1.0f / total;
      const int64_t at = query_row(p.rows, p.q_heads, work.head, mine.position[r], mine.row[r]);
      if (at >= 0 && thread_index() % 4 == 0) p.lse[at] = consumer.softmax.peak[r] * p.scale_log2 * kLn2 + logf(total);
    }
    char* staging = memory.shared + (memory.unit(sets.stage, 0, consumer_index()) - memory.base);
    store_unit<kD, kType>(out, inverse, staging, p.out, p, work);
    memory.release_units(sets);
  }
}

template <int kD, Half kType>
DFLASH_GLOBAL void DFLASH_BOUNDS(kThreads, 1) forward(const DFLASH_PARAMETER ForwardParameters p) {
#ifdef DFLASH_HOPPER
  char* shared = shared_memory();
  const ForwardMemory<kD> memory{{shared, shared_address(shared)}};
  const TensorMap* const tensors[] = {&p.q};
  run_items(
      memory, [&] { memory.feed(p.list, p.rows, tensors, p.keys); }, [&] { consume_forward<kD, kType>(p, memory); });
#endif
}

template <int kD, Half kType>
int launch_forward(const GpuForward& args, void* stream) {
  using Memory = ForwardMemory<kD>;
  const AttentionShape& s = args.shape;
  ForwardParameters p{};
  p.rows = Rows::of(s);
  p.list = {args.order, args.taken, args.items, s.kv_heads};
  p.q_heads = s.q_heads;
  p.scale_log2 = static_cast<float>(s.scale) * kLog2E;
  p.out = args.out;
  p.lse = args.lse;
  int error = encode_queries(&p.q, args.q, s, kType);
  if (error == 0)
    error =
        encode_key_maps(&p.keys, {args.k_ctx, args.v_ctx, args.k_blk, args.v_blk}, s, Memory::kKeys, kOwnStep, kType);
  if (error != 0) return error;
  return launch_items(forward<kD, kType>, Memory::kBytes, p, stream);
}

}  // namespace dflash::gpu::sm90
