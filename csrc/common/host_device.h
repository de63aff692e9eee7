// Marks small functions that kernels and CPU twins share; g++ without CUDA knows no qualifiers.
#pragma once

#if defined(__CUDACC__)
#define LIGHTVLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LIGHTVLM_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Before a loop over an array that has to stay in registers; g++ does not know nvcc's pragma.
// _BY: that many rounds at once, 1 being none, where more would only take registers.
#if defined(__CUDACC__)
#define LIGHTVLM_PRAGMA(text) _Pragma(#text)
#define LIGHTVLM_UNROLL _Pragma("unroll")
#define LIGHTVLM_UNROLL_BY(rounds) LIGHTVLM_PRAGMA(unroll rounds)
#else
#define LIGHTVLM_UNROLL
#define LIGHTVLM_UNROLL_BY(rounds)
#endif
