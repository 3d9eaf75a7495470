// Registers the operators of dflash_scale::* and hands their tensors to the kernels as pointers. No logic: the Python
// layer (dflash_scale/attention.py) checks what users give, and holds fake kernels and autograd.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "attention/attention.h"
#include "attention/plan.h"
#include "tensors.h"

namespace dflash {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using PlanTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

PlanArgs plan_args(const Tensor& anchors, const Tensor& doc_ids, int64_t window, const PlanTensors& plan) {
  const auto& [starts, ends, tile_ranges, order] = plan;
  return {in<int32_t>(anchors),
          in<int32_t>(doc_ids),
          static_cast<int32_t>(anchors.numel()),
          static_cast<int32_t>(doc_ids.numel()),
          static_cast<int32_t>(window),
          out<int32_t>(starts),
          out<int32_t>(ends),
          out<int32_t>(tile_ranges),
          out<int32_t>(order)};
}

PlanTensors empty_plan(const Tensor& anchors, const Tensor& doc_ids) {
  const int64_t count = anchors.numel(), tiles = (doc_ids.numel() + kTile - 1) / kTile;
  return {torch::stable::new_empty(anchors, {count}), torch::stable::new_empty(anchors, {count}),
          torch::stable::new_empty(anchors, {tiles, 2}), torch::stable::new_empty(anchors, {count})};
}

PlanTensors build_plan_cpu(Tensor anchors, Tensor doc_ids, int64_t window) {
  PlanTensors plan = empty_plan(anchors, doc_ids);
  plan_cpu(plan_args(anchors, doc_ids, window, plan));
  return plan;
}

#ifdef DFLASH_CUDA
PlanTensors build_plan_cuda(Tensor anchors, Tensor doc_ids, int64_t window) {
  STD_TORCH_CHECK(doc_ids.numel() <= kMaxPlanTokens, "dflash_scale: the CUDA plan takes rows of up to ", kMaxPlanTokens,
                  " tokens, got ", doc_ids.numel());
  PlanTensors plan = empty_plan(anchors, doc_ids);
  const PlanArgs args = plan_args(anchors, doc_ids, window, plan);
  on_stream(anchors, "plan", [&](void* stream) { return plan_cuda(args, stream); });
  return plan;
}
#endif

// Tensors of the plan as the attention operators take them. The CPU kernels find their tiles from the intervals; the
// tile ranges and the work order are for the GPU's.
struct PlanRefs {
  const Tensor& starts;
  const Tensor& ends;
  int64_t block_size, window;
  bool causal_block;
  double scale;
};

AttentionShape shape(const Tensor& q, const Tensor& k_ctx, const PlanRefs& plan) {
  return {k_ctx.size(0),
          plan.starts.numel(),
          static_cast<int>(plan.block_size),
          static_cast<int>(q.size(1)),
          static_cast<int>(k_ctx.size(1)),
          static_cast<int>(q.size(2)),
          static_cast<int>(plan.window),
          plan.causal_block,
          plan.scale,
          in<int32_t>(plan.starts),
          in<int32_t>(plan.ends)};
}

// Calls run(element, statistic) with the C++ types of a tensor's dtype.
template <typename Run>
void with_types(const Tensor& q, const Run& run) {
  const ScalarType dtype = q.scalar_type();
  if (dtype == ScalarType::Float) return run(float{}, float{});
  if (dtype == ScalarType::BFloat16) return run(Bf16{}, float{});
  STD_TORCH_CHECK(dtype == ScalarType::Double, "dflash_scale: the CPU kernels take float32, bfloat16 and float64");
  run(double{}, double{});
}

template <typename T>
AttentionInputs<T> inputs(const Tensor& q, const Tensor& k_ctx, const Tensor& v_ctx, const Tensor& k_blk,
                          const Tensor& v_blk) {
  return {in<T>(q), in<T>(k_ctx), in<T>(v_ctx), in<T>(k_blk), in<T>(v_blk)};
}

std::tuple<Tensor, Tensor> forward_cpu(Tensor q, Tensor k_ctx, Tensor v_ctx, Tensor k_blk, Tensor v_blk, Tensor starts,
                                       Tensor ends, Tensor, Tensor, int64_t block_size, int64_t window,
                                       bool causal_block, double scale) {
  const ScalarType statistic = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor result = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, statistic);
  with_types(q, [&](auto element, auto number) {
    using T = decltype(element);
    using Acc = decltype(number);
    attention_forward_cpu<T, Acc>(shape(q, k_ctx, {starts, ends, block_size, window, causal_block, scale}),
                                  inputs<T>(q, k_ctx, v_ctx, k_blk, v_blk), {out<T>(result), out<Acc>(lse)});
  });
  return {result, lse};
}

GradientTensors backward_cpu(Tensor dout, Tensor q, Tensor k_ctx, Tensor v_ctx, Tensor k_blk, Tensor v_blk,
                             Tensor result, Tensor lse, Tensor starts, Tensor ends, Tensor, Tensor, int64_t block_size,
                             int64_t window, bool causal_block, double scale) {
  GradientTensors grads{torch::stable::empty_like(q), torch::stable::empty_like(k_ctx),
                        torch::stable::empty_like(v_ctx), torch::stable::empty_like(k_blk),
                        torch::stable::empty_like(v_blk)};
  with_types(q, [&](auto element, auto number) {
    using T = decltype(element);
    using Acc = decltype(number);
    const auto& [dq, dk_ctx, dv_ctx, dk_blk, dv_blk] = grads;
    attention_backward_cpu<T, Acc>(shape(q, k_ctx, {starts, ends, block_size, window, causal_block, scale}),
                                   {inputs<T>(q, k_ctx, v_ctx, k_blk, v_blk), in<T>(dout), in<T>(result), in<Acc>(lse)},
                                   {out<T>(dq), out<T>(dk_ctx), out<T>(dv_ctx), out<T>(dk_blk), out<T>(dv_blk)});
  });
  return grads;
}

}  // namespace
}  // namespace dflash

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_scale, m) {
  m.def("build_plan(Tensor anchors, Tensor doc_ids, int window) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "anchor_attention(Tensor q, Tensor k_ctx, Tensor v_ctx, Tensor k_blk, Tensor v_blk, Tensor starts, Tensor ends, "
      "Tensor tile_ranges, Tensor order, int block_size, int window, bool causal_block, float scale) "
      "-> (Tensor, Tensor)");
  m.def(
      "anchor_attention_backward(Tensor dout, Tensor q, Tensor k_ctx, Tensor v_ctx, Tensor k_blk, Tensor v_blk, "
      "Tensor out, Tensor lse, Tensor starts, Tensor ends, Tensor tile_ranges, Tensor order, int block_size, "
      "int window, bool causal_block, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_scale, CPU, m) {
  m.impl("build_plan", TORCH_BOX(&dflash::build_plan_cpu));
  m.impl("anchor_attention", TORCH_BOX(&dflash::forward_cpu));
  m.impl("anchor_attention_backward", TORCH_BOX(&dflash::backward_cpu));
}

#ifdef DFLASH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash_scale, CUDA, m) { m.impl("build_plan", TORCH_BOX(&dflash::build_plan_cuda)); }
#endif
