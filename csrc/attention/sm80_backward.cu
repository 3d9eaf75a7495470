#include "attention/sm80_backward.h"

namespace dflash {
namespace {

// A CTA per tile of keys and kv head: the context's, heaviest first, then the blocks' own.
template <typename Traits>
int launch_key_gradient(const gpu::sm80::BackwardParameters& parameters, void* stream) {
  const int64_t context = static_cast<int64_t>(parameters.context_tiles) * (kTile / Traits::kKeys);
  const int64_t own = (parameters.rows.positions + Traits::kKeys - 1) / Traits::kKeys;
  return gpu::sm80::launch_kernel<Traits>(gpu::sm80::key_gradient<Traits>, (context + own) * parameters.keys.kv_heads,
                                          parameters, stream);
}

}  // namespace

int backward_sm80(const GpuBackward& args, void* stream) {
  using namespace gpu::sm80;
  return gpu::for_shape<64, 96, 128, 256>(args, [&]<Half kType, int kDim>() {
    const AttentionShape& s = args.shape;
    const BackwardParameters parameters{Rows::of(s),
                                        args.order,
                                        args.tile_ranges,
                                        args.tile_order,
                                        static_cast<int>((s.tokens + kTile - 1) / kTile),
                                        args.dout,
                                        args.q,
                                        args.out,
                                        Keys{args.k_ctx, args.v_ctx, args.k_blk, args.v_blk, s.kv_heads},
                                        args.lse,
                                        args.delta,
                                        args.dq,
                                        args.dk_ctx,
                                        args.dv_ctx,
                                        args.dk_blk,
                                        args.dv_blk,
                                        s.q_heads,
                                        static_cast<float>(s.scale),
                                        static_cast<float>(s.scale * gpu::kLog2E)};
    using Dq = QueryGradientTraits<kType, kDim>;
    const int64_t units = static_cast<int64_t>(args.items) * 2;
    const int error = launch_kernel<Dq>(query_gradient<Dq>, units * s.kv_heads, parameters, stream);
    if (error != 0) return error;
    if constexpr (kDim <= 128) {
      return launch_key_gradient<KeyGradientTraits<kType, kDim, true, true>>(parameters, stream);
    } else {
      using Dk = KeyGradientTraits<kType, kDim, true, false>;
      using Dv = KeyGradientTraits<kType, kDim, false, true>;
      if (const int error = launch_key_gradient<Dk>(parameters, stream); error != 0) return error;
      return launch_key_gradient<Dv>(parameters, stream);
    }
  });
}

}  // namespace dflash
