// The length of a metric vector, by one warp. Bytes: the vector is read once, twice where it has to
// be scaled first (merge_numbers.h).
#pragma once

#include "common/block.cuh"
#include "merging/merge_numbers.h"
#include "merging/merge_vector.cuh"

namespace lightvlm {

struct VectorMeasure {
    float scale;    // metric_scale()
    float inverse;  // inverse_length() of the scaled vector; 0 for what counts as a zero vector
};

// Every lane of the warp calls it and gets the same. Vectors of kVector values are aligned.
template <int kVector, typename T>
__device__ __forceinline__ VectorMeasure measure_vector(const T* vector, int64_t width) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const auto sum_squares = [&](float scale, uint32_t* largest) {
        float sum = 0.0f;
        for (int64_t i = lane * kVector; i < width; i += kWarpThreads * kVector) {
            float values[kVector];
            load_floats<kVector>(vector + i, values);
            LIGHTVLM_UNROLL
            for (int v = 0; v < kVector; ++v) {
                *largest = max(*largest, __float_as_uint(values[v]) & 0x7fffffffu);
                const float value = values[v] * scale;
                sum += value * value;
            }
        }
        for (int step = kWarpThreads / 2; step > 0; step /= 2) {
            sum += __shfl_xor_sync(kFullWarp, sum, step);
            *largest = max(*largest, __shfl_xor_sync(kFullWarp, *largest, step));
        }
        return sum;
    };
    uint32_t largest = 0;
    float sum = sum_squares(1.0f, &largest);
    const float scale = metric_scale(__uint_as_float(largest));
    if (scale != 1.0f && scale != 0.0f) sum = sum_squares(scale, &largest);
    return {scale, scale == 0.0f ? 0.0f : inverse_length(sum)};
}

}  // namespace lightvlm
