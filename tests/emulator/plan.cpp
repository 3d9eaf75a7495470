// The plan's kernel on the emulated machine, callable from Python (tests/ops/test_plan_kernel.py).
#include "attention/plan.cu"

#include "run.h"

// The fields of PlanArgs, in its order; returns what went wrong, or nullptr.
extern "C" const char* plan(const dflash::PlanArgs* args, unsigned seed) {
  return dflash::emulate(seed, [&] { return dflash::plan_cuda(*args, nullptr); });
}
