// From the operator's arguments to template arguments, for the GPU kernels' launchers.
#pragma once

#include "attention/ptx.h"
#include "attention/rows.h"

namespace dflash::gpu {

// Calls run.operator()<kType, kDim>() for the arguments' type and their head dim, one of kDims.
template <int... kDims, typename Args, typename Run>
int for_shape(const Args& args, const Run& run) {
  const AttentionShape& s = args.shape;
  // Peaks are kept of raw scores, so a scale that is not positive would turn the largest into the smallest.
  if (s.q_heads % s.kv_heads != 0 || s.q_heads / s.kv_heads > kUnitRows || s.block_size > 64 || !(s.scale > 0))
    return kInvalidValue;
  // `Divisor` is exact up to here.
  if (s.anchors * s.block_size * (s.q_heads / s.kv_heads) >= int64_t{1} << 26) return kInvalidValue;
  const auto with_type = [&]<Half kType>() {
    int error = kInvalidValue;
    ((s.head_dim == kDims ? void(error = run.template operator()<kType, kDims>()) : void()), ...);
    return error;
  };
  return args.type == Half::kBf16 ? with_type.template operator()<Half::kBf16>()
                                  : with_type.template operator()<Half::kFp16>();
}

}  // namespace dflash::gpu
