// The 16-bit floating-point types, the same on every side: device code, emulated kernels and the
// CPU twins. Values are stored in them and computed with in fp32:
//     float x = to_float(row[i]);   row[i] = from_float<T>(x);      T in {float, half_t,
//     bfloat16_t}
// Conversions to 16 bits round to nearest even; too large becomes infinity, a NaN stays a NaN.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "common/host_device.h"

namespace lightvlm {

struct half_t {  // IEEE binary16: 1 sign, 5 exponent, 10 fraction bits
    uint16_t bits;
};

struct bfloat16_t {  // 1 sign, 8 exponent, 7 fraction bits: the upper half of a float
    uint16_t bits;
};

static_assert(sizeof(half_t) == 2 && sizeof(bfloat16_t) == 2);

namespace float16_detail {

LIGHTVLM_HOST_DEVICE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

LIGHTVLM_HOST_DEVICE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

}  // namespace float16_detail

LIGHTVLM_HOST_DEVICE float to_float(float value) { return value; }

LIGHTVLM_HOST_DEVICE float to_float(bfloat16_t value) {
    return float16_detail::float_of(static_cast<uint32_t>(value.bits) << 16);
}

LIGHTVLM_HOST_DEVICE float to_float(half_t value) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(value.bits));
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    // Normal numbers, with the exponent's bias changed from 15 to 127; infinity and NaN have the
    // highest exponent in both formats.
    uint32_t bits = (magnitude << 13) + ((127u - 15u) << 23);
    bits = magnitude >= 0x7c00u ? bits + ((127u - 15u) << 23) : bits;
    // Subnormal numbers count in units of 2^-24. No float subnormal on the way, so
    // flush-to-zero modes change nothing.
    const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    bits = magnitude < 0x0400u ? float16_detail::float_bits(subnormal) : bits;
    return float16_detail::float_of(bits | sign);
#endif
}

template <typename T>
LIGHTVLM_HOST_DEVICE T from_float(float value);

template <>
LIGHTVLM_HOST_DEVICE float from_float<float>(float value) {
    return value;
}

template <>
LIGHTVLM_HOST_DEVICE bfloat16_t from_float<bfloat16_t>(float value) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t bits = float16_detail::float_bits(value);
    // Half a unit of the last kept place, less one bit on even numbers so that ties go to even.
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
#endif
}

template <>
LIGHTVLM_HOST_DEVICE half_t from_float<half_t>(float value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = float16_detail::float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal results: bias 127 to 15, ties to even; a carry out of the fraction does the rest.
    const uint32_t normal =
        (magnitude - ((127u - 15u) << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results (below 2^-14): a float in [0.5, 1) has steps of 2^-24, as they do, so the
    // addition itself rounds.
    const uint32_t subnormal =
        float16_detail::float_bits(float16_detail::float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x47800000u ? 0x7c00u : result;  // From 2^16 on: infinity
    result = magnitude > 0x7f800000u ? 0x7e00u : result;   // NaN
    return {static_cast<uint16_t>(result | sign)};
#endif
}

}  // namespace lightvlm
