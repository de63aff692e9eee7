// Loads and stores of a few neighbouring values at once.
#pragma once

#include "common/float16.cuh"
#include "common/host_device.h"
#include "common/launch.h"

namespace lightvlm {

template <typename T, int kVector>
struct __align__(sizeof(T) * kVector) ValueVector {
    T values[kVector];
};

// from is aligned to kVector values.
template <int kVector, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&values)[kVector]) {
    const auto loaded = *reinterpret_cast<const ValueVector<T, kVector>*>(from);
    LIGHTVLM_UNROLL
    for (int v = 0; v < kVector; ++v) values[v] = to_float(loaded.values[v]);
}

template <int kVector, typename T>
__device__ __forceinline__ void store_floats(T* to, const float (&values)[kVector]) {
    ValueVector<T, kVector> stored;
    LIGHTVLM_UNROLL
    for (int v = 0; v < kVector; ++v) stored.values[v] = from_float<T>(values[v]);
    *reinterpret_cast<ValueVector<T, kVector>*>(to) = stored;
}

template <int kVector, typename T>
__device__ __forceinline__ void copy_values(T* to, const T* from) {
    using Vector = ValueVector<T, kVector>;
    *reinterpret_cast<Vector*>(to) = *reinterpret_cast<const Vector*>(from);
}

}  // namespace lightvlm
