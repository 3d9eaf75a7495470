// Launches the plan's kernel.
#include "attention/plan_kernel.h"

namespace dflash {

int plan_cuda(const PlanArgs& args, void* stream) {
  const gpu::Launch how{1, gpu::kPlanThreads, gpu::plan_scratch_bytes(args.num_tokens)};
  return gpu::launch(gpu::plan_kernel, how, args, stream);
}

#ifndef DFLASH_EMULATE
// Declared in tensors.h, which needs torch; here, because this is a file that nvcc compiles.
const char* cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#endif

}  // namespace dflash
