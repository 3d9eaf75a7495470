#include "attention/sm90_dkv.h"
#include "attention/sm90_dq.h"

namespace dflash {

int backward_sm90(const GpuBackward& args, void* stream) {
  return gpu::for_shape<64, 96, 128>(args, [&]<Half kType, int kDim>() {
    const int error = gpu::sm90::launch_dq<kDim, kType>(args, stream);
    return error != 0 ? error : gpu::sm90::launch_dkv<kDim, kType>(args, stream);
  });
}

}  // namespace dflash

#ifdef DFLASH_WATCHDOG
DFLASH_EXPORT_STUCK(backward)
#endif
