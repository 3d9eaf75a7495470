// Registers the loss operator of dflash_scale::* and hands its tensors to the kernels as pointers. No logic: the Python
// layer (dflash_scale/ops/softmax_loss.py) checks what it gives and holds the fake kernel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "loss/softmax.h"
#include "tensors.h"

namespace dflash {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Results = std::tuple<Tensor, Tensor>;

// `verifier` has no rows where no soft term is wanted.
SoftmaxLoss arguments(const Tensor& logits, const Tensor& labels, const Tensor& verifier, const Tensor& rows,
                      const std::vector<double>& weights, const Results& results) {
  STD_TORCH_CHECK(logits.stride(1) == 1 && (verifier.size(0) == 0 || verifier.stride(1) == 1),
                  "dflash_scale: softmax_loss_ takes rows without gaps");
  STD_TORCH_CHECK(weights.size() == kTerms, "dflash_scale: softmax_loss_ takes one weight per term");
  const bool soft = verifier.size(0) > 0;
  SoftmaxLoss args{logits.size(0), logits.size(1), logits.stride(0), verifier.stride(0),
                   number(logits, "softmax_loss_")};
  args.logits = out<void>(logits);
  args.labels = in<int32_t>(labels);
  args.verifier = soft ? verifier.const_data_ptr() : nullptr;
  args.verifier_rows = soft ? in<int32_t>(rows) : nullptr;
  for (int term = 0; term < kTerms; ++term) args.weights[term] = static_cast<float>(weights[term]);
  args.values = out<float>(std::get<0>(results));
  args.ranks = out<int32_t>(std::get<1>(results));
  return args;
}

Results empty_results(const Tensor& logits) {
  return {torch::stable::new_empty(logits, {logits.size(0), int64_t{kTerms}}, ScalarType::Float),
          torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Int)};
}

Results softmax_cpu(Tensor logits, Tensor labels, Tensor verifier, Tensor rows, std::vector<double> weights) {
  STD_TORCH_CHECK(number(logits, "softmax_loss_") != Number::kFp16,
                  "dflash_scale: softmax_loss_ on a CPU takes float32 and bfloat16");
  Results results = empty_results(logits);
  softmax_loss_cpu(arguments(logits, labels, verifier, rows, weights, results));
  return results;
}

#ifdef DFLASH_CUDA
bool starts_at_packets(const Tensor& t) {
  const int64_t bytes = number(t, "softmax_loss_") == Number::kFloat ? 4 : 2;
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(0) * bytes % 16 == 0;
}

Results softmax_cuda(Tensor logits, Tensor labels, Tensor verifier, Tensor rows, std::vector<double> weights) {
  STD_TORCH_CHECK(starts_at_packets(logits) && (verifier.size(0) == 0 || starts_at_packets(verifier)),
                  "dflash_scale: on a GPU softmax_loss_ takes rows that start at multiples of 16 bytes");
  const OnDevice device(logits);
  Results results = empty_results(logits);
  check_launch(softmax_loss_cuda(arguments(logits, labels, verifier, rows, weights, results), device.stream()), "loss");
  return results;
}
#endif

}  // namespace
}  // namespace dflash

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_scale, m) {
  m.def(
      "softmax_loss_(Tensor(a!) logits, Tensor labels, Tensor verifier, Tensor rows, float[] weights) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_scale, CPU, m) { m.impl("softmax_loss_", TORCH_BOX(&dflash::softmax_cpu)); }

#ifdef DFLASH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash_scale, CUDA, m) { m.impl("softmax_loss_", TORCH_BOX(&dflash::softmax_cuda)); }
#endif
