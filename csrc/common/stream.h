// The current CUDA stream, and the check of a launch. The only file that names the stream shim.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "common/cuda_types.h"

#if defined(LIGHTVLM_WITH_CUDA) && !defined(LIGHTVLM_EMULATION)
// Lives in libtorch_cuda.so. Weak, so that the library also loads beside a CPU-only torch, where
// it stays null; linking libtorch.so (which pulls libtorch_cuda.so in) resolves it elsewhere.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace lightvlm {

#if LIGHTVLM_HAS_DEVICE

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
#if defined(LIGHTVLM_EMULATION)
    (void)tensor;
    return cudaStream_t{};
#else
    if (aoti_torch_get_current_cuda_stream == nullptr) {
        throw std::runtime_error("lightvlm: this torch has no CUDA, but a CUDA tensor was given");
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
#endif
}

inline void check_launch(cudaError_t status, const char* op) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string(op) +
                             ": CUDA launch failed: " + cudaGetErrorString(status));
}

// Makes the tensor's device current for the launch.
class LaunchDevice {
  public:
#if defined(LIGHTVLM_EMULATION)
    explicit LaunchDevice(const torch::stable::Tensor&) {}
#else
    explicit LaunchDevice(const torch::stable::Tensor& tensor)
        : guard_(tensor.get_device_index()) {}

  private:
    torch::stable::accelerator::DeviceGuard guard_;
#endif
};

#endif  // LIGHTVLM_HAS_DEVICE

}  // namespace lightvlm
