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
// Makes a tensor's device current, and knows its stream.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "dflash_scale: this torch has no CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// error: a cudaError_t.
inline void check_launch(int error, const char* kernel) {
  STD_TORCH_CHECK(error == 0, "dflash_scale: the ", kernel, " kernel failed with cudaError ", error);
}
#endif

}  // namespace dflash
