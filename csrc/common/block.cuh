// Block-wide reductions, scans and ranks. Every thread of the block calls them; the result is the
// same in each thread, and the scratch may be reused as soon as the call returns.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace lightvlm {

constexpr int kWarpThreads = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

// combine must be associative and commutative: integers, or min and max.
template <int kThreads, typename T, typename Combine>
__device__ T block_reduce(T value, T* scratch, Combine combine) {
    constexpr int kWarps = kThreads / kWarpThreads;
    for (int step = kWarpThreads / 2; step > 0; step /= 2) {
        value = combine(value, __shfl_xor_sync(kFullWarp, value, step));
    }
    if (threadIdx.x % kWarpThreads == 0) scratch[threadIdx.x / kWarpThreads] = value;
    __syncthreads();
    value = scratch[0];
    for (int warp = 1; warp < kWarps; ++warp) value = combine(value, scratch[warp]);
    __syncthreads();
    return value;
}

// Sum of the values of the threads before this one; total gets the sum over the block.
template <int kThreads, typename T>
__device__ T block_exclusive_sum(T value, T* scratch, T* total) {
    constexpr int kWarps = kThreads / kWarpThreads;
    const int lane = threadIdx.x % kWarpThreads;
    const int warp = threadIdx.x / kWarpThreads;
    T inclusive = value;
    for (int step = 1; step < kWarpThreads; step *= 2) {
        const T other = __shfl_up_sync(kFullWarp, inclusive, step);
        if (lane >= step) inclusive += other;
    }
    if (lane == kWarpThreads - 1) scratch[warp] = inclusive;
    __syncthreads();
    T before = 0;
    T sum = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w == warp) before = sum;
        sum += scratch[w];
    }
    __syncthreads();
    *total = sum;
    return before + inclusive - value;
}

// How many threads before this one have the flag set; total counts the block's.
template <int kThreads>
__device__ uint32_t block_rank(bool flag, uint32_t* scratch, uint32_t* total) {
    constexpr int kWarps = kThreads / kWarpThreads;
    const int lane = threadIdx.x % kWarpThreads;
    const int warp = threadIdx.x / kWarpThreads;
    const uint32_t votes = __ballot_sync(kFullWarp, flag);
    if (lane == 0) scratch[warp] = __popc(votes);
    __syncthreads();
    uint32_t before = 0;
    uint32_t sum = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w == warp) before = sum;
        sum += scratch[w];
    }
    __syncthreads();
    *total = sum;
    return before + __popc(votes & ((1u << lane) - 1u));
}

}  // namespace lightvlm
