// The loss on the CPU: rows over threads. The arithmetic of a row is in softmax_isa.cpp.
#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "loss/softmax_rows.h"

namespace dflash {
namespace {

using Rows = void (*)(const SoftmaxLoss&, int64_t, int64_t);

Rows choose_rows() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::kAvx512) return avx512::softmax_rows;
  if (instruction_set() == InstructionSet::kAvx2) return avx2::softmax_rows;
#endif
  return baseline::softmax_rows;
}

}  // namespace

void softmax_loss_cpu(const SoftmaxLoss& args) {
  static const Rows rows = choose_rows();
  torch::stable::parallel_for(0, args.rows, 1, [&](int64_t first, int64_t last) { rows(args, first, last); });
}

}  // namespace dflash
