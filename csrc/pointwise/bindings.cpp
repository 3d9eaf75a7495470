// Registers the pointwise operators of dflash_scale::* and hands their tensors to the kernels as pointers. No logic:
// the Python layer (dflash_scale/ops/pointwise.py) checks what it gives and holds the autograd rules.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "pointwise/pointwise.h"
#include "tensors.h"

namespace dflash {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Pair = std::tuple<Tensor, Tensor>;

#ifdef DFLASH_CUDA
void check_packets(const Tensor& t, Number type) {
  const int64_t bytes = type == Number::kFloat ? 4 : 2;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(0) * bytes % 16 == 0,
                  "dflash_scale: pointwise operators take rows that start at multiples of 16 bytes");
}

// Of one type with `like`, and without gaps.
const void* dense(const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), "dflash_scale: pointwise operators take tensors of one dtype");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0,
                  "dflash_scale: pointwise operators take tensors that start at multiples of 16 bytes");
  return in<void>(t);
}

// torch's empty_like would keep the gaps of a part of wider rows.
Tensor empty_rows(const Tensor& t) {
  if (t.dim() == 2) return torch::stable::new_empty(t, {t.size(0), t.size(1)});
  return torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2)});
}

// x (rows, size), or (rows, heads, size) with a rotation.
Norm norm_arguments(const Tensor& x, const Tensor& weight) {
  Norm args{};
  const bool heads = x.dim() == 3;
  args.rows = x.size(0);
  args.heads = heads ? x.size(1) : 1;
  args.size = x.size(x.dim() - 1);
  args.stride = x.stride(0);
  args.number = number(x, "a norm");
  check_packets(x, args.number);
  STD_TORCH_CHECK(x.stride(x.dim() - 1) == 1 && (!heads || x.stride(1) == args.size),
                  "dflash_scale: norms take rows without gaps");
  args.x = x.const_data_ptr();
  args.weight = dense(weight, x);
  return args;
}

Pair forward(Norm args, const Tensor& x) {
  Pair results{empty_rows(x), x.dim() == 3 ? torch::stable::new_empty(x, {args.rows, args.heads}, ScalarType::Float)
                                           : torch::stable::new_empty(x, {args.rows}, ScalarType::Float)};
  args.out = out<void>(std::get<0>(results));
  args.scales = out<float>(std::get<1>(results));
  const OnDevice device(x);
  check_launch(norm_cuda(args, device.stream()), "norm");
  return results;
}

Pair backward(Norm args, const Tensor& dout, const Tensor& x, const Tensor& weight, const Tensor& scales) {
  Pair results{empty_rows(x), torch::stable::new_empty(weight, {args.size})};
  args.dout = dense(dout, x);
  args.scales = const_cast<float*>(in<float>(scales));
  args.dx = out<void>(std::get<0>(results));
  args.dweight = out<void>(std::get<1>(results));
  args.blocks = norm_blocks(args);
  const Tensor partials = torch::stable::new_empty(x, {args.blocks, args.size}, ScalarType::Float);
  args.partials = out<float>(partials);
  const OnDevice device(x);
  check_launch(norm_backward_cuda(args, device.stream()), "norm's backward");
  return results;
}

Pair rms_norm(Tensor x, Tensor weight, double eps) {
  Norm args = norm_arguments(x, weight);
  args.eps = static_cast<float>(eps);
  return forward(args, x);
}

Pair rms_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor scales) {
  return backward(norm_arguments(x, weight), dout, x, weight, scales);
}

Pair norm_rope(Tensor x, Tensor weight, Tensor cos, Tensor sin, double eps) {
  Norm args = norm_arguments(x, weight);
  args.eps = static_cast<float>(eps);
  args.rotated = true;
  args.cos = dense(cos, x);
  args.sin = dense(sin, x);
  return forward(args, x);
}

Pair norm_rope_backward(Tensor dout, Tensor x, Tensor weight, Tensor scales, Tensor cos, Tensor sin) {
  Norm args = norm_arguments(x, weight);
  args.rotated = true;
  args.cos = dense(cos, x);
  args.sin = dense(sin, x);
  return backward(args, dout, x, weight, scales);
}

SiluMul silu_arguments(const Tensor& gate, const Tensor& up) {
  SiluMul args{};
  args.rows = gate.size(0);
  args.columns = gate.size(1);
  args.gate_stride = gate.stride(0);
  args.up_stride = up.stride(0);
  args.number = number(gate, "silu_mul");
  check_packets(gate, args.number);
  check_packets(up, args.number);
  STD_TORCH_CHECK(gate.stride(1) == 1 && up.stride(1) == 1, "dflash_scale: silu_mul takes rows without gaps");
  STD_TORCH_CHECK(up.scalar_type() == gate.scalar_type(), "dflash_scale: silu_mul takes tensors of one dtype");
  args.gate = gate.const_data_ptr();
  args.up = up.const_data_ptr();
  return args;
}

Tensor silu_mul(Tensor gate, Tensor up) {
  SiluMul args = silu_arguments(gate, up);
  Tensor result = empty_rows(gate);
  args.out = out<void>(result);
  const OnDevice device(gate);
  check_launch(silu_mul_cuda(args, device.stream()), "silu_mul");
  return result;
}

Pair silu_mul_backward(Tensor dout, Tensor gate, Tensor up) {
  SiluMul args = silu_arguments(gate, up);
  Pair results{empty_rows(gate), empty_rows(up)};
  args.dout = dense(dout, gate);
  args.dgate = out<void>(std::get<0>(results));
  args.dup = out<void>(std::get<1>(results));
  const OnDevice device(gate);
  check_launch(silu_mul_backward_cuda(args, device.stream()), "silu_mul's backward");
  return results;
}
#endif

}  // namespace
}  // namespace dflash

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_scale, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor scales) -> (Tensor, Tensor)");
  m.def("norm_rope(Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)");
  m.def(
      "norm_rope_backward(Tensor dout, Tensor x, Tensor weight, Tensor scales, Tensor cos, Tensor sin) "
      "-> (Tensor, Tensor)");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

#ifdef DFLASH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash_scale, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&dflash::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&dflash::rms_norm_backward));
  m.impl("norm_rope", TORCH_BOX(&dflash::norm_rope));
  m.impl("norm_rope_backward", TORCH_BOX(&dflash::norm_rope_backward));
  m.impl("silu_mul", TORCH_BOX(&dflash::silu_mul));
  m.impl("silu_mul_backward", TORCH_BOX(&dflash::silu_mul_backward));
}
#endif
