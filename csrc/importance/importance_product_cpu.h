// Tile product of the CPU twin of importance: logits of kTargetGroup targets against 16 or 32
// probes, in registers. Probes lie across the lanes of vectors, so that what follows (softmax,
// masks) is vertical too; a target's numbers are broadcast.
#pragma once

#include <cstdint>

#include "common/multiversion.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lightvlm::importance_detail {

constexpr int kTargetGroup = 12;
// Floats between two targets: above kImportanceMaxWidth, and no multiple of the cache's way size.
constexpr int64_t kTargetPitch = 272;

// out[i][lane] = sum over d of targets[i * kTargetPitch + d] * probes[d * kLanes + lane], in
// ascending d. All of out's kTargetGroup rows are written.
#if defined(__x86_64__)

// 24 sums, 2 rows of probes: 26 of 32 registers.
template <int kLanes>
LIGHTVLM_TARGET_AVX512 void product_avx512(const float* probes, const float* targets, int64_t width,
                                           float* out) {
    constexpr int kVectors = kLanes / 16;
    __m512 sums[kTargetGroup][kVectors];
    for (int i = 0; i < kTargetGroup; ++i) {
        for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < width; ++d) {
        __m512 probe[kVectors];
        for (int v = 0; v < kVectors; ++v) probe[v] = _mm512_load_ps(probes + d * kLanes + 16 * v);
        for (int i = 0; i < kTargetGroup; ++i) {
            const __m512 target = _mm512_set1_ps(targets[i * kTargetPitch + d]);
            for (int v = 0; v < kVectors; ++v) {
                sums[i][v] = _mm512_fmadd_ps(target, probe[v], sums[i][v]);
            }
        }
    }
    for (int i = 0; i < kTargetGroup; ++i) {
        for (int v = 0; v < kVectors; ++v) {
            _mm512_store_ps(out + i * kLanes + 16 * v, sums[i][v]);
        }
    }
}

// 16 probes against 6 targets at a time: 12 sums, 2 rows of probes: 15 of 16 registers.
template <int kLanes>
LIGHTVLM_TARGET_AVX2 void product_avx2(const float* probes, const float* targets, int64_t width,
                                       float* out) {
    constexpr int kHalf = kTargetGroup / 2;
    for (int first = 0; first < kTargetGroup; first += kHalf) {
        for (int lane = 0; lane < kLanes; lane += 16) {
            __m256 sums[kHalf][2];
            for (int i = 0; i < kHalf; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_ps();
            for (int64_t d = 0; d < width; ++d) {
                const __m256 low = _mm256_load_ps(probes + d * kLanes + lane);
                const __m256 high = _mm256_load_ps(probes + d * kLanes + lane + 8);
                for (int i = 0; i < kHalf; ++i) {
                    const __m256 target = _mm256_set1_ps(targets[(first + i) * kTargetPitch + d]);
                    sums[i][0] = _mm256_fmadd_ps(target, low, sums[i][0]);
                    sums[i][1] = _mm256_fmadd_ps(target, high, sums[i][1]);
                }
            }
            for (int i = 0; i < kHalf; ++i) {
                float* row = out + (first + i) * kLanes + lane;
                _mm256_store_ps(row, sums[i][0]);
                _mm256_store_ps(row + 8, sums[i][1]);
            }
        }
    }
}

#endif

// 16 probes against 3 targets at a time: 12 sums of 4 lanes, of 16 registers.
template <int kLanes>
void product_portable(const float* probes, const float* targets, int64_t width, float* out) {
    constexpr int kFew = 3;
    constexpr int kSome = 16;
    for (int first = 0; first < kTargetGroup; first += kFew) {
        for (int begin = 0; begin < kLanes; begin += kSome) {
            float sums[kFew][kSome] = {};
            for (int64_t d = 0; d < width; ++d) {
                const float* probe = probes + d * kLanes + begin;
                for (int i = 0; i < kFew; ++i) {
                    const float target = targets[(first + i) * kTargetPitch + d];
                    for (int lane = 0; lane < kSome; ++lane) sums[i][lane] += target * probe[lane];
                }
            }
            for (int i = 0; i < kFew; ++i) {
                float* row = out + (first + i) * kLanes + begin;
                for (int lane = 0; lane < kSome; ++lane) row[lane] = sums[i][lane];
            }
        }
    }
}

template <CpuLevel level, int kLanes>
LIGHTVLM_INLINE void product(const float* probes, const float* targets, int64_t width, float* out) {
#if defined(__x86_64__)
    if constexpr (level == CpuLevel::kAvx512) {
        product_avx512<kLanes>(probes, targets, width, out);
        return;
    } else if constexpr (level == CpuLevel::kAvx2) {
        product_avx2<kLanes>(probes, targets, width, out);
        return;
    }
#endif
    product_portable<kLanes>(probes, targets, width, out);
}

}  // namespace lightvlm::importance_detail
