// The numbers of merge_tokens and merge_pairs, for the kernels and the CPU twins alike.
//
//   cosine  dot(dropped, kept) * inverse_length(kept), fp32; the dropped token's own length is the
//           same for all and drops out of the comparison. merge_pairs multiplies it in afterwards.
//   merge   (w_c x_c + sum w_i x_i) / (w_c + sum w_i), each product and each sum rounded to fp32.
//
// What is subnormal is told by its bits: threads of one process may differ in whether they flush
// such numbers to zero, and no result may depend on the thread.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"
#include "selection/score_order.h"

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
// squares stay in range: 1 nearly always, otherwise a power of two. 0 for a zero vector, for one of
// subnormal values only, and for one with NaN or infinity: they have cosine 0 to all.
LIGHTVLM_HOST_DEVICE float metric_scale(float largest) {
    constexpr int32_t kSafe = 40;
    const int32_t exponent = exponent_of(largest);
    if (exponent == -127 || exponent == 128) return 0.0f;
    if (exponent >= -kSafe && exponent <= kSafe) return 1.0f;
    return power_of_two(exponent < 126 ? -exponent : -126);  // 2^-127 would be subnormal
}

// The score of a key that score_key() (selection/score_order.h) has made of a number.
LIGHTVLM_HOST_DEVICE float key_score(uint32_t key) {
    const uint32_t bits = key >= kKeyZero ? key - kKeyZero : (kKeyZero - key) | 0x80000000u;
    float score;
    memcpy(&score, &bits, sizeof(score));
    return score;
}

LIGHTVLM_HOST_DEVICE float inverse_length(float sum_of_squares) {
    return sum_of_squares > 0.0f ? 1.0f / sqrtf(sum_of_squares) : 0.0f;
}

LIGHTVLM_HOST_DEVICE uint32_t weight_bits(float weight) {
    uint32_t bits;
    memcpy(&bits, &weight, sizeof(bits));
    return bits == 0x80000000u ? 0u : bits;  // -0 is 0
}

// Finite and not negative.
LIGHTVLM_HOST_DEVICE bool is_weight(float weight) { return weight_bits(weight) < 0x7f800000u; }

// Whether a token of this weight changes anything.
LIGHTVLM_HOST_DEVICE bool weighs(float weight) {
    return is_weight(weight) && weight_bits(weight) != 0;
}

// The power of two (its exponent) that brings the sum of `count` weights, the highest of them > 0
// given, to at most 1: no sum overflows, and a power of two changes no rounding.
LIGHTVLM_HOST_DEVICE int32_t weight_exponent(float highest, int64_t count) {
    int32_t bits = 0;
    while ((int64_t{1} << bits) < count) ++bits;
    return -(exponent_of(highest) + 1 + bits);
}

// weight * 2^exponent, which is at most 1; 0 where that would be subnormal.
LIGHTVLM_HOST_DEVICE float scaled_weight(float weight, int32_t exponent) {
    const uint32_t bits = weight_bits(weight);
    float value = weight;
    int32_t shift = exponent;
    if (bits < 0x00800000u) {  // bits * 2^-149
        value = static_cast<float>(static_cast<int32_t>(bits));
        shift -= 149;
    }
    if (bits == 0 || exponent_of(value) + shift < -126) return 0.0f;
    uint32_t scaled;
    memcpy(&scaled, &value, sizeof(scaled));
    scaled += static_cast<uint32_t>(shift) << 23;
    memcpy(&value, &scaled, sizeof(value));
    return value;
}

// What a sum of weights scaled by 2^exponent is divided by: at least eps.
LIGHTVLM_HOST_DEVICE float weight_divisor(float total, double eps, int32_t exponent) {
    if (!(eps > 0.0)) return total;
    const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
    double power;
    memcpy(&power, &bits, sizeof(power));
    const double scaled = eps * power;
    const float least = scaled < FLT_MAX ? static_cast<float>(scaled) : FLT_MAX;
    return total > least ? total : least;
}

}  // namespace lightvlm
