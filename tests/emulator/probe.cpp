// tests/gpu/probe.cu on the emulated machine, callable from Python (tests/ops/test_gpu_emulated.py).
#include "../gpu/probe.cu"

#include "run.h"

extern "C" const char* probe(unsigned seed) {
  return dflash::emulate(seed, [] { return dflash::gpu::test_all() ? 0 : 1; });
}
