// The pointwise kernels on the emulated machine, callable from Python (tests/ops/test_pointwise.py). All memory is the
// host's.
#include "pointwise/norm.cu"
#include "pointwise/silu.cu"
#include "run.h"

extern "C" {
int64_t norm_blocks(const dflash::Norm* args) { return dflash::norm_blocks(*args); }
const char* norm(const dflash::Norm* args, unsigned seed) {
  return dflash::emulate(seed, [&] { return dflash::norm_cuda(*args, nullptr); });
}
const char* norm_backward(const dflash::Norm* args, unsigned seed) {
  return dflash::emulate(seed, [&] { return dflash::norm_backward_cuda(*args, nullptr); });
}
const char* silu_mul(const dflash::SiluMul* args, unsigned seed) {
  return dflash::emulate(seed, [&] { return dflash::silu_mul_cuda(*args, nullptr); });
}
const char* silu_mul_backward(const dflash::SiluMul* args, unsigned seed) {
  return dflash::emulate(seed, [&] { return dflash::silu_mul_backward_cuda(*args, nullptr); });
}
}
