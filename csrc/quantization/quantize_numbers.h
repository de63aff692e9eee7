// The numbers of quantize_kv and dequantize_kv, for the kernels and the CPU twins alike. Every step
// is one IEEE operation in fp32; nothing may be contracted, or codes would differ between backends.
// Formulas: docs/kernels/quantization.md. Range arguments hold for all finite inputs below 3.3e38.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/float16.cuh"
#include "common/host_device.h"

namespace lightvlm {

constexpr float kSmallestKeyScale = 0x1p-126f;  // its inverse is a normal number
constexpr float kSmallestValue = 0x1p-100f;     // keeps value_channel and its inverse normal
constexpr float kLargestRoot = 0x1.fffffep+63f;
constexpr float kValueMargin = 2.0625f;

// A product that nvcc must not merge with the sum that takes it.
LIGHTVLM_HOST_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// low <= high, extremes of the channel. Halves first: high - low may be infinite.
LIGHTVLM_HOST_DEVICE float key_scale_of(float low, float high, float levels) {
    if (!(high > low)) return 0.0f;
    const float half = rounded_product(high, 0.5f) - rounded_product(low, 0.5f);
    const float scale = half / levels * 2.0f;
    return scale > kSmallestKeyScale ? scale : kSmallestKeyScale;
}

// What half a key, less half its zero, is multiplied with.
LIGHTVLM_HOST_DEVICE float key_inverse(float scale) { return scale > 0.0f ? 2.0f / scale : 0.0f; }

// Codes before rounding. Both are in [0, levels + 2^-14]: the extremes that scale and zero come
// from cover every entry, so no code needs a limit.
LIGHTVLM_HOST_DEVICE float key_level(float key, float half_zero, float inverse) {
    return rounded_product(rounded_product(key, 0.5f) - half_zero, inverse);
}
LIGHTVLM_HOST_DEVICE float value_level(float value, float weight, float zero, float inverse) {
    return rounded_product(rounded_product(value, weight) - zero, inverse);
}

// Rounded to the nearest even integer, for levels in [0, 2^22): floats from 2^23 on count in ones.
LIGHTVLM_HOST_DEVICE uint32_t code_of(float level) {
    return float16_detail::float_bits(level + 12582912.0f) - 0x4b400000u;
}

LIGHTVLM_HOST_DEVICE float value_root(float largest) {
    const float root = sqrtf(largest > kSmallestValue ? largest : kSmallestValue);
    return root < kLargestRoot ? root : kLargestRoot;
}

// The power of two above kValueMargin * root / levels, for the largest root of the block: a token's
// values in units of value_channel lie within +- root / factor, so its scale is at most 2 /
// kValueMargin.
LIGHTVLM_HOST_DEVICE float value_factor(float root, float levels) {
    const float spread = root * (kValueMargin / levels);
    const uint32_t exponent = float16_detail::float_bits(spread) & 0x7f800000u;
    return float16_detail::float_of(exponent + 0x00800000u);
}

// The nearest half at or below `value`, which is in the range of halves.
LIGHTVLM_HOST_DEVICE half_t half_below(float value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rd(value))};
#else
    const half_t near = from_float<half_t>(value);
    if (!(to_float(near) > value)) return near;
    constexpr uint16_t kSign = 0x8000;
    const auto magnitude = static_cast<uint16_t>(near.bits & 0x7fff);
    if ((near.bits & kSign) != 0 || magnitude == 0) {
        return {static_cast<uint16_t>(kSign | (magnitude + 1))};
    }
    return {static_cast<uint16_t>(near.bits - 1)};
#endif
}

// The nearest half at or above `value`, which is in the range of halves and not negative.
LIGHTVLM_HOST_DEVICE half_t half_above(float value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_ru(value))};
#else
    const half_t near = from_float<half_t>(value);
    return {static_cast<uint16_t>(near.bits + (to_float(near) < value ? 1 : 0))};
#endif
}

// What is stored of a token's values in one head, and what its codes are made with.
struct ValueToken {
    half_t scale;
    half_t zero;
    float zero_value;
    float inverse;
};

// low <= high, extremes over the channels.
LIGHTVLM_HOST_DEVICE ValueToken value_token_of(float low, float high, float levels) {
    ValueToken token;
    // Of -0 and 0, the latter: which of them an extreme is may depend on the order of the channels.
    token.zero = half_below(low + 0.0f);
    token.zero_value = to_float(token.zero);
    token.scale = half_above((high + 0.0f - token.zero_value) * (1.0f / levels));
    const float scale = to_float(token.scale);
    token.inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    return token;
}

// A packed entry's number, rounded once, or twice for a value.
LIGHTVLM_HOST_DEVICE float unpacked_key(float code, float scale, float zero) {
    return fmaf(scale, code, zero);
}
LIGHTVLM_HOST_DEVICE float unpacked_value(float code, float scale, float zero, float channel) {
    return channel * fmaf(scale, code, zero);
}

}  // namespace lightvlm
