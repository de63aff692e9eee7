// The pool of select_diverse: of all tokens, those with the highest upper bounds, and what the
// others do not exceed.
//
// Any pool gives the right choices that holds the token with the highest bound. This one holds all
// tokens from a threshold on, found on a grid that is fine near the highest key and coarse far from
// it (eighths of powers of two), and fills up from the grid's next step in the order of the tokens.
#pragma once

#include "common/block.cuh"
#include "selection/score_order.h"

namespace lightvlm {

// Orders by key, then by lower index; 0: no token.
__device__ __forceinline__ unsigned long long choice_key(uint32_t key, uint32_t i) {
    if (key == kKeyNone) return 0;
    return static_cast<unsigned long long>(key) << 32 | (0xffffffffu - i);
}

__device__ __forceinline__ unsigned long long warp_highest(unsigned long long key) {
    for (int step = kWarpThreads / 2; step > 0; step /= 2) {
        const unsigned long long other = __shfl_xor_sync(kFullWarp, key, step);
        key = other > key ? other : key;
    }
    return key;
}

constexpr int kPoolSteps = 240;

// The lowest key of a step of the grid below `top`.
__device__ __forceinline__ uint32_t pool_step_key(uint32_t top, int step) {
    const unsigned long long distance =
        step < 8 ? step : ((8ull + step % 8 + 1) << (step / 8 - 1)) - 1;
    return distance < top ? top - static_cast<uint32_t>(distance) : 1u;
}

template <int kThreads, int kPool>
struct PoolShared {
    unsigned long long outside[kThreads / kWarpThreads];  // the highest of each warp's others
    unsigned long long sums[kThreads / kWarpThreads];
    uint32_t tops[kThreads / kWarpThreads];
    uint32_t counts[8];  // of the steps of the search
    int32_t token[kPool];
};

// keys[begin, end) are those of all tokens, kKeyNone for one that is not free. shared.token gets
// the pool; returns its size, 0 where nothing is free. A barrier has to follow before shared is
// read.
template <int kThreads, int kPool>
__device__ int fill_pool(const uint32_t* keys, uint32_t begin, uint32_t end,
                         PoolShared<kThreads, kPool>& shared) {
    constexpr int kWarps = kThreads / kWarpThreads;
    const int lane = threadIdx.x % kWarpThreads;
    const int warp = threadIdx.x / kWarpThreads;
    // A thread owns neighbours, so that the order of the threads is that of the tokens: an odd
    // number, so that the threads of a warp read different banks.
    const uint32_t each = (end - begin + kThreads - 1) / kThreads | 1;
    const uint32_t own_begin = begin + threadIdx.x * each;
    const uint32_t own_end = own_begin + each < end ? own_begin + each : end;

    uint32_t top = kKeyNone;
    for (uint32_t i = own_begin; i < own_end; ++i) top = keys[i] > top ? keys[i] : top;
    top = __reduce_max_sync(kFullWarp, top);
    if (lane == 0) shared.tops[warp] = top;
    if (threadIdx.x < 8) shared.counts[threadIdx.x] = 0;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) top = shared.tops[w] > top ? shared.tops[w] : top;
    if (top == kKeyNone) return 0;

    // The first step that holds more than the pool, kPoolSteps where none does.
    int low = 0;
    int high = kPoolSteps;
    uint32_t above = 0;  // tokens from the step before it on
    for (int turn = 0; low < high; ++turn) {
        const int step = (low + high) / 2;
        const uint32_t bound = pool_step_key(top, step);
        uint32_t found = 0;
        for (uint32_t i = own_begin; i < own_end; ++i) found += keys[i] >= bound ? 1 : 0;
        found = __reduce_add_sync(kFullWarp, found);
        if (lane == 0 && found > 0) atomicAdd(&shared.counts[turn], found);
        __syncthreads();
        found = shared.counts[turn];
        if (found > kPool) {
            high = step;
        } else {
            low = step + 1;
            above = found;
        }
    }
    const uint32_t surely = low > 0 ? pool_step_key(top, low - 1) : top + 1;
    const uint32_t perhaps = low < kPoolSteps ? pool_step_key(top, low) : 1u;

    // Slots in the order of the tokens, the sure ones first.
    unsigned long long own = 0;  // the sure ones, and in the upper half the others
    for (uint32_t i = own_begin; i < own_end; ++i) {
        if (keys[i] >= surely) {
            own += 1;
        } else if (keys[i] >= perhaps) {
            own += 1ull << 32;
        }
    }
    unsigned long long total;
    const unsigned long long before = block_exclusive_sum<kThreads>(own, shared.sums, &total);
    uint32_t slot = static_cast<uint32_t>(before);
    uint32_t next = above + static_cast<uint32_t>(before >> 32);
    unsigned long long outside = 0;
    for (uint32_t i = own_begin; i < own_end; ++i) {
        const uint32_t key = keys[i];
        if (key >= surely) {
            shared.token[slot++] = static_cast<int32_t>(i);
        } else if (key >= perhaps && next < kPool) {
            shared.token[next++] = static_cast<int32_t>(i);
        } else {
            const unsigned long long other = choice_key(key, i);
            outside = other > outside ? other : outside;
        }
    }
    outside = warp_highest(outside);
    if (lane == 0) shared.outside[warp] = outside;
    const uint32_t count = above + static_cast<uint32_t>(total >> 32);
    return count < kPool ? static_cast<int>(count) : kPool;
}

}  // namespace lightvlm
