// CPU twin of importance with an own softmax: what one panel gives to each target.
//
//   1. logits of a group of targets at a time (importance_product_cpu.h), masked, for a block of
//      240 (30 KiB), and each probe's maximum so far;
//   2. exponentials in their place, relative to that maximum, and each probe's sum;
//   3. when all are done (targets x lanes, in the L2 cache up to 8k targets): divided by the sums,
//      each block's from its own maximum, and summed (or their maximum taken) over the lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "importance/importance_exp2_cpu.h"
#include "importance/importance_lanes_cpu.h"
#include "importance/importance_panel_cpu.h"
#include "importance/importance_product_cpu.h"

namespace lightvlm::importance_detail {

// Targets whose masses are summed before the sum joins the rest: keeps rounding errors small.
constexpr int64_t kSumBlock = 80;
// Targets whose logits become exponentials together: of whole groups, lanes and sum blocks.
constexpr int64_t kOwnBlock = 240;
static_assert(kOwnBlock % kTargetGroup == 0 && kOwnBlock % kLanes == 0 &&
              kOwnBlock % kSumBlock == 0);

template <typename T>
struct OwnRun {
    Targets<T> targets;
    int64_t count = 0;  // of all targets
    int64_t first = 0;  // no probe of the panel sees a target outside [first, last)
    int64_t last = 0;
    const Panel* panel = nullptr;
    float scale = 1.0f;  // >= 0, times log2(e)
    bool use_max = false;
    bool add = false;         // to what scores has, else store
    float* logits = nullptr;  // (last - first + kTargetGroup) * lanes, aligned to 64 bytes
    float* peaks = nullptr;   // own_blocks(last - first) * lanes
    float* scores = nullptr;  // count
};

constexpr int64_t own_blocks(int64_t targets) { return (targets + kOwnBlock - 1) / kOwnBlock; }

struct OwnScratch {
    alignas(64) uint32_t group[kTargetGroup * kUnitPitch];
    alignas(64) float block[kTargetGroup * kPanelLanes];
    alignas(64) float mass[kLanes * kLanes];
    alignas(64) float highest[kPanelLanes];
    alignas(64) float inverse[kPanelLanes];
};

#if defined(__x86_64__)

// Stores a tile's logits, what a probe does not see as -inf, and raises each probe's maximum.
template <int kVectors>
struct FinishOwn {
    const Panel& panel;
    const int32_t* threshold;  // null: every lane that is alive sees every target
    float* logits;
    float* highest;

    LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE void operator()(
        const __m512 (&sums)[kTargetGroup][kVectors]) const {
        const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            __m512 most = _mm512_load_ps(highest + kLanes * v);
            const __m512i limit = _mm512_load_si512(panel.limit + kLanes * v);
#pragma GCC unroll 12
            for (int i = 0; i < kTargetGroup; ++i) {
                __mmask16 seen = static_cast<__mmask16>(panel.alive >> (kLanes * v));
                if (threshold != nullptr) {
                    seen = _mm512_cmpge_epi32_mask(limit, _mm512_set1_epi32(threshold[i]));
                }
                const __m512 shown = _mm512_mask_mov_ps(hidden, seen, sums[i][v]);
                _mm512_store_ps(logits + (i * kVectors + v) * kLanes, shown);
                // A NaN is not noticed here, but makes the sum of exponentials one.
                most = _mm512_max_ps(shown, most);
            }
            _mm512_store_ps(highest + kLanes * v, most);
        }
    }
};

// Exponentials of `count` targets in place; their sums.
template <int kVectors>
LIGHTVLM_TARGET_AVX512 void exponentials_avx512(float* logits, int64_t count, float scale,
                                                const float* highest, float* sums) {
    const __m512 scales = _mm512_set1_ps(scale);
    const __m512 none = _mm512_setzero_ps();
    __m512 shift[kVectors];
    __m512 sum[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        shift[v] = _mm512_loadu_ps(highest + kLanes * v);
        sum[v] = none;
    }
    for (int64_t t = 0; t < count; ++t) {
        for (int v = 0; v < kVectors; ++v) {
            float* at = logits + (t * kVectors + v) * kLanes;
            const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(at), shift[v]), scales);
            const __m512 value = exponential2_avx512(x, none);
            _mm512_store_ps(at, value);
            sum[v] = _mm512_add_ps(sum[v], value);
        }
    }
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(sums + kLanes * v, sum[v]);
}

// Exponentials of `count` targets (at most kLanes) times `inverse`, both halves of the panel
// folded: a vector of masses for each target, zeros past `count`.
template <int kVectors, bool kMax>
LIGHTVLM_TARGET_AVX512 void masses_avx512(const Panel& panel, const float* values,
                                          const int32_t* threshold, int64_t count,
                                          const float* inverse, float* mass) {
    for (int64_t i = 0; i < count; ++i, values += kVectors * kLanes) {
        __m512 own = _mm512_setzero_ps();
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            // Hidden stays 0 even where the probe's sum is NaN.
            __mmask16 seen = static_cast<__mmask16>(panel.alive >> (kLanes * v));
            if (panel.lowest < threshold[i]) {
                seen = _mm512_cmpge_epi32_mask(_mm512_load_si512(panel.limit + kLanes * v),
                                               _mm512_set1_epi32(threshold[i]));
            }
            const __m512 one = _mm512_maskz_mul_ps(seen, _mm512_load_ps(values + kLanes * v),
                                                   _mm512_load_ps(inverse + kLanes * v));
            own = v == 0 ? one : fold_avx512<kMax>(own, one);
        }
        _mm512_store_ps(mass + i * kLanes, own);
    }
    for (int64_t i = count; i < kLanes; ++i)
        _mm512_store_ps(mass + i * kLanes, _mm512_setzero_ps());
}

#endif

template <typename T>
struct FoldOwn {
    static constexpr CpuLevel kHighestLevel = kHighestLevelFor<T>;

    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const OwnRun<T>* run, OwnScratch* scratch) {
        if (!run->add) {
            std::fill(run->scores, run->scores + run->first, 0.0f);
            std::fill(run->scores + run->last, run->scores + run->count, 0.0f);
        }
        if (run->panel->lanes == kLanes) {
            fold<level, 1>(*run, *scratch);
        } else {
            fold<level, 2>(*run, *scratch);
        }
    }

  private:
    template <CpuLevel level, int kVectors>
    static LIGHTVLM_INLINE void fold(const OwnRun<T>& run, OwnScratch& scratch) {
        constexpr int kAll = kVectors * kLanes;
        constexpr float kNone = -std::numeric_limits<float>::infinity();
        const int64_t count = run.last - run.first;
        float* highest = scratch.highest;
        float* peaks = run.peaks;
        alignas(64) float sum[kAll] = {};
        std::fill(highest, highest + kAll, kNone);
        for (int64_t block = 0; block < count; block += kOwnBlock, peaks += kAll) {
            const int64_t end = std::min(block + kOwnBlock, count);
            float before[kAll];
            std::memcpy(before, highest, sizeof(before));
            for (int64_t t = block; t < end; t += kTargetGroup) {
                keep_logits<level, kVectors>(run, t, scratch);
            }
            alignas(64) float shift[kAll];
            for (int lane = 0; lane < kAll; ++lane) {
                // All logits -inf: exp(-inf - 0) is 0, where -inf - -inf would be NaN.
                shift[lane] = highest[lane] > kNone ? highest[lane] : 0.0f;
                const float down = exponential2((before[lane] - highest[lane]) * run.scale, 0.0f);
                sum[lane] = before[lane] > kNone ? sum[lane] * down : sum[lane];
                peaks[lane] = highest[lane];
            }
            for (int64_t t = block; t < end; t += kSumBlock) {
                alignas(64) float some[kAll];
                exponentials<level, kVectors>(run.logits + t * kAll, std::min(kSumBlock, end - t),
                                              run.scale, shift, some);
                for (int lane = 0; lane < kAll; ++lane) sum[lane] += some[lane];
            }
        }
        peaks = run.peaks;
        for (int64_t block = 0; block < count; block += kOwnBlock, peaks += kAll) {
            for (int lane = 0; lane < kAll; ++lane) {
                const float inverse = sum[lane] != 0.0f ? 1.0f / sum[lane] : 0.0f;
                const float down = exponential2((peaks[lane] - highest[lane]) * run.scale, 0.0f);
                scratch.inverse[lane] = peaks[lane] > kNone ? inverse * down : inverse;
            }
            const int64_t end = std::min(block + kOwnBlock, count);
            for (int64_t t = block; t < end; t += kLanes) {
                fold_targets<level, kVectors>(run, t, std::min<int64_t>(kLanes, end - t), scratch);
            }
        }
    }

    template <CpuLevel level, int kVectors>
    static LIGHTVLM_INLINE void keep_logits(const OwnRun<T>& run, int64_t t, OwnScratch& scratch) {
        const int64_t width = run.targets.width;
        const Panel& panel = *run.panel;
        const int64_t begin = run.first + t;
        const int64_t count = std::min<int64_t>(kTargetGroup, run.last - begin);
        stage_group<level>(run.targets, begin, run.last, scratch.group);
        int32_t threshold[kTargetGroup];
        for (int64_t i = 0; i < kTargetGroup; ++i) {
            threshold[i] = run.targets.threshold[begin + std::min(i, count - 1)];
        }
        const int32_t most = *std::max_element(threshold, threshold + kTargetGroup);
        float* logits = run.logits + t * kVectors * kLanes;
#if defined(__x86_64__)
        if constexpr (level >= CpuLevel::kAvx512) {
            const FinishOwn<kVectors> finish{panel, panel.lowest >= most ? nullptr : threshold,
                                             logits, scratch.highest};
            if constexpr (kPairs<level, T>) {
                product_avx512_bf16<kVectors>(panel.units, scratch.group, (width + 1) / 2, finish);
            } else {
                product_avx512<kVectors>(panel.units, scratch.group, width, finish);
            }
            return;
        }
#endif
        product<level>(panel, scratch.group, width, scratch.block);
        float* highest = scratch.highest;
        for (int i = 0; i < kTargetGroup; ++i) {
            for (int lane = 0; lane < kVectors * kLanes; ++lane) {
                const float shown = panel.limit[lane] >= threshold[i]
                                        ? scratch.block[i * kPanelLanes + lane]
                                        : -std::numeric_limits<float>::infinity();
                logits[i * kVectors * kLanes + lane] = shown;
                highest[lane] = shown > highest[lane] ? shown : highest[lane];
            }
        }
    }

    template <CpuLevel level, int kVectors>
    static LIGHTVLM_INLINE void exponentials(float* logits, int64_t count, float scale,
                                             const float* highest, float* sums) {
        constexpr int kAll = kVectors * kLanes;
#if defined(__x86_64__)
        if constexpr (level >= CpuLevel::kAvx512) {
            exponentials_avx512<kVectors>(logits, count, scale, highest, sums);
            return;
        }
#endif
        std::fill(sums, sums + kAll, 0.0f);
        for (int64_t t = 0; t < count; ++t) {
            for (int lane = 0; lane < kAll; ++lane) {
                const float x = (logits[t * kAll + lane] - highest[lane]) * scale;
                const float value = exponential2(x, 0.0f);
                logits[t * kAll + lane] = value;
                sums[lane] += value;
            }
        }
    }

    // Scores of targets [t, t + count), at most kLanes.
    template <CpuLevel level, int kVectors>
    static LIGHTVLM_INLINE void fold_targets(const OwnRun<T>& run, int64_t t, int64_t count,
                                             OwnScratch& scratch) {
        masses<level, kVectors>(run, t, count, scratch);
        alignas(64) float scores[kLanes];
        fold_lanes<level>(scratch.mass, count, run.use_max, scores);
        float* out = run.scores + run.first + t;
        for (int64_t i = 0; i < count; ++i) out[i] = run.add ? out[i] + scores[i] : scores[i];
    }

    // Masses of targets [t, t + count), a vector for each, both halves of the panel folded.
    template <CpuLevel level, int kVectors>
    static LIGHTVLM_INLINE void masses(const OwnRun<T>& run, int64_t t, int64_t count,
                                       OwnScratch& scratch) {
        constexpr int kAll = kVectors * kLanes;
        const float* exponentials = run.logits + t * kAll;
        const int32_t* thresholds = run.targets.threshold + run.first + t;
#if defined(__x86_64__)
        if constexpr (level >= CpuLevel::kAvx512) {
            if (run.use_max) {
                masses_avx512<kVectors, true>(*run.panel, exponentials, thresholds, count,
                                              scratch.inverse, scratch.mass);
            } else {
                masses_avx512<kVectors, false>(*run.panel, exponentials, thresholds, count,
                                               scratch.inverse, scratch.mass);
            }
            return;
        }
#endif
        std::fill(scratch.mass, scratch.mass + kLanes * kLanes, 0.0f);
        for (int64_t i = 0; i < count; ++i) {
            const int32_t threshold = thresholds[i];
            const float* values = exponentials + i * kAll;
            float* mass = scratch.mass + i * kLanes;
            for (int v = 0; v < kVectors; ++v) {
                for (int l = 0; l < kLanes; ++l) {
                    const int lane = v * kLanes + l;
                    // Hidden stays 0 even where the probe's sum is NaN.
                    const float scaled = values[lane] * scratch.inverse[lane];
                    const float one = run.panel->limit[lane] >= threshold ? scaled : 0.0f;
                    if (v == 0) {
                        mass[l] = one;
                    } else {
                        mass[l] = run.use_max ? maximum(mass[l], one) : mass[l] + one;
                    }
                }
            }
        }
    }
};

}  // namespace lightvlm::importance_detail
