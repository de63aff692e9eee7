// Unit vectors and their cosines on the CPU, in tiles of 16 dot products.
//
// A dot product runs over 16 lanes, lane l summing the channels l, l + 16, ...; then lane l adds
// lane l + 8, l + 4, l + 2, l + 1. The order is the same at every CPU level and in every tile, so
// neither changes a bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "common/x86_intrinsics.h"
#include "selection/diverse_value.h"

namespace lightvlm {

// Channels are padded to this.
constexpr int64_t kCosineLanes = 16;

LIGHTVLM_INLINE float unit_dot(const float* x, const float* y, int64_t padded) {
    float sums[kCosineLanes] = {};
    for (int64_t c = 0; c < padded; c += kCosineLanes) {
#pragma GCC unroll 16
        for (int64_t l = 0; l < kCosineLanes; ++l) sums[l] += x[c + l] * y[c + l];
    }
    for (int64_t half = kCosineLanes / 2; half > 0; half /= 2) {
        for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    return sums[0];
}

// unit[0, padded): the unit vector of x, zeros where x has no direction and past channels.
template <typename T>
struct UnitVector {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const T* x, int64_t channels, float* unit, int64_t padded) {
        uint32_t largest = 0;  // as bits, where NaN is above infinity
        for (int64_t c = 0; c < channels; ++c) {
            unit[c] = to_float(x[c]);
            uint32_t bits;
            std::memcpy(&bits, unit + c, sizeof(bits));
            bits &= 0x7fffffffu;
            largest = bits > largest ? bits : largest;
        }
        for (int64_t c = channels; c < padded; ++c) unit[c] = 0.0f;
        float magnitude;
        std::memcpy(&magnitude, &largest, sizeof(magnitude));
        const float scale = diverse_scale(magnitude);
        if (scale == 0.0f) {
            std::memset(unit, 0, padded * sizeof(float));
            return;
        }
        for (int64_t c = 0; c < padded; ++c) unit[c] *= scale;
        const float inverse_norm = 1.0f / std::sqrt(unit_dot(unit, unit, padded));
        for (int64_t c = 0; c < padded; ++c) unit[c] *= inverse_norm;
    }
};

#if defined(__x86_64__)

namespace avx512 {

// Lane i of the result: the sum of sums[i], folded as said above. A step folds each register to
// half its lanes and packs two into one.
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE __m512 fold_sums(const __m512 (&sums)[16]) {
    __m512 eight[8];
    __m512 four[4];
    __m512 two[2];
    // Lanes l and l + 8: register i holds dots i and i + 8 afterwards.
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[i], sums[i + 8], 0x44),
                                 _mm512_shuffle_f32x4(sums[i], sums[i + 8], 0xee));
    }
    // Lanes l and l + 4, in quarters: dots i, i + 4, i + 8, i + 12, still in the order 0 8 4 12.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(eight[i], eight[i + 4], 0x88),
                                _mm512_shuffle_f32x4(eight[i], eight[i + 4], 0xdd));
    }
    // Lanes l and l + 2, then l and l + 1, within the quarters.
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        two[i] = _mm512_add_ps(_mm512_shuffle_ps(four[i], four[i + 2], 0x44),
                               _mm512_shuffle_ps(four[i], four[i + 2], 0xee));
    }
    const __m512 one = _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88),
                                     _mm512_shuffle_ps(two[0], two[1], 0xdd));
    // Quarter q holds dots 8 (q % 2) + 4 (q / 2) + (0, 2, 1, 3).
    return _mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15), one);
}

// Dots of kX vectors with 16 / kX others: lane i * 16 / kX + j for x[i] and y[j].
template <int kX>
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE __m512 dot_tile(const float* const (&x)[kX],
                                                       const float* const (&y)[16 / kX],
                                                       int64_t padded) {
    constexpr int kY = 16 / kX;
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < padded; c += 16) {
        __m512 own[kX];
#pragma GCC unroll 4
        for (int i = 0; i < kX; ++i) own[i] = _mm512_loadu_ps(x[i] + c);
#pragma GCC unroll 16
        for (int j = 0; j < kY; ++j) {
            const __m512 other = _mm512_loadu_ps(y[j] + c);
#pragma GCC unroll 4
            for (int i = 0; i < kX; ++i) {
                sums[i * kY + j] = _mm512_add_ps(sums[i * kY + j], _mm512_mul_ps(own[i], other));
            }
        }
    }
    return fold_sums(sums);
}

LIGHTVLM_TARGET_AVX512 inline void cosine_row(const float* units, int64_t padded, int32_t one,
                                              const int32_t* others, int64_t count,
                                              float* cosines) {
    const float* const x[1] = {units + one * padded};
    for (int64_t k = 0; k < count; k += 16) {
        const float* y[16];
        for (int j = 0; j < 16; ++j) {
            y[j] = units + others[std::min<int64_t>(k + j, count - 1)] * padded;
        }
        const int64_t left = std::min<int64_t>(16, count - k);
        _mm512_mask_storeu_ps(cosines + k, static_cast<__mmask16>((1u << left) - 1u),
                              dot_tile<1>(x, y, padded));
    }
}

LIGHTVLM_TARGET_AVX512 inline void largest_of_4x4(const float* const (&x)[4],
                                                  const float* const (&y)[4], int64_t padded,
                                                  float* largest) {
    __m512 dots = dot_tile<4>(x, y, padded);
    dots = _mm512_max_ps(dots, _mm512_permute_ps(dots, 0xb1));
    dots = _mm512_max_ps(dots, _mm512_permute_ps(dots, 0x4e));
    const __m128 four = _mm512_castps512_ps128(_mm512_permutexvar_ps(
        _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), dots));
    _mm_storeu_ps(largest, _mm_max_ps(_mm_loadu_ps(largest), four));
}

}  // namespace avx512

#endif

// cosines[k] of the unit vectors `one` and others[k], k < count.
struct CosineRow {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const float* units, int64_t padded, int32_t one,
                                    const int32_t* others, int64_t count, float* cosines) {
#if defined(__x86_64__)
        if constexpr (level == CpuLevel::kAvx512) {
            avx512::cosine_row(units, padded, one, others, count, cosines);
            return;
        }
#endif
        for (int64_t k = 0; k < count; ++k) {
            cosines[k] = unit_dot(units + one * padded, units + others[k] * padded, padded);
        }
    }
};

// largest[i] = max(largest[i], cosines of the unit vectors tokens[i] and choices[seen[i], count)),
// i < tokens_count. It may also look at choices that a token has seen. Choices are the outer loop:
// each comes from memory once, the tokens stay in the cache.
struct LargestCosines {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const float* units, int64_t padded, const int32_t* tokens,
                                    const int32_t* seen, int64_t tokens_count,
                                    const int32_t* choices, int64_t count, float* largest) {
        int64_t first = count;
        for (int64_t i = 0; i < tokens_count; ++i) first = std::min<int64_t>(first, seen[i]);
        for (int64_t c = first; c < count; c += 4) {
            const float* y[4];
            for (int64_t j = 0; j < 4; ++j) {
                y[j] = units + choices[std::min(c + j, count - 1)] * padded;
            }
            for (int64_t i = 0; i < tokens_count; i += 4) {
                const int64_t here = std::min<int64_t>(4, tokens_count - i);
                bool stale = false;
                for (int64_t k = 0; k < here; ++k) stale |= seen[i + k] < c + 4;
                if (!stale) continue;
                const float* x[4];
                float four[4];
                for (int64_t k = 0; k < 4; ++k) {
                    x[k] = units + tokens[i + std::min(k, here - 1)] * padded;
                    four[k] = largest[i + std::min(k, here - 1)];
                }
                tile<level>(x, y, padded, four);
                for (int64_t k = 0; k < here; ++k) largest[i + k] = four[k];
            }
        }
    }

  private:
    template <CpuLevel level>
    static LIGHTVLM_INLINE void tile(const float* const (&x)[4], const float* const (&y)[4],
                                     int64_t padded, float* largest) {
#if defined(__x86_64__)
        if constexpr (level == CpuLevel::kAvx512) {
            avx512::largest_of_4x4(x, y, padded, largest);
            return;
        }
#endif
        for (int64_t k = 0; k < 4; ++k) {
            for (int64_t j = 0; j < 4; ++j) {
                largest[k] = std::max(largest[k], unit_dot(x[k], y[j], padded));
            }
        }
    }
};

}  // namespace lightvlm
