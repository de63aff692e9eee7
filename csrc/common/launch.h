// What every kernel and launcher includes for CUDA: on a GPU build cuda_runtime.h, in an emulation
// build (-DLIGHTVLM_EMULATION) the header that runs the same source on the CPU. It holds the
// project's only launch and the only way to shared memory.
#pragma once

#ifdef LIGHTVLM_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>
#include <math_constants.h>
#endif

#include <climits>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

namespace lightvlm {

// The block's dynamic shared memory, aligned to 128 bytes, as one struct (of arrays) per kernel.
// The launch must have given at least sizeof(T) bytes. Uninitialised.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
#ifdef LIGHTVLM_EMULATION
    return static_cast<T*>(emulation::shared_memory(sizeof(T), alignof(T)));
#else
    static_assert(alignof(T) <= 128, "dynamic shared memory is aligned to 128 bytes");
    extern __shared__ __align__(128) unsigned char lightvlm_shared_memory[];
    return reinterpret_cast<T*>(lightvlm_shared_memory);
#endif
}

// A grid out of 64-bit sizes. A size that does not fit becomes one that launch() refuses; zero
// stays zero.
inline dim3 make_grid(int64_t x, int64_t y = 1, int64_t z = 1) {
    const auto dimension = [](int64_t size) {
        return size < 0 || size > INT_MAX ? UINT_MAX : static_cast<unsigned>(size);
    };
    return dim3(dimension(x), dimension(y), dimension(z));
}

// Runs `kernel` on `stream` and returns the launch's own error. No block is no launch: a grid with
// a zero dimension is cudaSuccess. More than 48 KiB of shared memory is opted in to here.
//   cudaErrorInvalidConfiguration: a grid or block dimension beyond what any device has.
//   cudaErrorInvalidValue: more shared memory than the device has.
//   cudaErrorLaunchFailure (emulation): the kernel did something wrong; cudaGetErrorString says
//   what.
template <typename... K, typename... A>
cudaError_t launch(const char* name, void (*kernel)(K...), dim3 grid, dim3 block,
                   size_t shared_bytes, cudaStream_t stream, A&&... args) {
    static_assert(sizeof...(K) == sizeof...(A), "launch: as many arguments as the kernel has");
    constexpr unsigned kMaxGridX = INT_MAX;
    constexpr unsigned kMaxGridYZ = 65535;
    constexpr unsigned kMaxBlockXY = 1024;
    constexpr unsigned kMaxBlockZ = 64;
    constexpr uint64_t kMaxBlockThreads = 1024;
    if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ || block.x == 0 ||
        block.y == 0 || block.z == 0 || block.x > kMaxBlockXY || block.y > kMaxBlockXY ||
        block.z > kMaxBlockZ || uint64_t{block.x} * block.y * block.z > kMaxBlockThreads) {
        return cudaErrorInvalidConfiguration;
    }
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef LIGHTVLM_EMULATION
    static_cast<void>(stream);
    if (shared_bytes > emulation::kMaxSharedBytes) return cudaErrorInvalidValue;
    struct Call {
        void (*kernel)(K...);
        std::tuple<K...> arguments;
    } call{kernel, std::tuple<K...>(std::forward<A>(args)...)};
    const auto body = [](void* opaque) {
        auto* made = static_cast<Call*>(opaque);
        std::apply(made->kernel, made->arguments);
    };
    return emulation::run(name, grid, block, shared_bytes, body, &call);
#else
    static_cast<void>(name);
    constexpr size_t kSharedWithoutOptIn = 48 * 1024;
    if (shared_bytes > INT_MAX) return cudaErrorInvalidValue;
    if (shared_bytes > kSharedWithoutOptIn) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes));
        if (error != cudaSuccess) {
            static_cast<void>(cudaGetLastError());  // Reported here, not by whoever asks next.
            return error;
        }
    }
    // clang-format off: it takes a header for C++ and splits the closing chevrons.
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<K>(std::forward<A>(args))...);
    // clang-format on
    return cudaGetLastError();
#endif
}

}  // namespace lightvlm
