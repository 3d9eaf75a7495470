// From the operators' tensors to the pointers and streams that kernels take.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#ifdef DFLASH_CUDA
// In libtorch_cuda only: weak, so that the library also loads in a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace dflash {

template <typename T>
const T* in(const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "dflash_scale: operators take contiguous tensors");
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* out(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

#ifdef DFLASH_CUDA
// Calls run(stream) on the tensor's device, with its current stream; run returns a cudaError_t.
template <typename Run>
void on_stream(const torch::stable::Tensor& t, const char* what, const Run& run) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "dflash_scale: this torch has no CUDA");
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  const int error = run(stream);
  STD_TORCH_CHECK(error == 0, "dflash_scale: the ", what, " kernel failed with cudaError ", error);
}
#endif

}  // namespace dflash
