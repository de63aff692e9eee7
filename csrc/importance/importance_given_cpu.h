// CPU twin of importance where the log-sum-exps are given: scores of a run of targets from all
// panels of a slot. A tile's logits never leave the registers (AVX-512): each target has 16 sums,
// over the panels in order and over both halves of a panel, which are added at the end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "importance/importance_exp2_cpu.h"
#include "importance/importance_lanes_cpu.h"
#include "importance/importance_panel_cpu.h"
#include "importance/importance_product_cpu.h"

namespace lightvlm::importance_detail {

constexpr int64_t kGivenRun = 192;   // targets at a time
constexpr int64_t kPanelBlock = 24;  // panels that stay in the L2 cache while targets pass

template <typename T>
struct GivenRun {
    Targets<T> targets;
    int64_t begin = 0;  // targets [begin, end), at most kGivenRun
    int64_t end = 0;
    const Panel* panels = nullptr;
    int64_t panel_count = 0;
    float scale = 1.0f;  // >= 0, times log2(e)
    bool use_max = false;
    float* scores = nullptr;  // of target begin and on
};

struct GivenScratch {
    alignas(64) uint32_t group[kTargetGroup * kUnitPitch];
    alignas(64) float mass[(kGivenRun + kLanes) * kLanes];
    alignas(64) float block[kTargetGroup * kPanelLanes];
};

#if defined(__x86_64__)

// Adds exp of a tile's logits to the targets' sums. threshold null: every lane that is alive sees
// every target.
template <int kVectors>
struct FinishGiven {
    const Panel& panel;
    float scale;
    const int32_t* threshold;
    bool use_max;
    float* mass;

    LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE void operator()(
        const __m512 (&sums)[kTargetGroup][kVectors]) const {
        if (use_max) {
            add<true>(sums);
        } else {
            add<false>(sums);
        }
    }

  private:
    template <bool kMax>
    LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE void add(
        const __m512 (&sums)[kTargetGroup][kVectors]) const {
        const __m512 scales = _mm512_set1_ps(scale);
#pragma GCC unroll 12
        for (int i = 0; i < kTargetGroup; ++i) {
            __m512 own = _mm512_load_ps(mass + i * kLanes);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                const __m512 shift = _mm512_load_ps(panel.shift + kLanes * v);
                const __m512 low = _mm512_load_ps(panel.shift_low + kLanes * v);
                const __m512 value =
                    exponential2_avx512(_mm512_fmsub_ps(sums[i][v], scales, shift), low);
                __mmask16 seen = static_cast<__mmask16>(panel.alive >> (kLanes * v));
                if (threshold != nullptr) {
                    seen = _mm512_cmpge_epi32_mask(_mm512_load_si512(panel.limit + kLanes * v),
                                                   _mm512_set1_epi32(threshold[i]));
                }
                own = _mm512_mask_mov_ps(own, seen, fold_avx512<kMax>(own, value));
            }
            _mm512_store_ps(mass + i * kLanes, own);
        }
    }
};

#endif

template <typename T>
struct FoldGiven {
    static constexpr CpuLevel kHighestLevel = kHighestLevelFor<T>;

    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const GivenRun<T>* run, GivenScratch* scratch) {
        const int64_t count = run->end - run->begin;
        std::fill(scratch->mass, scratch->mass + (count + kLanes) * kLanes, 0.0f);
        for (int64_t first = 0; first < run->panel_count; first += kPanelBlock) {
            const int64_t last = std::min(first + kPanelBlock, run->panel_count);
            for (int64_t at = 0; at < count; at += kTargetGroup) {
                fold_group<level>(*run, first, last, at, *scratch);
            }
        }
        fold_lanes<level>(scratch->mass, count, run->use_max, run->scores);
    }

  private:
    // Panels [first, last) against the group of targets at begin + at.
    template <CpuLevel level>
    static LIGHTVLM_INLINE void fold_group(const GivenRun<T>& run, int64_t first, int64_t last,
                                           int64_t at, GivenScratch& scratch) {
        const int64_t begin = run.begin + at;
        const int64_t count = std::min<int64_t>(kTargetGroup, run.end - begin);
        int32_t threshold[kTargetGroup];
        for (int64_t i = 0; i < kTargetGroup; ++i) {
            threshold[i] = run.targets.threshold[begin + std::min(i, count - 1)];
        }
        const int32_t lowest = *std::min_element(threshold, threshold + kTargetGroup);
        const int32_t highest = *std::max_element(threshold, threshold + kTargetGroup);
        bool staged = false;
        for (int64_t p = first; p < last; ++p) {
            const Panel& panel = run.panels[p];
            if (panel.highest < lowest) continue;
            if (!staged) stage_group<level>(run.targets, begin, run.end, scratch.group);
            staged = true;
            const int32_t* edge = panel.lowest >= highest ? nullptr : threshold;
            float* mass = scratch.mass + at * kLanes;
            if (panel.lanes == kLanes) {
                fold_tile<level, 1>(run, panel, edge, scratch, mass);
            } else {
                fold_tile<level, 2>(run, panel, edge, scratch, mass);
            }
        }
    }

    template <CpuLevel level, int kVectors>
    static LIGHTVLM_INLINE void fold_tile(const GivenRun<T>& run, const Panel& panel,
                                          const int32_t* edge, GivenScratch& scratch, float* mass) {
        const int64_t width = run.targets.width;
#if defined(__x86_64__)
        if constexpr (level >= CpuLevel::kAvx512) {
            const FinishGiven<kVectors> finish{panel, run.scale, edge, run.use_max, mass};
            if constexpr (kPairs<level, T>) {
                product_avx512_bf16<kVectors>(panel.units, scratch.group, (width + 1) / 2, finish);
            } else {
                product_avx512<kVectors>(panel.units, scratch.group, width, finish);
            }
            return;
        }
#endif
        product<level>(panel, scratch.group, width, scratch.block);
        for (int i = 0; i < kTargetGroup; ++i) {
            const int32_t threshold = edge != nullptr ? edge[i] : panel.lowest;
            for (int v = 0; v < kVectors; ++v) {
                float value[kLanes];
                for (int l = 0; l < kLanes; ++l) {
                    const int lane = kLanes * v + l;
                    const float x =
                        scratch.block[i * kPanelLanes + lane] * run.scale - panel.shift[lane];
                    const float mass_here = exponential2(x, panel.shift_low[lane]);
                    value[l] = panel.limit[lane] >= threshold ? mass_here : 0.0f;
                }
                float* own = mass + i * kLanes;
                for (int l = 0; l < kLanes; ++l) {
                    own[l] = run.use_max ? maximum(own[l], value[l]) : own[l] + value[l];
                }
            }
        }
    }
};

}  // namespace lightvlm::importance_detail
