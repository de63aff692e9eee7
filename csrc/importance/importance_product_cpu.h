// Tile product of the CPU twin of importance: kTargetGroup targets against the lanes of a panel
// (importance_panel_cpu.h), a sum for each in a register: a target's unit is broadcast, a panel's
// row of units loaded. AVX-512 hands the registers to what follows; the other levels store them.
#pragma once

#include <cstdint>

#include "common/multiversion.h"
#include "importance/importance_panel_cpu.h"

namespace lightvlm::importance_detail {

#if defined(__x86_64__)

// 24 sums, 2 rows of probes: 26 of 32 registers. finish(sums) is inlined.
template <int kVectors, typename Finish>
LIGHTVLM_TARGET_AVX512 void product_avx512(const uint32_t* panel, const uint32_t* group,
                                           int64_t units, const Finish& finish) {
    __m512 sums[kTargetGroup][kVectors];
    for (int i = 0; i < kTargetGroup; ++i) {
        for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_setzero_ps();
    }
    for (int64_t u = 0; u < units; ++u, panel += kVectors * kLanes) {
        __m512 probe[kVectors];
        for (int v = 0; v < kVectors; ++v) probe[v] = _mm512_loadu_ps(panel + kLanes * v);
        for (int i = 0; i < kTargetGroup; ++i) {
            const __m512 target =
                _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(group[i * kUnitPitch + u])));
            for (int v = 0; v < kVectors; ++v) {
                sums[i][v] = _mm512_fmadd_ps(target, probe[v], sums[i][v]);
            }
        }
    }
    finish(sums);
}

// The same for units that are pairs.
template <int kVectors, typename Finish>
LIGHTVLM_TARGET_AVX512_BF16 void product_avx512_bf16(const uint32_t* panel, const uint32_t* group,
                                                     int64_t units, const Finish& finish) {
    __m512 sums[kTargetGroup][kVectors];
    for (int i = 0; i < kTargetGroup; ++i) {
        for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_setzero_ps();
    }
    for (int64_t u = 0; u < units; ++u, panel += kVectors * kLanes) {
        __m512bh probe[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            probe[v] = (__m512bh)_mm512_loadu_si512(panel + kLanes * v);
        }
        for (int i = 0; i < kTargetGroup; ++i) {
            const auto target =
                (__m512bh)_mm512_set1_epi32(static_cast<int>(group[i * kUnitPitch + u]));
            for (int v = 0; v < kVectors; ++v) {
                sums[i][v] = _mm512_dpbf16_ps(sums[i][v], target, probe[v]);
            }
        }
    }
    finish(sums);
}

// 16 probes against 6 targets at a time: 12 sums, 2 rows of probes: 15 of 16 registers.
LIGHTVLM_TARGET_AVX2 inline void product_avx2(const float* panel, const float* group, int lanes,
                                              int64_t units, float* out) {
    constexpr int kHalf = kTargetGroup / 2;
    for (int first = 0; first < kTargetGroup; first += kHalf) {
        for (int lane = 0; lane < lanes; lane += 16) {
            __m256 sums[kHalf][2];
            for (int i = 0; i < kHalf; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_ps();
            for (int64_t u = 0; u < units; ++u) {
                const __m256 low = _mm256_loadu_ps(panel + u * lanes + lane);
                const __m256 high = _mm256_loadu_ps(panel + u * lanes + lane + 8);
                for (int i = 0; i < kHalf; ++i) {
                    const __m256 target = _mm256_set1_ps(group[(first + i) * kUnitPitch + u]);
                    sums[i][0] = _mm256_fmadd_ps(target, low, sums[i][0]);
                    sums[i][1] = _mm256_fmadd_ps(target, high, sums[i][1]);
                }
            }
            for (int i = 0; i < kHalf; ++i) {
                float* row = out + (first + i) * kPanelLanes + lane;
                _mm256_storeu_ps(row, sums[i][0]);
                _mm256_storeu_ps(row + 8, sums[i][1]);
            }
        }
    }
}

#endif

// 16 probes against 3 targets at a time: 12 sums of 4 lanes, of 16 registers.
inline void product_portable(const float* panel, const float* group, int lanes, int64_t units,
                             float* out) {
    constexpr int kFew = 3;
    constexpr int kSome = 16;
    for (int first = 0; first < kTargetGroup; first += kFew) {
        for (int begin = 0; begin < lanes; begin += kSome) {
            float sums[kFew][kSome] = {};
            for (int64_t u = 0; u < units; ++u) {
                const float* probe = panel + u * lanes + begin;
                for (int i = 0; i < kFew; ++i) {
                    const float target = group[(first + i) * kUnitPitch + u];
                    for (int lane = 0; lane < kSome; ++lane) sums[i][lane] += target * probe[lane];
                }
            }
            for (int i = 0; i < kFew; ++i) {
                float* row = out + (first + i) * kPanelLanes + begin;
                for (int lane = 0; lane < kSome; ++lane) row[lane] = sums[i][lane];
            }
        }
    }
}

// out[i * kPanelLanes + lane] = <target i, probe lane>, below AVX-512. All rows are written.
template <CpuLevel level>
LIGHTVLM_INLINE void product(const Panel& panel, const uint32_t* group, int64_t units, float* out) {
    const auto* probes = reinterpret_cast<const float*>(panel.units);
    const auto* targets = reinterpret_cast<const float*>(group);
#if defined(__x86_64__)
    if constexpr (level == CpuLevel::kAvx2) {
        product_avx2(probes, targets, panel.lanes, units, out);
        return;
    }
#endif
    product_portable(probes, targets, panel.lanes, units, out);
}

}  // namespace lightvlm::importance_detail
