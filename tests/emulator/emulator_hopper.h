// Hopper's part of the emulated machine: mbarriers, bulk copies and warpgroup products that go on in the background.
#pragma once

#include <map>

#include "emulator.h"

namespace dflash::gpu {

struct TensorMap {
  TensorShape shape;
};

inline int encode(TensorMap* map, const TensorShape& shape, Half) {
  for (const uint64_t stride : shape.strides)
    if (stride % 16 != 0) throw Fault("tensor map: a stride is no multiple of 16 bytes");
  for (const uint32_t size : shape.box)
    if (size == 0 || size > 256) throw Fault("tensor map: a box has 1 to 256 elements a side");
  for (const uint64_t size : shape.sizes)
    if (size == 0) throw Fault("tensor map: a tensor without elements");
  if (shape.box[0] != kPanel || reinterpret_cast<uintptr_t>(shape.base) % 16 != 0) throw Fault("tensor map: alignment");
  map->shape = shape;
  return 0;
}

struct Barrier {
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;
  unsigned phase = 0;

  void settle() {
    if (missing < 0) throw Fault("mbarrier: more arrivals than it was initialised for");
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    ++phase;
  }
};

struct BoxCopy {
  uint32_t shared;
  TensorShape shape;
  int at[3];
  Barrier* barrier;

  int rows() const { return static_cast<int>(shape.box[1] * shape.box[2]); }
};

// What a warpgroup's accumulator really holds while products on it are in flight; lane by lane.
struct Accumulator {
  std::vector<float*> lanes;
  std::vector<std::vector<float>> values;
  int flying = 0;
};

struct Product {
  int columns;
  Half type;
  bool add, transposed;
  uint64_t a_shared, b;
  std::vector<const uint32_t*> a_lanes;  // empty: a is in shared memory
  std::vector<std::vector<uint32_t>> a_values;
  Accumulator* target;
  bool done = false;
};

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// Element of an operand in shared memory, by its descriptor: `along` runs along 128-byte rows, `down` over them.
inline float element(uint64_t descriptor, bool leading, int down, int along, Half type) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t lead = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) throw Fault("wgmma: not a 128-byte swizzled operand");
  uint32_t at = start + static_cast<uint32_t>(down / 8) * stride + static_cast<uint32_t>(down % 8) * 128;
  if (leading) {
    at += static_cast<uint32_t>(along / 64) * lead + static_cast<uint32_t>(along % 64) * 2;
  } else {
    if (start % 128 + 32 > 128) throw Fault("wgmma: a depth of 16 crosses a 128-byte row");
    at += static_cast<uint32_t>(along) * 2;
  }
  uint16_t bits;
  std::memcpy(&bits, shared_at(swizzled(at), 2), 2);
  return half_to_float(bits, type);
}

struct Hopper : Background {
  struct Queue {
    std::deque<std::vector<Product>> groups{1};  // the last one is not committed yet
    bool fenced = false;
  };
  std::unordered_map<uint32_t, Barrier> barriers;
  std::vector<BoxCopy> copies;
  std::vector<Queue> queues;
  std::map<float*, Accumulator> accumulators;

  explicit Hopper(size_t warpgroups) : queues(warpgroups) {}

  Product* next(Queue& queue) {
    for (auto& group : queue.groups)
      for (Product& product : group)
        if (!product.done) return &product;
    return nullptr;
  }
  bool pending() const override { return !copies.empty(); }

  void step(std::mt19937& random) override {
    Queue& queue = queues[random() % queues.size()];
    Product* product = next(queue);
    if (product != nullptr && (random() % 2 == 0 || copies.empty())) return multiply(*product);
    if (copies.empty()) return;
    const size_t i = random() % copies.size();
    const BoxCopy copy = copies[i];
    copies.erase(copies.begin() + static_cast<int64_t>(i));
    fill(copy);
  }

  static char* place(const BoxCopy& copy, int row, int column) {
    const uint32_t at = copy.shared + static_cast<uint32_t>(row) * 128 + static_cast<uint32_t>(column) * 2;
    return shared_at(swizzled(at), 2);
  }

  static void fill(const BoxCopy& copy) {
    const TensorShape& s = copy.shape;
    for (int row = 0; row < copy.rows(); ++row) {
      const int64_t at[3] = {0, copy.at[1] + row % static_cast<int>(s.box[1]),
                             copy.at[2] + row / static_cast<int>(s.box[1])};
      for (int column = 0; column < kPanel; ++column) {
        const int64_t c = copy.at[0] + column;
        const bool inside = c >= 0 && c < static_cast<int64_t>(s.sizes[0]) && at[1] >= 0 && at[2] >= 0 &&
                            at[1] < static_cast<int64_t>(s.sizes[1]) && at[2] < static_cast<int64_t>(s.sizes[2]);
        char* to = place(copy, row, column);
        std::memset(to, 0, 2);
        if (inside) {
          std::memcpy(to,
                      static_cast<const char*>(s.base) + at[1] * static_cast<int64_t>(s.strides[0]) +
                          at[2] * static_cast<int64_t>(s.strides[1]) + c * 2,
                      2);
        }
      }
    }
    copy.barrier->bytes -= copy.rows() * 128;
    copy.barrier->settle();
  }

  static void multiply(Product& p) {
    float left[64][16];
    std::vector<float> right(static_cast<size_t>(p.columns) * 16);
    for (int row = 0; row < 64 && p.a_lanes.empty(); ++row)
      for (int k = 0; k < 16; ++k) left[row][k] = element(p.a_shared, false, row, k, p.type);
    for (size_t lane = 0; lane < p.a_lanes.size(); ++lane) {
      const int row = static_cast<int>(lane) / 32 * 16 + static_cast<int>(lane) % 32 / 4;
      for (int i = 0; i < 4; ++i) {
        if (p.a_lanes[lane][i] != p.a_values[lane][i]) throw Fault("wgmma: its left operand changed while it ran");
        const int column = static_cast<int>(lane) % 4 * 2 + i / 2 * 8;
        for (int half = 0; half < 2; ++half)
          left[row + i % 2 * 8][column + half] =
              half_to_float(static_cast<uint16_t>(p.a_values[lane][i] >> 16 * half), p.type);
      }
    }
    for (int n = 0; n < p.columns; ++n)
      for (int k = 0; k < 16; ++k)
        right[n * 16 + k] = p.transposed ? element(p.b, true, k, n, p.type) : element(p.b, false, n, k, p.type);
    for (int lane = 0; lane < 128; ++lane) {
      for (int i = 0; i < p.columns / 2; ++i) {
        const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[column * 16 + k];
        float& value = p.target->values[lane][i];
        value = p.add ? value + sum : sum;
      }
    }
    p.done = true;
  }

  void issue(Queue& queue, Product product, const std::vector<float*>& d) {
    if (!queue.fenced) throw Fault("wgmma: registers were not fenced before the first product after a wait");
    Accumulator& target = accumulators[d[0]];
    if (target.flying++ == 0) {
      target.lanes = d;
      target.values.clear();
      for (float* lane : d) {
        target.values.emplace_back(lane, lane + product.columns / 2);
        std::fill(lane, lane + product.columns / 2, std::nanf(""));
      }
    }
    product.target = &target;
    queue.groups.back().push_back(std::move(product));
  }

  void wait(Queue& queue, size_t allowed) {
    queue.fenced = false;
    while (queue.groups.size() - 1 > allowed) {
      for (Product& product : queue.groups.front()) {
        if (!product.done) multiply(product);
        Accumulator& target = *product.target;
        if (--target.flying > 0) continue;
        for (size_t lane = 0; lane < target.lanes.size(); ++lane)
          std::copy(target.values[lane].begin(), target.values[lane].end(), target.lanes[lane]);
      }
      queue.groups.pop_front();
    }
  }
};

inline Hopper& hopper() {
  Machine& m = machine();
  if (!m.background) m.background = std::make_shared<Hopper>(m.warpgroups.size());
  return static_cast<Hopper&>(*m.background);
}

inline Hopper::Queue& queue() { return hopper().queues[thread_index() / 128]; }

template <typename Work>
void meet_warpgroup(const char* what, void* argument, const Work& work) {
  const int t = thread_index();
  meet(machine().warpgroups[t / 128], 128, t % 128, what, argument, work);
}

inline void barrier_init(uint32_t barrier, int arrivals) {
  if (barrier % 8 != 0) throw Fault("mbarrier: not aligned to 8 bytes");
  shared_at(barrier, 8);
  hopper().barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void barrier_init_fence() {}
inline Barrier& known_barrier(uint32_t barrier) {
  const auto found = hopper().barriers.find(barrier);
  if (found == hopper().barriers.end()) throw Fault("mbarrier: used before its initialisation");
  return found->second;
}
inline void barrier_arrive(uint32_t barrier) {
  Barrier& b = known_barrier(barrier);
  --b.missing;
  b.settle();
}
inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
  Barrier& b = known_barrier(barrier);
  b.bytes += bytes;
  --b.missing;
  b.settle();
}
inline void barrier_wait(uint32_t barrier, int parity) {
  Barrier& b = known_barrier(barrier);
  while (b.phase % 2 == static_cast<unsigned>(parity)) wait_while(&b.phase, b.phase, "mbarrier_wait");
}

inline void copy_box(uint32_t shared, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  if (shared % 1024 != 0) throw Fault("bulk copy: its target is not aligned to 1024 bytes");
  const BoxCopy copy{shared, map->shape, {c0, c1, c2}, &known_barrier(barrier)};
  for (int row = 0; row < copy.rows(); ++row) std::memset(shared_at(shared + row * 128, 128), 0xff, 128);
  hopper().copies.push_back(copy);
}
inline void async_fence() {}

template <int kCount>
void take_registers() {
  meet_warpgroup("setmaxnreg", nullptr, [](const std::vector<void*>&) {});
}
template <int kCount>
void give_registers() {
  meet_warpgroup("setmaxnreg", nullptr, [](const std::vector<void*>&) {});
}

inline void products_fence() {
  meet_warpgroup("wgmma.fence", nullptr, [](const std::vector<void*>&) { queue().fenced = true; });
}
inline void products_commit() {
  meet_warpgroup("wgmma.commit_group", nullptr, [](const std::vector<void*>&) { queue().groups.emplace_back(); });
}
template <int kPending>
void products_wait() {
  meet_warpgroup("wgmma.wait_group", nullptr, [](const std::vector<void*>&) { hopper().wait(queue(), kPending); });
}
inline void before_wait(float) {}
template <int kCount>
void settle(float (&)[kCount]) {}

struct ProductSlot {
  float* d;
  const uint32_t* a;
};

inline void issue_product(const std::vector<void*>& slots, Product product) {
  std::vector<float*> d;
  for (void* s : slots) {
    const ProductSlot& slot = *static_cast<ProductSlot*>(s);
    d.push_back(slot.d);
    if (slot.a == nullptr) continue;
    product.a_lanes.push_back(slot.a);
    product.a_values.emplace_back(slot.a, slot.a + 4);
  }
  hopper().issue(queue(), std::move(product), d);
}

template <int kN, Half kType>
void product(float* d, uint64_t a, uint64_t b, bool add) {
  ProductSlot slot{d, nullptr};
  meet_warpgroup("wgmma", &slot, [&](const std::vector<void*>& slots) {
    issue_product(slots, {kN, kType, add, false, a, b, {}, {}, nullptr});
  });
}
template <int kN, Half kType>
void product_transposed(float* d, const uint32_t* a, uint64_t b, bool add) {
  ProductSlot slot{d, a};
  meet_warpgroup("wgmma", &slot, [&](const std::vector<void*>& slots) {
    issue_product(slots, {kN, kType, add, true, 0, b, {}, {}, nullptr});
  });
}

}  // namespace dflash::gpu
