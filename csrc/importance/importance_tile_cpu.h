// One tile of the CPU twin of importance: up to 32 probes of one slot against all its targets.
//
//   1. logits of a group of targets (importance_product_cpu.h), scaled and masked;
//   2. own softmax: they stay in `logits` (targets x lanes, in the L2 cache up to 8k targets)
//      until each probe's maximum and sum are known; a given log-sum-exp needs no second look;
//   3. each target's masses are summed (or their maximum taken) over the lanes.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "importance/importance.h"
#include "importance/importance_product_cpu.h"

namespace lightvlm::importance_detail {

constexpr int kLanesMax = 32;
constexpr int32_t kSeesNothing = std::numeric_limits<int32_t>::min();
// Targets whose masses are summed before the sum joins the rest: keeps rounding errors small.
constexpr int64_t kSumBlock = 64;

template <typename T>
struct Tile {
    // Probes: those past `probes` are null. A probe sees target t where limit >= threshold[t].
    const T* probe[kLanesMax];
    int32_t limit[kLanesMax];
    float lse[kLanesMax];
    int probes = 0;
    bool own_softmax = true;

    // Target t lies at targets + (row == null ? t : row[t]) * target_stride.
    const T* targets = nullptr;
    int64_t target_stride = 0;
    const int32_t* row = nullptr;
    const int32_t* threshold = nullptr;
    int64_t first = 0;  // no probe sees a target outside [first, last)
    int64_t last = 0;

    int64_t width = 0;
    float scale = 1.0f;
    bool use_max = false;
};

// What a thread needs for a tile of at most `targets` targets.
struct TileScratch {
    alignas(64) float probes[kImportanceMaxWidth * kLanesMax];
    alignas(64) float group[kTargetGroup * kTargetPitch];
    alignas(64) float block[kTargetGroup * kLanesMax];
};

// exp with a relative error of 1.2e-7 at most, 0 below -87.34 where floats become subnormal; inf
// and NaN as std::exp. Reduction and polynomial after the Cephes library (S. Moshier). Plain
// arithmetic, so that it vectorises.
LIGHTVLM_INLINE float exponential(float x) {
    constexpr float kLow = -87.33654f;
    constexpr float kHigh = 88.8f;         // exp(88.8) is infinite
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const bool too_low = x < kLow;
    x = x > kHigh ? kHigh : x;
    x = too_low ? kLow : x;
    const float shifted = x * 1.44269504f + kRound;
    const float count = shifted - kRound;
    float r = x - count * 0.693359375f;
    r = r - count * -2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    // 2^count in two steps: 2^128 is no float, but y * 2^127 * 2 may be one.
    const int32_t power = static_cast<int32_t>(float16_detail::float_bits(shifted) - 0x4b400000u);
    const int32_t half = power >> 1;
    const float low = float16_detail::float_of(static_cast<uint32_t>(half + 127) << 23);
    const float high = float16_detail::float_of(static_cast<uint32_t>(power - half + 127) << 23);
    return too_low ? 0.0f : y * low * high;
}

// As torch's max: a NaN wins.
LIGHTVLM_INLINE float maximum(float a, float b) { return a > b || a != a ? a : b; }

// Over the lanes, in halves: the order depends on the lane alone.
template <int kLanes>
LIGHTVLM_INLINE float fold_lanes(const float* values, bool use_max) {
    float folded[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) folded[lane] = values[lane];
    if (use_max) {
        for (int half = kLanes / 2; half > 0; half /= 2) {
            for (int lane = 0; lane < half; ++lane) {
                folded[lane] = maximum(folded[lane], folded[lane + half]);
            }
        }
    } else {
        for (int half = kLanes / 2; half > 0; half /= 2) {
            for (int lane = 0; lane < half; ++lane) folded[lane] += folded[lane + half];
        }
    }
    return folded[0];
}

struct FoldTile {
    // folded[t] gets the score of target t from this tile, for all t in [0, targets); logits holds
    // (last - first + kTargetGroup) * lanes floats for an own softmax, else it may be null.
    template <CpuLevel level, typename T>
    static LIGHTVLM_INLINE void run(const Tile<T>* tile, int64_t targets, TileScratch* scratch,
                                    float* logits, float* folded) {
        for (int64_t t = 0; t < tile->first; ++t) folded[t] = 0.0f;
        for (int64_t t = tile->last; t < targets; ++t) folded[t] = 0.0f;
        if (tile->probes <= 16) {
            fold<level, T, 16>(*tile, *scratch, logits, folded);
        } else {
            fold<level, T, 32>(*tile, *scratch, logits, folded);
        }
    }

    // Number d of every probe together, lanes without a probe 0.
    template <int kLanes, typename T>
    static LIGHTVLM_INLINE void pack_probes(const Tile<T>& tile, float* probes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const T* probe = lane < tile.probes ? tile.probe[lane] : nullptr;
            for (int64_t d = 0; d < tile.width; ++d) {
                probes[d * kLanes + lane] = probe != nullptr ? to_float(probe[d]) : 0.0f;
            }
        }
    }

    // The group of targets that begins with `begin`; `count` of them exist.
    template <typename T>
    static LIGHTVLM_INLINE void load_group(const Tile<T>& tile, int64_t begin, int64_t count,
                                           float* group) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t at = tile.row != nullptr ? tile.row[begin + i] : begin + i;
            const T* target = tile.targets + at * tile.target_stride;
            float* out = group + i * kTargetPitch;
            for (int64_t d = 0; d < tile.width; ++d) out[d] = to_float(target[d]);
        }
        for (int64_t i = count; i < kTargetGroup; ++i) {
            for (int64_t d = 0; d < tile.width; ++d) group[i * kTargetPitch + d] = 0.0f;
        }
    }

    template <CpuLevel level, typename T, int kLanes>
    static LIGHTVLM_INLINE void fold(const Tile<T>& tile, TileScratch& scratch, float* logits,
                                     float* folded) {
        alignas(64) int32_t limit[kLanes];
        alignas(64) float shift[kLanes];  // maximum of the logits, or the given log-sum-exp
        for (int lane = 0; lane < kLanes; ++lane) {
            limit[lane] = lane < tile.probes ? tile.limit[lane] : kSeesNothing;
            shift[lane] = tile.own_softmax || lane >= tile.probes
                              ? -std::numeric_limits<float>::infinity()
                              : tile.lse[lane];
        }
        pack_probes<kLanes>(tile, scratch.probes);
        for (int64_t begin = tile.first; begin < tile.last; begin += kTargetGroup) {
            const int64_t left = tile.last - begin;
            const int64_t count = left < kTargetGroup ? left : kTargetGroup;
            load_group(tile, begin, count, scratch.group);
            float* block =
                tile.own_softmax ? logits + (begin - tile.first) * kLanes : scratch.block;
            product<level, kLanes>(scratch.probes, scratch.group, tile.width, block);
            if (tile.own_softmax) {
                mask_logits<kLanes>(tile.scale, limit, tile.threshold + begin, count, block, shift);
            } else {
                fold_given<kLanes>(tile, limit, shift, begin, count, block, folded);
            }
        }
        if (tile.own_softmax) fold_own<kLanes>(tile, limit, shift, logits, folded);
    }

    // Scales the logits, hides what a probe does not see, and raises each probe's maximum.
    template <int kLanes>
    static LIGHTVLM_INLINE void mask_logits(float scale, const int32_t* limit,
                                            const int32_t* threshold, int64_t count, float* block,
                                            float* highest) {
        constexpr float kHidden = -std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < count; ++i) {
            for (int lane = 0; lane < kLanes; ++lane) {
                const float logit = block[i * kLanes + lane] * scale;
                const float shown = limit[lane] >= threshold[i] ? logit : kHidden;
                block[i * kLanes + lane] = shown;
                // A NaN is not noticed here, but makes the sum of exponentials one.
                highest[lane] = shown > highest[lane] ? shown : highest[lane];
            }
        }
    }

    template <int kLanes, typename T>
    static LIGHTVLM_INLINE void fold_given(const Tile<T>& tile, const int32_t* limit,
                                           const float* lse, int64_t begin, int64_t count,
                                           const float* block, float* folded) {
        for (int64_t i = 0; i < count; ++i) {
            float mass[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                const float value = exponential(block[i * kLanes + lane] * tile.scale - lse[lane]);
                mass[lane] = limit[lane] >= tile.threshold[begin + i] ? value : 0.0f;
            }
            folded[begin + i] = fold_lanes<kLanes>(mass, tile.use_max);
        }
    }

    template <int kLanes, typename T>
    static LIGHTVLM_INLINE void fold_own(const Tile<T>& tile, const int32_t* limit, float* highest,
                                         float* logits, float* folded) {
        const int64_t count = tile.last - tile.first;
        alignas(64) float sum[kLanes] = {};
        for (int lane = 0; lane < kLanes; ++lane) {
            // All logits -inf: exp(-inf - 0) is 0, where -inf - -inf would be NaN.
            highest[lane] =
                highest[lane] > -std::numeric_limits<float>::infinity() ? highest[lane] : 0.0f;
        }
        for (int64_t block = 0; block < count; block += kSumBlock) {
            const int64_t end = block + kSumBlock < count ? block + kSumBlock : count;
            alignas(64) float block_sum[kLanes] = {};
            for (int64_t t = block; t < end; ++t) {
                for (int lane = 0; lane < kLanes; ++lane) {
                    const float value = exponential(logits[t * kLanes + lane] - highest[lane]);
                    logits[t * kLanes + lane] = value;
                    block_sum[lane] += value;
                }
            }
            for (int lane = 0; lane < kLanes; ++lane) sum[lane] += block_sum[lane];
        }
        alignas(64) float inverse[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            inverse[lane] = sum[lane] != 0.0f ? 1.0f / sum[lane] : 0.0f;
        }
        for (int64_t t = 0; t < count; ++t) {
            const int32_t threshold = tile.threshold[tile.first + t];
            float mass[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                // Hidden stays 0 even where the probe's sum is NaN.
                const float value = logits[t * kLanes + lane] * inverse[lane];
                mass[lane] = limit[lane] >= threshold ? value : 0.0f;
            }
            folded[tile.first + t] = fold_lanes<kLanes>(mass, tile.use_max);
        }
    }
};

}  // namespace lightvlm::importance_detail
