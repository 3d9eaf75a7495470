#include "attention/sm90_forward.h"

namespace dflash {

int forward_sm90(const GpuForward& args, void* stream) {
  return gpu::for_shape<64, 96, 128>(
      args, [&]<Half kType, int kDim>() { return gpu::sm90::launch_forward<kDim, kType>(args, stream); });
}

}  // namespace dflash

#ifdef DFLASH_WATCHDOG
DFLASH_EXPORT_STUCK(forward)
#endif
