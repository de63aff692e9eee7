// How an op names its implementations, once, for every backend of the build it is compiled in.
//
//   template <Backend backend>
//   void select_op(const Tensor& scores, ...) {
//       ... checks, fill params ...
//       LIGHTVLM_RUN(select, backend, scores, params);
//   }
//   LIGHTVLM_REGISTER(select, select_op)
//
// In the library this registers lightvlm::select for CPU, which calls select_cpu(params), and for
// CUDA where nvcc was there, which calls launch_select_cuda(params, stream). In the emulation build
// it registers lightvlm_emulated::select for CPU tensors, which calls the latter.
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "common/cuda_types.h"
#include "common/stream.h"

namespace lightvlm {

enum class Backend { kCpu, kCuda };

}  // namespace lightvlm

// Runs the op's implementation on the device of `tensor`, and raises what it reports.
#if LIGHTVLM_HAS_DEVICE
#define LIGHTVLM_RUN(op, backend, tensor, params)                                                \
    if constexpr ((backend) == ::lightvlm::Backend::kCpu) {                                      \
        ::lightvlm::raise_status(op##_cpu(params), #op);                                         \
    } else {                                                                                     \
        const ::lightvlm::LaunchDevice launch_device(tensor);                                    \
        ::lightvlm::check_launch(launch_##op##_cuda(params, ::lightvlm::current_stream(tensor)), \
                                 #op);                                                           \
    }
#else
#define LIGHTVLM_RUN(op, backend, tensor, params) ::lightvlm::raise_status(op##_cpu(params), #op)
#endif

#define LIGHTVLM_REGISTER_ONE(ns, key, op, function, backend)              \
    STABLE_TORCH_LIBRARY_IMPL(ns, key, m) {                                \
        m.impl(#op, TORCH_BOX((&function<::lightvlm::Backend::backend>))); \
    }

#if defined(LIGHTVLM_EMULATION)
#define LIGHTVLM_REGISTER(op, function) \
    LIGHTVLM_REGISTER_ONE(lightvlm_emulated, CPU, op, function, kCuda)
#elif defined(LIGHTVLM_WITH_CUDA)
#define LIGHTVLM_REGISTER(op, function)                      \
    LIGHTVLM_REGISTER_ONE(lightvlm, CPU, op, function, kCpu) \
    LIGHTVLM_REGISTER_ONE(lightvlm, CUDA, op, function, kCuda)
#else
#define LIGHTVLM_REGISTER(op, function) LIGHTVLM_REGISTER_ONE(lightvlm, CPU, op, function, kCpu)
#endif
