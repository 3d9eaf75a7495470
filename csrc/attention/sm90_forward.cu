// The Hopper forward: its head dims and element types.
#include "attention/sm90_forward.h"

namespace dflash {

int forward_sm90(const GpuForward& args, void* stream) {
  const bool bf16 = args.type == Half::kBf16;
  switch (args.shape.head_dim) {
    case 64:
      return bf16 ? sm90::launch_forward<64, Half::kBf16>(args, stream)
                  : sm90::launch_forward<64, Half::kFp16>(args, stream);
    case 96:
      return bf16 ? sm90::launch_forward<96, Half::kBf16>(args, stream)
                  : sm90::launch_forward<96, Half::kFp16>(args, stream);
    case 128:
      return bf16 ? sm90::launch_forward<128, Half::kBf16>(args, stream)
                  : sm90::launch_forward<128, Half::kFp16>(args, stream);
    case 256:
      return bf16 ? sm90::launch_forward<256, Half::kBf16>(args, stream)
                  : sm90::launch_forward<256, Half::kFp16>(args, stream);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace dflash
