#include "loss/softmax_kernel.h"

namespace dflash {

namespace {

template <Number kNumber>
int launch_softmax(const SoftmaxLoss& args, void* stream) {
  const int threads = args.vocabulary >= gpu::kLongRow ? gpu::kLongRowThreads : gpu::kShortRowThreads;
  const gpu::Launch how{args.rows, threads, sizeof(gpu::SoftmaxShared)};
  return args.verifier != nullptr ? gpu::launch(gpu::softmax_loss<kNumber, true>, how, args, stream)
                                  : gpu::launch(gpu::softmax_loss<kNumber, false>, how, args, stream);
}

}  // namespace

int softmax_loss_cuda(const SoftmaxLoss& args, void* stream) {
  if (args.rows == 0) return 0;
  return gpu::for_number(args.number, [&]<Number kNumber>() { return launch_softmax<kNumber>(args, stream); });
}

}  // namespace dflash
