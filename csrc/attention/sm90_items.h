// How a block of threads on Hopper goes through work items: the forward and dq.
//
// There are as many blocks of threads as multiprocessors, and each takes one item of one kv head after another, the
// heaviest that nobody has taken, until there is none. The producer runs ahead: it copies the next item's first tiles
// while the consumers finish an item. Who takes an item, and when, does not change its result. A counter and not fixed
// shares, because other kernels (a collective's) may hold some multiprocessors for a while.
#pragma once

#include "attention/sm90_tile.h"

namespace dflash::gpu::sm90 {

// A work item of one kv head; item < 0: there is none left.
struct Work {
  int item, head;
};

struct WorkList {
  const int32_t* order;
  int32_t* taken;  // how often work was asked for, on all multiprocessors
  int items, heads;

  DFLASH_DEVICE Work take() const {
    const int next = atomic_add(taken, 1);
    return next < items * heads ? Work{order[next / heads], next % heads} : Work{-1, 0};
  }
};

DFLASH_DEVICE KeyWalk item_walk(const Rows& rows, int item) {
  return KeyWalk::of(rows, 2 * item * rows.unit_positions, 2 * rows.unit_positions);
}

// Shared memory: sets of units' tiles, one for each of kTensors tensors and each consumer; the rings of key tiles; the
// barriers: full and empty for each consumer's units of each set, then the rings'; the work that a tile of keys, an
// item's first, begins.
template <int kD, int kTensors, int kSets, int kStages>
struct ItemMemory {
  static constexpr int kKeys = 128;
  using Rings = KeyRings<kD, kKeys, kStages>;
  using Ring = Cursor<kStages>;
  using Sets = Cursor<kSets>;
  static constexpr int kUnit = tile_bytes(kD, kUnitRows);
  static constexpr int kRings = kSets * kTensors * kConsumers * kUnit, kBarriers = kRings + Rings::kBytes;
  static constexpr int kWorks = kBarriers + 8 * (2 * kSets * kConsumers + Rings::kBarriers);
  static constexpr int kBytes = kWorks + kStages * static_cast<int>(sizeof(Work));

  char* shared;
  uint32_t base;

  DFLASH_DEVICE uint32_t unit(int set, int tensor, int index) const {
    return base + ((set * kTensors + tensor) * kConsumers + index) * kUnit;
  }
  DFLASH_DEVICE uint32_t units_full(int set, int index) const {
    return base + kBarriers + 8 * (set * kConsumers + index);
  }
  DFLASH_DEVICE uint32_t units_empty(int set, int index) const { return units_full(kSets + set, index); }
  DFLASH_DEVICE Rings rings() const { return {base + kRings, units_full(2 * kSets, 0)}; }
  DFLASH_DEVICE Work* work(int stage) const { return reinterpret_cast<Work*>(shared + kWorks) + stage; }

  DFLASH_DEVICE void init() const {
    for (int set = 0; set < kSets; ++set) {
      for (int index = 0; index < kConsumers; ++index) {
        barrier_init(units_full(set, index), 1);
        barrier_init(units_empty(set, index), kWarpgroup / 32);
      }
    }
    rings().init();
  }

  // The producer's part, by one thread. `tensors` are the maps of what comes by units.
  DFLASH_DEVICE void feed(const WorkList& list, const Rows& rows, const TensorMap* const (&tensors)[kTensors],
                          const KeyMaps& keys) const {
    const Rings rings = this->rings();
    Ring ring;
    for (Sets sets;; sets.advance()) {
      const Work work = list.take();
      barrier_wait(rings.keys_empty(ring.stage), ring.parity ^ 1);
      *this->work(ring.stage) = work;
      if (work.item < 0) return barrier_arrive(rings.keys_full(ring.stage));
      KeyWalk walk = item_walk(rows, work.item);
      // The units' memory may be in use for longer than a stage of the rings.
      rings.feed(walk, keys, work.head, ring);
      for (int index = 0; index < kConsumers; ++index) feed_unit(work, index, rows, tensors, sets);
      for (walk.advance(kKeys); !walk.done(); walk.advance(kKeys)) rings.feed(walk, keys, work.head, ring);
    }
  }

  // The consumers' part: what the tile at `keys` begins, the same in all lanes of a warp.
  DFLASH_DEVICE Work next_work(const Ring& keys) const {
    barrier_wait(rings().keys_full(keys.stage), keys.parity);
    const Work work = *this->work(keys.stage);
    return {shuffle(work.item, 0), shuffle(work.head, 0)};
  }
  DFLASH_DEVICE void wait_units(const Sets& sets) const {
    barrier_wait(units_full(sets.stage, consumer_index()), sets.parity);
  }
  // Copies write the units next, where ordinary writes may have been: results leave the forward through its queries.
  DFLASH_DEVICE void release_units(const Sets& sets) const {
    async_fence();
    release(units_empty(sets.stage, consumer_index()));
  }

 private:
  DFLASH_DEVICE void feed_unit(const Work& work, int index, const Rows& rows,
                               const TensorMap* const (&tensors)[kTensors], const Sets& sets) const {
    const uint32_t full = units_full(sets.stage, index);
    const int position = (2 * work.item + index) * rows.unit_positions;
    barrier_wait(units_empty(sets.stage, index), sets.parity ^ 1);
    if (position >= rows.positions) return barrier_arrive(full);
    barrier_arrive_expect(full, kTensors * unit_bytes<kD>(rows));
    for (int tensor = 0; tensor < kTensors; ++tensor)
      copy_unit<kD>(unit(sets.stage, tensor, index), tensors[tensor], full, rows, work.head, position);
  }
};

// feed() in one thread of the producer, consume() in both consumers.
template <typename Memory, typename Feed, typename Consume>
DFLASH_DEVICE void run_items(const Memory& memory, const Feed& feed, const Consume& consume) {
  if (thread_index() == 0) {
    memory.init();
    barrier_init_fence();
    async_fence();
  }
  sync_threads();
  if (thread_index() < kWarpgroup) {
    give_registers<40>();
    if (thread_index() == 0) feed();
  } else {
    take_registers<232>();
    consume();
  }
}

// A consumer's accumulator, row r times factor[r], to its unit's rows of `tensor`, (A*S, Hq, D), through `staging`,
// panels of a unit's rows.
template <int kD, Half kType, typename Parameters>
DFLASH_DEVICE void store_unit(const Sums<kD>& d, const float (&factor)[2], char* staging, void* tensor,
                              const Parameters& p, const Work& work) {
  const int index = consumer_index();
  store_rows<kD, kType>(d, factor, staging, kUnitRows, [&](int row) -> void* {
    const int position = p.rows.item_position(work.item, index * kUnitRows + row);
    const int64_t at = query_row(p.rows, p.q_heads, work.head, position, row);
    return at < 0 ? nullptr : static_cast<char*>(tensor) + at * kD * 2;
  });
}

// A multiprocessor holds one block of threads: its registers are all taken.
template <typename Parameters>
int launch_items(void (*kernel)(Parameters), int shared, const Parameters& parameters, void* stream) {
  const WorkList& list = parameters.list;
  int multiprocessors = 0;
  int error = count_multiprocessors(&multiprocessors);
  if (error == 0) error = clear(list.taken, sizeof(*list.taken), stream);
  if (error != 0) return error;
  return launch(kernel, {smaller(multiprocessors, list.items * list.heads), kThreads, shared}, parameters, stream);
}

}  // namespace dflash::gpu::sm90
