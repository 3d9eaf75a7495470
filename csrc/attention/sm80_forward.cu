#include "attention/sm80_forward.h"
#include "attention/sm80_launch.h"

namespace dflash {

int forward_sm80(const GpuForward& args, void* stream) {
  using namespace gpu::sm80;
  return for_shape(args, [&]<Half kType, int kDim>() {
    using Traits = ForwardTraits<kType, kDim>;
    const AttentionShape& s = args.shape;
    const ForwardParameters parameters{
        Rows::of(s), args.order, args.q,    Keys{args.k_ctx, args.v_ctx, args.k_blk, args.v_blk, s.kv_heads},
        args.out,    args.lse,   s.q_heads, static_cast<float>(s.scale * kLog2E)};
    const gpu::Launch how{static_cast<int64_t>(args.items) * s.kv_heads, Traits::kThreads, Traits::kShared};
    return gpu::launch(forward<Traits>, how, parameters, stream);
  });
}

}  // namespace dflash
