// Softmax of a span, in units of log2, before it is known what the other spans have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "decode_attention/decode_span_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace lightvlm::decode_detail {

// 2^r for |r| <= 1/2 with a relative error of about 1e-7: Taylor's polynomial.
constexpr float kExp2[] = {1.0f,          6.9314718e-1f, 2.4022651e-1f, 5.5504109e-2f,
                           9.6181291e-3f, 1.3333558e-3f, 1.5403530e-4f};

// 2^x for x <= 0; 0 below -126 where floats become subnormal, NaN for NaN. Plain arithmetic, so
// that it vectorises.
LIGHTVLM_INLINE float exp2_of_negative(float x) {
    constexpr float kLow = -126.0f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const bool too_low = x < kLow;
    x = too_low ? kLow : x;
    const float shifted = x + kRound;
    const float r = x - (shifted - kRound);
    float y = kExp2[6];
    for (int i = 5; i >= 0; --i) y = y * r + kExp2[i];
    const uint32_t power = (float16_detail::float_bits(shifted) - 0x4b400000u + 127u) << 23;
    return too_low ? 0.0f : y * float16_detail::float_of(power);
}

// p = 2^(s - highest) in the place of s, for one head; tokens past the span's get 0, up to a
// multiple of 32. Scores that are all -inf have a sum of 0; a NaN among them makes it NaN.
LIGHTVLM_INLINE void softmax_row(float* s, int padded, float* highest, float* sum) {
    constexpr int kLanes = 16;
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    float most[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) most[lane] = kHidden;
    for (int n = 0; n < padded; n += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            most[lane] = s[n + lane] > most[lane] ? s[n + lane] : most[lane];
        }
    }
    float top = most[0];
    for (int lane = 1; lane < kLanes; ++lane) top = most[lane] > top ? most[lane] : top;
    *highest = top;
    // -inf - 0 gives 2^-inf = 0, where -inf - -inf would be NaN.
    const float shift = top > kHidden ? top : 0.0f;
    float total[kLanes] = {};
    for (int n = 0; n < padded; n += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float p = exp2_of_negative(s[n + lane] - shift);
            s[n + lane] = p;
            total[lane] += p;
        }
    }
    *sum = fold_lanes(total);
}

#if defined(__x86_64__)

// The same, eight at a time.
LIGHTVLM_TARGET_AVX2 inline void softmax_row_avx2(float* s, int padded, float* highest,
                                                  float* sum) {
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    __m256 most = _mm256_set1_ps(kHidden);
    // Of max's operands the second wins where one is a NaN.
    for (int n = 0; n < padded; n += 8) most = _mm256_max_ps(_mm256_loadu_ps(s + n), most);
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, most);
    const float top = *std::max_element(lanes, lanes + 8);
    *highest = top;
    const __m256 shift = _mm256_set1_ps(top > kHidden ? top : 0.0f);
    const __m256 low = _mm256_set1_ps(-126.0f);
    __m256 total = _mm256_setzero_ps();
    for (int n = 0; n < padded; n += 8) {
        const __m256 x = _mm256_sub_ps(_mm256_loadu_ps(s + n), shift);
        const __m256 too_low = _mm256_cmp_ps(x, low, _CMP_LT_OQ);
        const __m256i whole = _mm256_cvtps_epi32(_mm256_max_ps(low, x));
        const __m256 r = _mm256_sub_ps(x, _mm256_cvtepi32_ps(whole));
        __m256 y = _mm256_set1_ps(kExp2[6]);
        for (int i = 5; i >= 0; --i) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(kExp2[i]));
        // A NaN in y stays one, whatever the power is.
        const __m256i power =
            _mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23);
        y = _mm256_mul_ps(y, _mm256_castsi256_ps(power));
        y = _mm256_andnot_ps(too_low, y);
        _mm256_storeu_ps(s + n, y);
        total = _mm256_add_ps(total, y);
    }
    _mm256_store_ps(lanes, total);
    for (int half = 4; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    *sum = lanes[0];
}

// The same with the instructions that AVX-512 has for it; no need to keep off subnormal numbers.
LIGHTVLM_TARGET_AVX512 inline void softmax_row_avx512(float* s, int padded, float* highest,
                                                      float* sum) {
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    __m512 most = _mm512_set1_ps(kHidden);
    // Of max's operands the second wins where one is a NaN.
    for (int n = 0; n < padded; n += 16) most = _mm512_max_ps(_mm512_loadu_ps(s + n), most);
    const float top = _mm512_reduce_max_ps(most);
    *highest = top;
    const __m512 shift = _mm512_set1_ps(top > kHidden ? top : 0.0f);
    const __m512 low = _mm512_set1_ps(-200.0f);
    __m512 total = _mm512_setzero_ps();
    for (int n = 0; n < padded; n += 16) {
        __m512 x = _mm512_sub_ps(_mm512_loadu_ps(s + n), shift);
        x = _mm512_max_ps(low, x);
        const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
        const __m512 r = _mm512_sub_ps(x, whole);
        __m512 y = _mm512_set1_ps(kExp2[6]);
        for (int i = 5; i >= 0; --i) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(kExp2[i]));
        y = _mm512_scalef_ps(y, whole);
        _mm512_storeu_ps(s + n, y);
        total = _mm512_add_ps(total, y);
    }
    *sum = _mm512_reduce_add_ps(total);
}

#endif

struct SpanSoftmax {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(int heads, int tokens, float* scores, float* highest,
                                    float* sum) {
        const int padded = (tokens + 31) / 32 * 32;
        for (int h = 0; h < heads; ++h) {
            float* s = scores + h * kScorePitch;
            for (int n = tokens; n < padded; ++n) s[n] = -std::numeric_limits<float>::infinity();
#if defined(__x86_64__)
            if constexpr (level >= CpuLevel::kAvx512) {
                softmax_row_avx512(s, padded, highest + h, sum + h);
                continue;
            }
            if constexpr (level == CpuLevel::kAvx2) {
                softmax_row_avx2(s, padded, highest + h, sum + h);
                continue;
            }
#endif
            softmax_row(s, padded, highest + h, sum + h);
        }
    }
};

}  // namespace lightvlm::decode_detail

#if defined(__x86_64__)
#pragma GCC diagnostic pop
#endif
