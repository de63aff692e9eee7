// Metric vectors in 8 bits, with what is needed to bound the error of their products.
//
// Every vector is brought to length 1, the mean m of some of them is taken away (hidden states
// share a large part, which tells nobody apart), and what is left, c = u - m, is rounded to steps
// of its own: q in [-127, 127]. Of two vectors then
//
//   cosine(x, y) = c_x c_y + m c_y + (m c_x + m m)    the last the same for all y
//   |c_x c_y - step_x step_y q_x q_y| <= residual_x |c_y| + (|c_x| + residual_x) residual_y
//
// by Cauchy-Schwarz, residual being the length of c - step q. The sum q_x q_y is exact.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/float16.cuh"
#include "common/multiversion.h"

namespace lightvlm {

struct Int8Vector {
    float step = 0.0f;
    float length = 0.0f;    // of c
    float residual = 0.0f;  // length of c - step q
    float bias = 0.0f;      // m c
    int32_t sum = 0;        // of all q
};

// Sums over kLanes lanes, folded in a fixed order.
constexpr int kSumLanes = 64;

LIGHTVLM_INLINE float fold_lanes(float* sums) {
    for (int half = kSumLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    return sums[0];
}

// unit[i] = vector[i] * scale * inverse
template <typename T>
struct UnitVector {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const T* vector, float scale, float inverse, int64_t n,
                                    float* unit) {
        for (int64_t i = 0; i < n; ++i) unit[i] = to_float(vector[i]) * scale * inverse;
    }
};

struct AddVector {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const float* from, int64_t n, float* to) {
        for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    }
};

// unit, padded with zeros to whole lanes, becomes c; q gets its bytes. Sums have loops of their
// own: g++ keeps them in registers where nothing else is written.
struct QuantiseVector {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(float* __restrict unit, const float* __restrict mean,
                                    int64_t padded, int8_t* __restrict q, Int8Vector* vector) {
        constexpr int kLanes = 64;
        for (int64_t i = 0; i < padded; ++i) unit[i] -= mean[i];
        float squares[kLanes] = {};
        float biases[kLanes] = {};
        uint32_t largest[kLanes] = {};
        for (int64_t i = 0; i < padded; i += kLanes) {
            for (int l = 0; l < kLanes; ++l) squares[l] += unit[i + l] * unit[i + l];
            for (int l = 0; l < kLanes; ++l) biases[l] += unit[i + l] * mean[i + l];
            for (int l = 0; l < kLanes; ++l) {
                const uint32_t bits = float16_detail::float_bits(unit[i + l]) & 0x7fffffffu;
                largest[l] = bits > largest[l] ? bits : largest[l];
            }
        }
        uint32_t highest = 0;
        for (int l = 0; l < kLanes; ++l) highest = largest[l] > highest ? largest[l] : highest;
        const float step = float16_detail::float_of(highest) / 127.0f;
        const float inverse = step > 0x1p-120f ? 1.0f / step : 0.0f;
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the addition rounds to an integer
        for (int64_t i = 0; i < padded; ++i) {
            // The low byte of the rounded number's bits is the integer.
            q[i] = static_cast<int8_t>(float16_detail::float_bits(unit[i] * inverse + kRound));
        }
        float residuals[kLanes] = {};
        int32_t sums[kLanes] = {};
        for (int64_t i = 0; i < padded; i += kLanes) {
            for (int l = 0; l < kLanes; ++l) {
                const float rest = unit[i + l] - static_cast<float>(q[i + l]) * step;
                residuals[l] += rest * rest;
            }
            for (int l = 0; l < kLanes; ++l) sums[l] += q[i + l];
        }
        float square = 0.0f, residual = 0.0f, bias = 0.0f;
        int32_t sum = 0;
        for (int l = 0; l < kLanes; ++l) {
            square += squares[l];
            residual += residuals[l];
            bias += biases[l];
            sum += sums[l];
        }
        *vector = {step, sqrtf(square), sqrtf(residual), bias, sum};
    }
};

}  // namespace lightvlm
