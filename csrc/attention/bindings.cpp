// Registers the operators of dflash_scale::* and hands their tensors to the kernels as pointers. No logic: the Python
// layer (dflash_scale/ops/attention.py) checks what users give, and holds fake kernels and autograd.
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
using PlanTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct PlanOptions {
  int64_t block_size, window, group;
};

PlanArgs plan_args(const Tensor& anchors, const Tensor& doc_ids, const PlanOptions& options, const PlanTensors& plan) {
  const auto& [starts, ends, tile_ranges, order, tile_order] = plan;
  return {in<int32_t>(anchors),
          in<int32_t>(doc_ids),
          static_cast<int32_t>(anchors.numel()),
          static_cast<int32_t>(doc_ids.numel()),
          static_cast<int32_t>(options.block_size),
          static_cast<int32_t>(options.window),
          static_cast<int32_t>(options.group),
          out<int32_t>(starts),
          out<int32_t>(ends),
          out<int32_t>(tile_ranges),
          out<int32_t>(order),
          out<int32_t>(tile_order)};
}

PlanTensors empty_plan(const Tensor& anchors, const Tensor& doc_ids, const PlanOptions& options) {
  const int64_t count = anchors.numel(), tiles = tile_count(static_cast<int32_t>(doc_ids.numel()));
  const int64_t items = item_count(static_cast<int32_t>(count), static_cast<int32_t>(options.block_size),
                                   static_cast<int32_t>(options.group));
  const auto empty = [&](std::initializer_list<int64_t> size) { return torch::stable::new_empty(anchors, size); };
  return {empty({count}), empty({count}), empty({tiles, 2}), empty({items}), empty({tiles})};
}

PlanTensors build_plan_cpu(Tensor anchors, Tensor doc_ids, int64_t block_size, int64_t window, int64_t group) {
  const PlanOptions options{block_size, window, group};
  PlanTensors plan = empty_plan(anchors, doc_ids, options);
  plan_cpu(plan_args(anchors, doc_ids, options, plan));
  return plan;
}

// Tensors of the plan as the attention operators take them, and the options beside them.
struct PlanRefs {
  const Tensor &starts, &ends, &tile_ranges, &order, &tile_order;
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

// `kernel` names one implementation: 0 the CPU's, 80 and 90 the GPU's of that architecture.
void check_cpu_kernel(int64_t kernel) {
  STD_TORCH_CHECK(kernel == 0, "dflash_scale: kernel ", kernel, " does not take CPU tensors");
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
                                       Tensor ends, Tensor tile_ranges, Tensor order, Tensor tile_order,
                                       int64_t block_size, int64_t window, bool causal_block, double scale,
                                       int64_t kernel) {
  check_cpu_kernel(kernel);
  const PlanRefs plan{starts, ends, tile_ranges, order, tile_order, block_size, window, causal_block, scale};
  const ScalarType statistic = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor result = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, statistic);
  with_types(q, [&](auto element, auto number) {
    using T = decltype(element);
    using Acc = decltype(number);
    attention_forward_cpu<T, Acc>(shape(q, k_ctx, plan), inputs<T>(q, k_ctx, v_ctx, k_blk, v_blk),
                                  {out<T>(result), out<Acc>(lse)});
  });
  return {result, lse};
}

GradientTensors empty_gradients(const Tensor& q, const Tensor& k_ctx, const Tensor& v_ctx, const Tensor& k_blk,
                                const Tensor& v_blk) {
  return {torch::stable::empty_like(q), torch::stable::empty_like(k_ctx), torch::stable::empty_like(v_ctx),
          torch::stable::empty_like(k_blk), torch::stable::empty_like(v_blk)};
}

GradientTensors backward_cpu(Tensor dout, Tensor q, Tensor k_ctx, Tensor v_ctx, Tensor k_blk, Tensor v_blk,
                             Tensor result, Tensor lse, Tensor starts, Tensor ends, Tensor tile_ranges, Tensor order,
                             Tensor tile_order, int64_t block_size, int64_t window, bool causal_block, double scale,
                             int64_t kernel) {
  check_cpu_kernel(kernel);
  const PlanRefs plan{starts, ends, tile_ranges, order, tile_order, block_size, window, causal_block, scale};
  GradientTensors grads = empty_gradients(q, k_ctx, v_ctx, k_blk, v_blk);
  with_types(q, [&](auto element, auto number) {
    using T = decltype(element);
    using Acc = decltype(number);
    const auto& [dq, dk_ctx, dv_ctx, dk_blk, dv_blk] = grads;
    attention_backward_cpu<T, Acc>(shape(q, k_ctx, plan),
                                   {inputs<T>(q, k_ctx, v_ctx, k_blk, v_blk), in<T>(dout), in<T>(result), in<Acc>(lse)},
                                   {out<T>(dq), out<T>(dk_ctx), out<T>(dv_ctx), out<T>(dk_blk), out<T>(dv_blk)});
  });
  return grads;
}

#ifdef DFLASH_CUDA
PlanTensors build_plan_cuda(Tensor anchors, Tensor doc_ids, int64_t block_size, int64_t window, int64_t group) {
  STD_TORCH_CHECK(doc_ids.numel() <= kMaxPlanTokens, "dflash_scale: the CUDA plan takes rows of up to ", kMaxPlanTokens,
                  " tokens, got ", doc_ids.numel());
  const OnDevice device(anchors);
  const PlanOptions options{block_size, window, group};
  PlanTensors plan = empty_plan(anchors, doc_ids, options);
  check_launch(plan_cuda(plan_args(anchors, doc_ids, options, plan), device.stream()), "plan");
  return plan;
}

// The GPU kernels copy 16 bytes at a time; torch's own allocations are aligned, a view may not be.
const void* in_gpu(const Tensor& t) {
  const void* data = in<void>(t);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0,
                  "dflash_scale: the GPU kernels take tensors that start at a multiple of 16 bytes; clone this view");
  return data;
}

Half half_type(const Tensor& q, int64_t kernel) {
  STD_TORCH_CHECK(kernel == 80 || kernel == 90, "dflash_scale: kernel ", kernel, " does not take CUDA tensors");
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "dflash_scale: the GPU kernels take bfloat16 and float16");
  return dtype == ScalarType::BFloat16 ? Half::kBf16 : Half::kFp16;
}

std::tuple<Tensor, Tensor> forward_cuda(Tensor q, Tensor k_ctx, Tensor v_ctx, Tensor k_blk, Tensor v_blk, Tensor starts,
                                        Tensor ends, Tensor tile_ranges, Tensor order, Tensor tile_order,
                                        int64_t block_size, int64_t window, bool causal_block, double scale,
                                        int64_t kernel) {
  const Half type = half_type(q, kernel);
  const OnDevice device(q);
  const PlanRefs plan{starts, ends, tile_ranges, order, tile_order, block_size, window, causal_block, scale};
  Tensor result = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  const Tensor taken = torch::stable::new_empty(q, {1}, ScalarType::Int);
  if (starts.numel() == 0) return {result, lse};
  const GpuForward forward{shape(q, k_ctx, plan),
                           in<int32_t>(order),
                           static_cast<int32_t>(order.numel()),
                           type,
                           in_gpu(q),
                           in_gpu(k_ctx),
                           in_gpu(v_ctx),
                           in_gpu(k_blk),
                           in_gpu(v_blk),
                           out<void>(result),
                           out<float>(lse),
                           out<int32_t>(taken)};
  check_launch((kernel == 90 ? forward_sm90 : forward_sm80)(forward, device.stream()),
               kernel == 90 ? "sm90 forward" : "sm80 forward");
  return {result, lse};
}

GradientTensors backward_cuda(Tensor dout, Tensor q, Tensor k_ctx, Tensor v_ctx, Tensor k_blk, Tensor v_blk,
                              Tensor result, Tensor lse, Tensor starts, Tensor ends, Tensor tile_ranges, Tensor order,
                              Tensor tile_order, int64_t block_size, int64_t window, bool causal_block, double scale,
                              int64_t kernel) {
  const Half type = half_type(q, kernel);
  const OnDevice device(q);
  const PlanRefs plan{starts, ends, tile_ranges, order, tile_order, block_size, window, causal_block, scale};
  GradientTensors grads = empty_gradients(q, k_ctx, v_ctx, k_blk, v_blk);
  auto& [dq, dk_ctx, dv_ctx, dk_blk, dv_blk] = grads;
  if (starts.numel() == 0) {
    torch::stable::zero_(dk_ctx);
    torch::stable::zero_(dv_ctx);
    return grads;
  }
  const Tensor delta = torch::stable::empty_like(lse), taken = torch::stable::new_empty(q, {1}, ScalarType::Int);
  GpuBackward backward{shape(q, k_ctx, plan), in<int32_t>(order), in<int32_t>(tile_ranges), in<int32_t>(tile_order)};
  backward.items = static_cast<int32_t>(order.numel());
  backward.type = type;
  backward.dout = in_gpu(dout);
  backward.q = in_gpu(q);
  backward.k_ctx = in_gpu(k_ctx);
  backward.v_ctx = in_gpu(v_ctx);
  backward.k_blk = in_gpu(k_blk);
  backward.v_blk = in_gpu(v_blk);
  backward.out = in_gpu(result);
  backward.lse = in<float>(lse);
  backward.delta = out<float>(delta);
  backward.taken = out<int32_t>(taken);
  backward.dq = out<void>(dq);
  backward.dk_ctx = out<void>(dk_ctx);
  backward.dv_ctx = out<void>(dv_ctx);
  backward.dk_blk = out<void>(dk_blk);
  backward.dv_blk = out<void>(dv_blk);
  check_launch((kernel == 90 ? backward_sm90 : backward_sm80)(backward, device.stream()),
               kernel == 90 ? "sm90 backward" : "sm80 backward");
  return grads;
}
#endif

}  // namespace
}  // namespace dflash

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_scale, m) {
  m.def(
      "build_plan(Tensor anchors, Tensor doc_ids, int block_size, int window, int group) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "anchor_attention(Tensor q, Tensor k_ctx, Tensor v_ctx, Tensor k_blk, Tensor v_blk, Tensor starts, Tensor ends, "
      "Tensor tile_ranges, Tensor order, Tensor tile_order, int block_size, int window, bool causal_block, "
      "float scale, int kernel) -> (Tensor, Tensor)");
  m.def(
      "anchor_attention_backward(Tensor dout, Tensor q, Tensor k_ctx, Tensor v_ctx, Tensor k_blk, Tensor v_blk, "
      "Tensor out, Tensor lse, Tensor starts, Tensor ends, Tensor tile_ranges, Tensor order, Tensor tile_order, "
      "int block_size, int window, bool causal_block, float scale, int kernel) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dflash_scale, CPU, m) {
  m.impl("build_plan", TORCH_BOX(&dflash::build_plan_cpu));
  m.impl("anchor_attention", TORCH_BOX(&dflash::forward_cpu));
  m.impl("anchor_attention_backward", TORCH_BOX(&dflash::backward_cpu));
}

#ifdef DFLASH_CUDA
STABLE_TORCH_LIBRARY_IMPL(dflash_scale, CUDA, m) {
  m.impl("build_plan", TORCH_BOX(&dflash::build_plan_cuda));
  m.impl("anchor_attention", TORCH_BOX(&dflash::forward_cuda));
  m.impl("anchor_attention_backward", TORCH_BOX(&dflash::backward_cuda));
}
#endif
