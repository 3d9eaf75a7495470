#include "pointwise/silu_kernel.h"

namespace dflash {

namespace {

// One thread per chunk, or what a launcher answers when it cannot run the arguments.
template <typename Kernel>
int launch_silu(const Kernel& kernel, const SiluMul& args, void* stream) {
  const int64_t count = args.number == Number::kFloat ? 4 : 8, chunks = args.rows * args.columns / count;
  if (args.columns % count != 0 || chunks >= int64_t{1} << 31) return gpu::kInvalidValue;
  if (chunks == 0) return 0;
  const gpu::Launch how{(chunks + gpu::kSiluThreads - 1) / gpu::kSiluThreads, gpu::kSiluThreads, 0};
  return gpu::launch(kernel, how, args, stream);
}

}  // namespace

int silu_mul_cuda(const SiluMul& args, void* stream) {
  return gpu::for_number(args.number,
                         [&]<Number kNumber>() { return launch_silu(gpu::silu_mul<kNumber>, args, stream); });
}

int silu_mul_backward_cuda(const SiluMul& args, void* stream) {
  return gpu::for_number(args.number,
                         [&]<Number kNumber>() { return launch_silu(gpu::silu_mul_backward<kNumber>, args, stream); });
}

}  // namespace dflash
