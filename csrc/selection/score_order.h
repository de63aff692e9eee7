// The order of scores and the fixed point of their mass, for the kernel and the CPU twin alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace lightvlm {

// Unsigned keys that order as scores do: higher first, -0 equal to +0, NaN and -inf last. No score
// has key 0, so 0 can stand for "no candidate".
constexpr uint32_t kKeyNone = 0;
constexpr uint32_t kKeyLowest = 0x00800000u;    // -inf and NaN
constexpr uint32_t kKeyZero = 0x80000000u;      // +0 and -0
constexpr uint32_t kKeyInfinity = 0xff800000u;  // +inf

LIGHTVLM_HOST_DEVICE uint32_t score_key(float score) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof(bits));
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t key = (bits >> 31) ? kKeyZero - magnitude : kKeyZero + magnitude;
    return magnitude > 0x7f800000u ? kKeyLowest : key;
}

// The score of a key above kKeyZero.
LIGHTVLM_HOST_DEVICE float positive_key_score(uint32_t key) {
    const uint32_t bits = key - kKeyZero;
    float score;
    memcpy(&score, &bits, sizeof(score));
    return score;
}

// Mass sums are uint64 fixed point relative to the highest score: integer addition makes them
// independent of order and backend. 2^40 * 2^23 tokens stays below 2^63.
constexpr double kMassScale = 1099511627776.0;  // 2^40
constexpr int64_t kMassMaxTokens = int64_t{1} << 23;

// round(score * 2^40 / highest), ties to even, for 0 < score <= highest; others weigh nothing.
// Adding 2^52 makes the double addition itself round to an integer, on any backend.
LIGHTVLM_HOST_DEVICE uint64_t fixed_mass(float score, double highest) {
    const double scaled = score > 0.0f ? static_cast<double>(score) * kMassScale / highest : 0.0;
    const double shifted = scaled + 4503599627370496.0;  // 2^52
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    return bits & 0x000fffffffffffffull;
}

// The sum to reach: mass * total, rounded up; all of it at mass 1 whatever the rounding.
LIGHTVLM_HOST_DEVICE uint64_t mass_target(double mass, uint64_t total) {
    if (mass >= 1.0) return total;
    const uint64_t target = static_cast<uint64_t>(ceil(mass * static_cast<double>(total)));
    return target < total ? target : total;
}

}  // namespace lightvlm
