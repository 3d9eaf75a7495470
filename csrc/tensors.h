// From the operators' tensors to the pointers and streams that kernels take.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#ifdef DFLASH_CUDA
#include <dlfcn.h>
#endif

#include "number.h"

namespace dflash {

inline Number number(const torch::stable::Tensor& t, const char* op) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = t.scalar_type();
  if (dtype == ScalarType::Float) return Number::kFloat;
  if (dtype == ScalarType::BFloat16) return Number::kBf16;
  STD_TORCH_CHECK(dtype == ScalarType::Half, "dflash_scale: ", op, " takes float32, bfloat16 and float16");
  return Number::kFp16;
}

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
// What a cudaError_t means (attention/plan.cu).
const char* cuda_error(int error);

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// torch's current stream on a device. The function is in libtorch_cuda, which a CPU-only torch has not, and which
// Python loads where neither the linker nor a weak reference from here would find it.
inline CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(
        dlsym(library != nullptr ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  return found;
}

// Makes a tensor's device current, and knows its stream.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(current_stream() != nullptr, "dflash_scale: this torch has no CUDA");
    STD_TORCH_CHECK(current_stream()(t.get_device_index(), &stream_) == 0, "dflash_scale: torch names no CUDA stream");
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// error: a cudaError_t.
inline void check_launch(int error, const char* kernel) {
  STD_TORCH_CHECK(error == 0, "dflash_scale: the ", kernel, " kernel failed: ", cuda_error(error), " (", error, ")");
}
#endif

}  // namespace dflash
