#include "attention/sm80_launch.h"

namespace dflash {

int forward_sm80(const GpuForward& args, void* stream) { return gpu::sm80::launch_forward(args, stream); }

}  // namespace dflash
