// CPU twin of importance: a target's masses lie across the 16 lanes of a vector, and are folded in
// an order that depends on the lane alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "importance/importance_exp2_cpu.h"
#include "importance/importance_panel_cpu.h"

namespace lightvlm::importance_detail {

#if defined(__x86_64__)

template <bool kMax>
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE __m512 fold_avx512(__m512 a, __m512 b) {
    if constexpr (!kMax) return _mm512_add_ps(a, b);
    // As maximum(): vmaxps gives its second operand where one is a NaN.
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), is_nan, a);
}

// scores[i] = fold of mass[i * 16 .. i * 16 + 15] for 16 targets: each step folds two halves of
// what is left, and puts two vectors together.
template <bool kMax>
LIGHTVLM_TARGET_AVX512 void fold_lanes_avx512(const float* mass, float* scores) {
    __m512 pair[8];
    __m512 four[4];
    __m512 eight[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 a = _mm512_load_ps(mass + 2 * i * kLanes);
        const __m512 b = _mm512_load_ps(mass + (2 * i + 1) * kLanes);
        pair[i] = fold_avx512<kMax>(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pair[2 * i]);
        const __m512d b = _mm512_castps_pd(pair[2 * i + 1]);
        four[i] = fold_avx512<kMax>(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m512 a = four[2 * i];
        const __m512 b = four[2 * i + 1];
        eight[i] =
            fold_avx512<kMax>(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    const __m512 all = fold_avx512<kMax>(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88),
                                         _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
    _mm512_storeu_ps(scores, all);
}

#endif

// scores[i] for i < count of mass, which has room for a multiple of 16 targets.
template <CpuLevel level>
LIGHTVLM_INLINE void fold_lanes(const float* mass, int64_t count, bool use_max, float* scores) {
    for (int64_t begin = 0; begin < count; begin += kLanes) {
        const float* from = mass + begin * kLanes;
        alignas(64) float folded[kLanes];
#if defined(__x86_64__)
        if constexpr (level >= CpuLevel::kAvx512) {
            if (use_max) {
                fold_lanes_avx512<true>(from, folded);
            } else {
                fold_lanes_avx512<false>(from, folded);
            }
            std::memcpy(scores + begin, folded,
                        std::min<int64_t>(kLanes, count - begin) * sizeof(float));
            continue;
        }
#endif
        for (int i = 0; i < kLanes; ++i) {
            float lane[kLanes];
            std::memcpy(lane, from + i * kLanes, sizeof(lane));
            for (int half = kLanes / 2; half > 0; half /= 2) {
                for (int l = 0; l < half; ++l) {
                    lane[l] = use_max ? maximum(lane[l], lane[l + half]) : lane[l] + lane[l + half];
                }
            }
            folded[i] = lane[0];
        }
        std::memcpy(scores + begin, folded,
                    std::min<int64_t>(kLanes, count - begin) * sizeof(float));
    }
}

}  // namespace lightvlm::importance_detail
