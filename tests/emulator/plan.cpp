// The plan's kernel on the emulated machine, callable from Python (tests/test_plan_kernel.py).
#include "attention/plan.cu"

#include <cstdio>

namespace {

std::string failure;

}  // namespace

extern "C" {

// The fields of PlanArgs, in its order; returns what went wrong, or nullptr.
const char* plan(const dflash::PlanArgs* args, unsigned seed) {
  try {
    dflash::gpu::machine().random.seed(seed);
    const int error = dflash::plan_cuda(*args, nullptr);
    if (error == 0) return nullptr;
    failure = "the launcher returned " + std::to_string(error);
  } catch (const std::exception& fault) {
    failure = fault.what();
  }
  return failure.c_str();
}

}  // extern "C"
