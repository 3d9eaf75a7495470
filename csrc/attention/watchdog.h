// Diagnosis of a hang (`setup.py build_ext --target watchdog`): a thread that waits for two seconds ends, and who
// waited for what is kept for tests/gpu/ladder.py to print. It ends, and does not go on: it could take old work for new
// and wait again, for ever. Who waits for it then ends two seconds later, and so the kernel.
//
// Included by hopper.h inside a CUDA file; each such file keeps records of its own and exports them by
// DFLASH_EXPORT_STUCK.
#pragma once

namespace dflash::gpu {

inline constexpr uint64_t kPatience = 2'000'000'000;  // nanoseconds
inline constexpr int kStuckRecords = 255;

struct StuckWait {
  int block, thread;
  unsigned barrier;  // its address in shared memory
  int parity;
};
struct Stuck {
  unsigned count;  // of all, also of those that were not recorded
  StuckWait waits[kStuckRecords];
};
static __device__ Stuck stuck;

DFLASH_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// One look at a phase, which the hardware lets last a little while.
DFLASH_DEVICE bool barrier_over(uint32_t barrier, int parity) {
  uint32_t over;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
  return over != 0;
}

DFLASH_DEVICE void watched_wait(uint32_t barrier, int parity) {
  const uint64_t began = nanoseconds();
  while (!barrier_over(barrier, parity)) {
    if (nanoseconds() - began < kPatience) continue;
    const unsigned record = atomicAdd(&stuck.count, 1u);
    if (record < kStuckRecords) stuck.waits[record] = {block_index(), thread_index(), barrier, parity};
    __threadfence_system();
    asm volatile("exit;");
  }
}

// Copies the records of this file into `records` (room for `most`); how many waits were given up, -1 for an error.
inline int read_stuck(StuckWait* records, int most) {
  static Stuck host;
  if (cudaMemcpyFromSymbol(&host, stuck, sizeof host) != cudaSuccess) return -1;
  const int held = static_cast<int>(host.count) < kStuckRecords ? static_cast<int>(host.count) : kStuckRecords;
  for (int i = 0; i < held && i < most; ++i) records[i] = host.waits[i];
  return static_cast<int>(host.count);
}

}  // namespace dflash::gpu

#define DFLASH_EXPORT_STUCK(name)                                                                      \
  extern "C" __attribute__((visibility("default"))) int dflash_stuck_##name(void* records, int most) { \
    return dflash::gpu::read_stuck(static_cast<dflash::gpu::StuckWait*>(records), most);               \
  }
