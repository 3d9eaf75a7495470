// The loss kernel on the emulated machine, callable from Python (tests/ops/test_softmax_loss.py). All memory is the
// host's.
#include "loss/softmax.cu"
#include "run.h"

extern "C" const char* softmax_loss(const dflash::SoftmaxLoss* args, unsigned seed) {
  return dflash::emulate(seed, [&] { return dflash::softmax_loss_cuda(*args, nullptr); });
}
