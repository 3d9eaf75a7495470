// From the operator's arguments to launches: head dim and type become template arguments, sizes a grid.
#pragma once

#include "attention/ptx.h"
#include "attention/rows.h"

namespace dflash::gpu::sm80 {

// What a launcher answers when it cannot run the arguments; cudaErrorInvalidValue.
inline constexpr int kInvalidValue = 1;

// Calls run.operator()<kType, kDim>() for the arguments' type and head dim.
template <typename Args, typename Run>
int for_shape(const Args& args, const Run& run) {
  const AttentionShape& s = args.shape;
  // Peaks are kept of raw scores, so a scale that is not positive would turn the largest into the smallest.
  if (s.q_heads % s.kv_heads != 0 || s.q_heads / s.kv_heads > kUnitRows || s.block_size > 64 || !(s.scale > 0))
    return kInvalidValue;
  const auto with_type = [&]<Half kType>() {
    switch (s.head_dim) {
      case 64:
        return run.template operator()<kType, 64>();
      case 96:
        return run.template operator()<kType, 96>();
      case 128:
        return run.template operator()<kType, 128>();
      case 256:
        return run.template operator()<kType, 256>();
      default:
        return kInvalidValue;
    }
  };
  return args.type == Half::kBf16 ? with_type.template operator()<Half::kBf16>()
                                  : with_type.template operator()<Half::kFp16>();
}

}  // namespace dflash::gpu::sm80
