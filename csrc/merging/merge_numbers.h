// The numbers of merge_tokens, for the kernels and the CPU twin alike.
//
//   cosine  dot(dropped, kept) * inverse_length(kept), fp32; the dropped token's own length is the
//           same for all and drops out of the comparison.
//   merge   (w_c x_c + sum w_i x_i) / (w_c + sum w_i), each product and each sum rounded to fp32.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace lightvlm {

// 2^exponent, for exponents in [-149, 127]; beyond, the nearest of them.
LIGHTVLM_HOST_DEVICE float power_of_two(int32_t exponent) {
    exponent = exponent < -149 ? -149 : (exponent > 127 ? 127 : exponent);
    const uint32_t bits =
        exponent < -126 ? 1u << (exponent + 149) : static_cast<uint32_t>(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// floor(log2(value)) for value > 0; -127 for subnormal values.
LIGHTVLM_HOST_DEVICE int32_t exponent_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return static_cast<int32_t>(bits >> 23) - 127;
}

// What a metric vector with this largest magnitude is multiplied with before anything else, so that
// squares stay in range: 1 nearly always, otherwise a power of two. 0 for a zero vector and for
// one with NaN or infinity: they have cosine 0 to all.
LIGHTVLM_HOST_DEVICE float metric_scale(float largest) {
    if (!(largest > 0.0f) || !(largest <= FLT_MAX)) return 0.0f;
    constexpr int32_t kSafe = 40;
    const int32_t exponent = exponent_of(largest);
    return exponent >= -kSafe && exponent <= kSafe ? 1.0f : power_of_two(-exponent);
}

LIGHTVLM_HOST_DEVICE float inverse_length(float sum_of_squares) {
    return sum_of_squares > 0.0f ? 1.0f / sqrtf(sum_of_squares) : 0.0f;
}

LIGHTVLM_HOST_DEVICE bool is_weight(float weight) { return weight >= 0.0f && weight <= FLT_MAX; }

// A power of two that brings the sum of `count` weights, the highest of them > 0 given, to at most
// 1: no sum overflows, and a power of two changes no rounding.
LIGHTVLM_HOST_DEVICE float weight_scale(float highest, int64_t count) {
    int32_t bits = 0;
    while ((int64_t{1} << bits) < count) ++bits;
    return power_of_two(-(exponent_of(highest) + 1 + bits));
}

}  // namespace lightvlm
