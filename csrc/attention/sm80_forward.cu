#include "attention/sm80_forward.h"

namespace dflash {

int forward_sm80(const GpuForward& args, void* stream) {
  using namespace gpu::sm80;
  return gpu::for_shape<64, 96, 128, 256>(args, [&]<Half kType, int kDim>() {
    using Traits = ForwardTraits<kType, kDim>;
    const AttentionShape& s = args.shape;
    const ForwardParameters parameters{
        Rows::of(s), args.order, args.q,    Keys{args.k_ctx, args.v_ctx, args.k_blk, args.v_blk, s.kv_heads},
        args.out,    args.lse,   s.q_heads, static_cast<float>(s.scale * gpu::kLog2E)};
    return launch_kernel<Traits>(forward<Traits>, static_cast<int64_t>(args.items) * s.kv_heads, parameters, stream);
  });
}

}  // namespace dflash
