// An emulated GPU, so that the kernels' own source runs on a CPU: what csrc/attention/ptx.h names, by the PTX ISA's
// words.
//
// It is a check of logic, not of speed or of hardware: blocks run one after another, each thread is a fiber, and warps
// take turns in a random order. What the hardware does at an unknown time happens here at the least convenient one:
//   - memory that a background copy will fill holds NaN from the copy's start until its end is waited for;
//   - accumulators of a warpgroup product hold NaN from its issue until its end is waited for;
//   - shared memory starts as NaN; a copy or product ends at a random time, at the latest when it must.
// So a missing wait, barrier or fence of a phase shows as a wrong result on some seed, and a deadlock as a Fault that
// says who waits for what.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define DFLASH_DEVICE inline
#define DFLASH_GLOBAL
#define DFLASH_BOUNDS(threads, blocks)
#define DFLASH_PARAMETER
#define DFLASH_HOPPER 1

namespace dflash::gpu {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kWarp = 32;
// Where the emulated shared memory starts: real addresses do not start at 0 either.
inline constexpr uint32_t kSharedBase = 1024;
// As ptx.h has it; here it costs nothing.
inline constexpr int kSharedAlign = 1024;
inline constexpr size_t kStackBytes = 512 * 1024;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One side of a switch between stacks: where it goes on.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
// Saves what a call must preserve on this stack and takes it back from the other one. swapcontext would also ask the
// kernel for the signal mask, which is most of the time of a switch, and a product is 64 switches.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  __asm__(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void switch_context(Context& from, Context& to) { switch_stacks(&from.stack_pointer, to.stack_pointer); }
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  // Upwards: six registers, the address to go on at, and the return address that a called function would find.
  uintptr_t* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack + bytes) / 16 * 16);
  std::fill(top - 8, top, uintptr_t{0});
  top[-2] = reinterpret_cast<uintptr_t>(entry);
  context.stack_pointer = top - 8;
}
#else
struct Context {
  ucontext_t state{};
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
#endif

struct Copy {
  char* to;
  const char* from;  // nullptr: zeros
};

// Lanes that meet: the last to arrive does the work for all.
struct Meeting {
  const char* what = "";
  unsigned generation = 0;
  size_t arrived = 0;
  std::vector<void*> arguments;
};

struct Thread {
  int index = 0;
  bool done = false;
  const unsigned* waits_on = nullptr;
  unsigned waits_while = 0;
  const char* waits_for = "";
  Context context;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> copies;  // not yet committed
  std::deque<std::vector<Copy>> groups;

  bool ready() const { return !done && (waits_on == nullptr || *waits_on != waits_while); }
};

struct NamedBarrier {
  unsigned generation = 0;
  int arrived = 0;
};

// Work that the machine does by itself, in its own time (hopper.h): bulk copies, warpgroup products.
struct Background {
  virtual ~Background() = default;
  virtual bool pending() const = 0;
  virtual void step(std::mt19937& random) = 0;
};

struct Machine {
  std::mt19937 random;
  int block = 0, threads_per_block = 0;
  std::unique_ptr<char, void (*)(void*)> shared{nullptr, std::free};
  size_t shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<Meeting> warps, warpgroups;
  NamedBarrier barriers[16];
  std::shared_ptr<Background> background;
  std::function<void()> body;
  std::exception_ptr failure;
  Context scheduler;
  // The scheduler's stack, for the address sanitizer.
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;
  Thread* current = nullptr;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void switch_to_scheduler() {
  Machine& m = machine();
  Thread* self = m.current;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(self->done ? nullptr : &fake, m.scheduler_stack, m.scheduler_bytes);
#endif
  switch_context(self->context, m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &m.scheduler_stack, &m.scheduler_bytes);
#endif
}

// Blocks this thread while *counter == value.
inline void wait_while(const unsigned* counter, unsigned value, const char* what) {
  Thread& self = *machine().current;
  if (*counter != value) return;
  self.waits_on = counter;
  self.waits_while = value;
  self.waits_for = what;
  switch_to_scheduler();
  self.waits_on = nullptr;
}

// All `size` lanes of a warp or warpgroup call this at the same place; `work` is done once, with each lane's argument.
template <typename Work>
void meet(Meeting& meeting, size_t size, size_t lane, const char* what, void* argument, const Work& work) {
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.arguments.assign(size, nullptr);
  } else if (std::strcmp(meeting.what, what) != 0) {
    throw Fault(std::string("diverged: some lanes are at ") + meeting.what + ", others at " + what);
  }
  meeting.arguments[lane] = argument;
  const unsigned generation = meeting.generation;
  if (++meeting.arrived == size) {
    work(meeting.arguments);
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  wait_while(&meeting.generation, generation, what);
}

template <typename Work>
void meet_warp(const char* what, void* argument, const Work& work) {
  Machine& m = machine();
  const int t = m.current->index;
  meet(m.warps[t / kWarp], kWarp, t % kWarp, what, argument, work);
}

inline std::string who_waits() {
  Machine& m = machine();
  std::unordered_map<std::string, int> counts;
  for (const Thread& t : m.threads)
    if (!t.done) ++counts["warp " + std::to_string(t.index / kWarp) + " at " + t.waits_for];
  std::string text;
  for (const auto& [what, count] : counts) text += (text.empty() ? "" : "; ") + std::to_string(count) + " of " + what;
  return text;
}

inline void fiber_entry() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_bytes);
#endif
  try {
    m.body();
  } catch (...) {
    if (!m.failure) m.failure = std::current_exception();
  }
  m.current->done = true;
  switch_to_scheduler();
}

inline void resume(Thread& t) {
  Machine& m = machine();
  m.current = &t;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, t.stack.get(), kStackBytes);
#endif
  switch_context(m.scheduler, t.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  if (m.failure) std::rethrow_exception(m.failure);
}

inline void start_block(int threads, size_t shared) {
  Machine& m = machine();
  m.shared_bytes = shared;
  const size_t bytes = (shared + 1023) / 1024 * 1024;
  m.shared.reset(static_cast<char*>(std::aligned_alloc(1024, std::max<size_t>(bytes, 1024))));
  std::memset(m.shared.get(), 0xff, bytes);
  m.threads.resize(threads);
  m.warps.assign((threads + kWarp - 1) / kWarp, {});
  m.warpgroups.assign((threads + 127) / 128, {});
  for (NamedBarrier& barrier : m.barriers) barrier = {};
  m.background.reset();
  m.failure = nullptr;
  for (int i = 0; i < threads; ++i) {
    Thread& t = m.threads[i];
    if (!t.stack) t.stack.reset(new char[kStackBytes]);
    t.index = i;
    t.done = false;
    t.waits_on = nullptr;
    t.copies.clear();
    t.groups.clear();
#if defined(__SANITIZE_ADDRESS__)
    // What the last fiber on this stack left marked: it never returned from its outermost function.
    __asan_unpoison_memory_region(t.stack.get(), kStackBytes);
#endif
    make_context(t.context, t.stack.get(), kStackBytes, fiber_entry);
  }
}

// Who runs when, in one block: warps sleep at random while others run on, and the background work of some blocks is
// quick, of others only ever done when nobody can go on without it.
struct Schedule {
  std::vector<int> turns, wakes;  // wakes: the round at which a warp may run again
  unsigned laziness;              // background steps come one in this many times; 0: never
  int round = 0;

  explicit Schedule(size_t warps, std::mt19937& random) : turns(warps), wakes(warps, 0) {
    for (size_t w = 0; w < warps; ++w) turns[w] = static_cast<int>(w);
    const unsigned choices[] = {2, 16, 0};
    laziness = choices[random() % 3];
  }
  void next(std::mt19937& random) {
    ++round;
    std::shuffle(turns.begin(), turns.end(), random);
    for (int& wake : wakes)
      if (random() % 16 == 0) wake = round + static_cast<int>(random() % 64);
  }
};

// Lets every warp that is awake go on to where it has to wait; false if none could.
inline bool run_round(Schedule& schedule) {
  Machine& m = machine();
  bool moved = false;
  for (const int w : schedule.turns) {
    if (schedule.wakes[w] > schedule.round) continue;
    const bool backwards = m.random() % 2 != 0;
    for (int l = 0; l < kWarp; ++l) {
      const size_t index = w * kWarp + (backwards ? kWarp - 1 - l : l);
      if (index >= m.threads.size() || !m.threads[index].ready()) continue;
      moved = true;
      resume(m.threads[index]);
    }
    if (m.background && schedule.laziness > 0 && m.random() % schedule.laziness == 0) m.background->step(m.random);
  }
  return moved;
}

inline void run_block() {
  Machine& m = machine();
  Schedule schedule(m.warps.size(), m.random);
  for (;;) {
    schedule.next(m.random);
    if (run_round(schedule)) continue;
    bool alive = false, ready = false;
    for (const Thread& t : m.threads) {
      alive = alive || !t.done;
      ready = ready || t.ready();
    }
    if (ready) {
      std::fill(schedule.wakes.begin(), schedule.wakes.end(), 0);
      continue;
    }
    if (m.background && m.background->pending()) {
      m.background->step(m.random);
      continue;
    }
    if (alive) throw Fault("deadlock: " + who_waits());
    return;
  }
}

struct Launch {
  int64_t blocks;
  int threads;
  int shared;
};

inline int count_multiprocessors(int* count) {
  *count = 2;
  return 0;
}
inline int clear(void* memory, size_t bytes, void*) {
  std::memset(memory, 0, bytes);
  return 0;
}

inline constexpr int kMostShared = 232448 - 1024;  // what one block may have on an H100, less the alignment

template <typename Parameters>
int launch(void (*kernel)(Parameters), const Launch& how, const Parameters& parameters, void*) {
  Machine& m = machine();
  if (how.shared > kMostShared) throw Fault("shared memory: " + std::to_string(how.shared) + " bytes");
  if (how.blocks < 1 || how.blocks > INT32_MAX) throw Fault(std::to_string(how.blocks) + " thread blocks");
  m.threads_per_block = how.threads;
  for (int64_t block = 0; block < how.blocks; ++block) {
    m.block = static_cast<int>(block);
    start_block(how.threads, how.shared);
    m.body = [&] { kernel(parameters); };
    run_block();
  }
  return 0;
}

// --- what ptx.h promises ---

inline int thread_index() { return machine().current->index; }
inline int fresh_thread_index() { return thread_index(); }
inline int block_index() { return machine().block; }
inline int block_threads() { return machine().threads_per_block; }
inline char* shared_memory() { return machine().shared.get(); }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - shared_memory()) + kSharedBase;
}
// Memory at a shared address, `bytes` long.
inline char* shared_at(uint32_t address, size_t bytes) {
  const size_t offset = address - kSharedBase;
  if (address < kSharedBase || offset + bytes > machine().shared_bytes)
    throw Fault("shared address " + std::to_string(offset) + " + " + std::to_string(bytes) + " is past the end");
  return shared_memory() + offset;
}

inline void sync_named(int id, int threads) {
  NamedBarrier& barrier = machine().barriers[id];
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  if (barrier.arrived > threads) throw Fault("named barrier with two counts");
  wait_while(&barrier.generation, generation, "a barrier");
}
inline void sync_threads() { sync_named(0, block_threads()); }
inline void sync_warp() {
  meet_warp("sync_warp", nullptr, [](const std::vector<void*>&) {});
}

// Every lane's value, in lane order.
template <typename Value>
std::array<Value, kWarp> gather_warp(const char* what, Value value) {
  struct Slot {
    Value value;
    std::array<Value, kWarp> all;
  } slot{value, {}};
  meet_warp(what, &slot, [](const std::vector<void*>& slots) {
    std::array<Value, kWarp> all;
    for (int l = 0; l < kWarp; ++l) all[l] = static_cast<Slot*>(slots[l])->value;
    for (void* s : slots) static_cast<Slot*>(s)->all = all;
  });
  return slot.all;
}

inline int lane_index() { return thread_index() % kWarp; }
inline int shuffle(int value, int lane) { return gather_warp("shuffle", value)[lane]; }
inline float shuffle_xor(float value, int mask) { return gather_warp("shuffle_xor", value)[lane_index() ^ mask]; }
inline int shuffle_xor(int value, int mask) { return gather_warp("shuffle_xor", value)[lane_index() ^ mask]; }
inline int shuffle_up(int value, int delta) {
  const auto all = gather_warp("shuffle_up", value);
  return lane_index() >= delta ? all[lane_index() - delta] : value;
}
inline unsigned ballot(bool predicate) {
  const auto all = gather_warp("ballot", static_cast<int>(predicate));
  unsigned bits = 0;
  for (int l = 0; l < kWarp; ++l) bits |= static_cast<unsigned>(all[l]) << l;
  return bits;
}
inline unsigned match_any(int value) {
  const auto all = gather_warp("match_any", value);
  unsigned bits = 0;
  for (int l = 0; l < kWarp; ++l) bits |= static_cast<unsigned>(all[l] == value) << l;
  return bits;
}
inline int atomic_add(int* p, int value) {
  const int old = *p;
  *p += value;
  return old;
}
inline int popc(unsigned bits) { return std::popcount(bits); }
inline int clz(unsigned bits) { return std::countl_zero(bits); }
inline float exp2_fast(float x) { return std::exp2(x); }

inline float half_to_float(uint16_t bits, Half type) {
  if (type == Half::kBf16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}
inline uint16_t float_to_half(float x, Half type) {
  if (type == Half::kFp16) return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
template <Half kType>
uint32_t pack(float low, float high) {
  return float_to_half(low, kType) | static_cast<uint32_t>(float_to_half(high, kType)) << 16;
}
template <Half kType>
void unpack(uint32_t bits, float& low, float& high) {
  low = half_to_float(static_cast<uint16_t>(bits), kType);
  high = half_to_float(static_cast<uint16_t>(bits >> 16), kType);
}

inline void load_matrices_as(uint32_t (&r)[4], uint32_t address, bool transposed) {
  struct Slot {
    uint32_t* r;
    uint32_t address;
  } slot{r, address};
  meet_warp(transposed ? "ldmatrix.trans" : "ldmatrix", &slot, [&](const std::vector<void*>& slots) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t rows[8][8];
      for (int row = 0; row < 8; ++row) {
        const uint32_t at = static_cast<Slot*>(slots[matrix * 8 + row])->address;
        if (at % 16 != 0) throw Fault("ldmatrix: a row is not aligned to 16 bytes");
        std::memcpy(rows[row], shared_at(at, 16), 16);
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        const int row = lane / 4, column = lane % 4 * 2;
        const uint16_t low = transposed ? rows[column][row] : rows[row][column];
        const uint16_t high = transposed ? rows[column + 1][row] : rows[row][column + 1];
        static_cast<Slot*>(slots[lane])->r[matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) { load_matrices_as(r, address, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) { load_matrices_as(r, address, true); }

template <Half kType>
void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Slot {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } slot{d, a, {b0, b1}};
  meet_warp("mma", &slot, [](const std::vector<void*>& slots) {
    float left[16][16], right[16][8], sum[16][8] = {};
    for (int lane = 0; lane < kWarp; ++lane) {
      const Slot& s = *static_cast<Slot*>(slots[lane]);
      const int g = lane / 4, c = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        const int row = g + i % 2 * 8, column = c + i / 2 * 8;
        unpack<kType>(s.a[i], left[row][column], left[row][column + 1]);
      }
      for (int i = 0; i < 2; ++i) unpack<kType>(s.b[i], right[c + 8 * i][g], right[c + 8 * i + 1][g]);
    }
    for (int i = 0; i < 16; ++i)
      for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) sum[i][j] += left[i][k] * right[k][j];
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<Slot*>(slots[lane])->d[i] += sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

inline void copy_async(uint32_t shared, const void* global, bool valid) {
  if (shared % 16 != 0) throw Fault("cp.async: shared address not aligned to 16 bytes");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) throw Fault("cp.async: global address not aligned");
  char* to = shared_at(shared, 16);
  std::memset(to, 0xff, 16);
  machine().current->copies.push_back({to, valid ? static_cast<const char*>(global) : nullptr});
}
inline void copy_async_commit() {
  Thread& self = *machine().current;
  self.groups.push_back(std::move(self.copies));
  self.copies.clear();
}
template <int kPending>
void copy_async_wait() {
  Thread& self = *machine().current;
  while (self.groups.size() > kPending) {
    for (const Copy& copy : self.groups.front()) {
      if (copy.from != nullptr) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    self.groups.pop_front();
  }
}

}  // namespace dflash::gpu
