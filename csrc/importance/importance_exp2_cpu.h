// 2^x of the CPU twin of importance: relative error 1.6e-7 at most.
//
// x = n + r with n an integer and |r| <= 1/2; 2^r is 1 + r q(r), q of degree 4 and minimax for the
// relative error (9.2e-8 before rounding); 2^n is an exponent.
#pragma once

#include <cstdint>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "common/x86_intrinsics.h"

namespace lightvlm::importance_detail {

constexpr float kExp2[5] = {0.693147f, 0.24022242f, 0.055507336f, 0.009671513f, 0.0013264727f};

// 2^(x - low) for a `low` that may be lost in x's rounding; 0 below 2^-126, where floats become
// subnormal; infinity and NaN as std::exp2. Plain arithmetic, so that it vectorises.
LIGHTVLM_INLINE float exponential2(float x, float low) {
    constexpr float kLow = -126.0f;
    constexpr float kHigh = 129.0f;        // infinite
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const bool too_low = x < kLow;
    x = x > kHigh ? kHigh : x;
    x = too_low ? kLow : x;
    const float shifted = x + kRound;
    const float r = x - (shifted - kRound) - low;
    float y = kExp2[4];
    for (int i = 3; i >= 0; --i) y = y * r + kExp2[i];
    y = y * r + 1.0f;
    // 2^n in two steps: 2^128 is no float, but y * 2^127 * 2 may be one.
    const int32_t power = static_cast<int32_t>(float16_detail::float_bits(shifted) - 0x4b400000u);
    const int32_t half = power >> 1;
    const float first = float16_detail::float_of(static_cast<uint32_t>(half + 127) << 23);
    const float second = float16_detail::float_of(static_cast<uint32_t>(power - half + 127) << 23);
    return too_low ? 0.0f : y * first * second;
}

#if defined(__x86_64__)

// The same, but down to the least subnormal. vscalefps has the right answer for every n, also for
// an infinite one with a NaN from r.
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE __m512 exponential2_avx512(__m512 x, __m512 low) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(_mm512_sub_ps(x, n), low);
    __m512 y = _mm512_set1_ps(kExp2[4]);
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExp2[3]));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExp2[2]));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExp2[1]));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExp2[0]));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

#endif

// As torch's max: a NaN wins.
LIGHTVLM_INLINE float maximum(float a, float b) { return a > b || a != a ? a : b; }

}  // namespace lightvlm::importance_detail
