// The Hopper backward: its head dims and element types.
#include "attention/sm90_dkv.h"

namespace dflash {

int backward_sm90(const GpuBackward& args, void* stream) {
  const bool bf16 = args.type == Half::kBf16;
  switch (args.shape.head_dim) {
    case 64:
      return bf16 ? sm90::launch_backward<64, Half::kBf16>(args, stream)
                  : sm90::launch_backward<64, Half::kFp16>(args, stream);
    case 96:
      return bf16 ? sm90::launch_backward<96, Half::kBf16>(args, stream)
                  : sm90::launch_backward<96, Half::kFp16>(args, stream);
    case 128:
      return bf16 ? sm90::launch_backward<128, Half::kBf16>(args, stream)
                  : sm90::launch_backward<128, Half::kFp16>(args, stream);
    case 256:
      // Two accumulators of 64 x 256 do not fit a warpgroup's registers.
      return backward_sm80(args, stream);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace dflash
