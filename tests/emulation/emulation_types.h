// What nvcc predefines and cuda_runtime.h declares, as far as the kernels and their launchers use
// it: qualifiers, built-in vector types, index variables, error codes and the few host calls.
// Included through emulation.h only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// nvcc knows `#pragma unroll`; g++ unrolls as it sees fit.
#pragma GCC diagnostic ignored "-Wunknown-pragmas"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

// Shared memory has guard bytes and is poisoned only where it comes from lightvlm::shared_memory().
#define __shared__ error_use_lightvlm_shared_memory_from_launch_h

#define LIGHTVLM_VECTOR_TYPES(type, name, align2, align4)                       \
    struct alignas(align2) name##2 { type x, y; };                              \
    struct name##3 { type x, y, z; };                                           \
    struct alignas(align4) name##4 { type x, y, z, w; };                        \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

// Alignments as in the CUDA programming guide's table of built-in vector types.
LIGHTVLM_VECTOR_TYPES(signed char, char, 2, 4)
LIGHTVLM_VECTOR_TYPES(unsigned char, uchar, 2, 4)
LIGHTVLM_VECTOR_TYPES(short, short, 4, 8)
LIGHTVLM_VECTOR_TYPES(unsigned short, ushort, 4, 8)
LIGHTVLM_VECTOR_TYPES(int, int, 8, 16)
LIGHTVLM_VECTOR_TYPES(unsigned int, uint, 8, 16)
LIGHTVLM_VECTOR_TYPES(long long, longlong, 16, 16)
LIGHTVLM_VECTOR_TYPES(unsigned long long, ulonglong, 16, 16)
LIGHTVLM_VECTOR_TYPES(float, float, 8, 16)
LIGHTVLM_VECTOR_TYPES(double, double, 16, 16)
#undef LIGHTVLM_VECTOR_TYPES

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Rewritten at every fiber switch; a kernel only reads them.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

typedef struct CUstream_st* cudaStream_t;

enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
};
typedef enum cudaError cudaError_t;

// For cudaErrorLaunchFailure: what the emulator found, with kernel, block and place.
const char* cudaGetErrorString(cudaError_t error);

// The launches before it have finished and have returned their own errors.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
    std::memset(pointer, value, bytes);
    return cudaSuccess;
}

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
