// The numbers of select_diverse, for the kernel and the CPU twin alike.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace lightvlm {

// max(score, 0), NaN as 0 and +inf as the largest float.
LIGHTVLM_HOST_DEVICE float diverse_worth(float score) {
    if (!(score > 0.0f)) return 0.0f;
    return score < FLT_MAX ? score : FLT_MAX;
}

// Never rises as `nearest` does, so the value of a token that has not been compared with the
// latest choices is an upper bound of what it will be.
LIGHTVLM_HOST_DEVICE float diverse_value(float worth, float strength, float nearest) {
    return worth * (1.0f - strength * nearest);
}

// A power of two that brings a vector with this largest magnitude near 1, so that its squares stay
// in range; 0 for a zero vector, and for one with NaN or infinity, which then resemble nothing.
LIGHTVLM_HOST_DEVICE float diverse_scale(float largest) {
    if (!(largest > 0.0f) || !(largest <= FLT_MAX)) return 0.0f;
    uint32_t bits;
    memcpy(&bits, &largest, sizeof(bits));
    // 2^-e for largest = 1.f * 2^e; subnormal largest: 2^126.
    int32_t exponent = static_cast<int32_t>(bits >> 23);
    exponent = exponent < 1 ? 1 : (exponent > 253 ? 253 : exponent);
    const uint32_t scale_bits = static_cast<uint32_t>(254 - exponent) << 23;
    float scale;
    memcpy(&scale, &scale_bits, sizeof(scale));
    return scale;
}

}  // namespace lightvlm
