// For each dropped token of a group the most similar kept one.
//
// The choice is made by the cosine as it is defined: dot(dropped, kept) * inverse_length(kept), one
// product after the other in an order of its own (CosineDot), so that it depends on nothing but the
// two vectors: not on tile, batch, threads, nor the processor. That would be slow for all pairs.
// So a blocked matrix product screens them first, and its error is bounded: only the kept tokens
// that could be the best within the bound, one or two mostly, are then compared as defined.
//
//   screen 1   the vectors in 8 bits (int8_vectors_cpu.h), at twice the rate of bfloat16 and four
//              times that of float. Given up where it leaves too many.
//   screen 2   the vectors themselves, in bfloat16 pairs where the processor multiplies those and
//   the
//              dtype is that, otherwise as floats.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "merging/int8_vectors_cpu.h"
#include "merging/merge_numbers.h"
#include "merging/merge_rows_cpu.h"
#include "merging/screen_cpu.h"

namespace lightvlm {

namespace nearest_detail {

// dot(a * a_scale, b * b_scale): each product and each sum rounded to fp32, 64 lanes, folded.
template <typename T>
struct CosineDot {
    template <CpuLevel level>
    static LIGHTVLM_INLINE float run(const T* a, float a_scale, const T* b, float b_scale,
                                     int64_t n) {
        float sums[kSumLanes] = {};
        int64_t i = 0;
        if (a_scale == 1.0f && b_scale == 1.0f) {
            for (; i + kSumLanes <= n; i += kSumLanes) {
                for (int l = 0; l < kSumLanes; ++l) {
                    sums[l] += to_float(a[i + l]) * to_float(b[i + l]);
                }
            }
        }
        for (; i + kSumLanes <= n; i += kSumLanes) {
            for (int l = 0; l < kSumLanes; ++l) {
                sums[l] += (to_float(a[i + l]) * a_scale) * (to_float(b[i + l]) * b_scale);
            }
        }
        for (int l = 0; i < n; ++i, ++l) {
            sums[l] += (to_float(a[i]) * a_scale) * (to_float(b[i]) * b_scale);
        }
        return fold_lanes(sums);
    }
};

// Fewer kept tokens, or shorter vectors, are not worth the 8 bits.
constexpr int64_t kInt8Kept = 160;
constexpr int64_t kInt8Width = 128;
constexpr int64_t kInt8MaxWidth = 1 << 15;  // sums of products stay below 2^31
// Screen 1 is given up where it leaves more than this share of the pairs.
constexpr int64_t kMostLeft = 16;

template <typename T>
class Nearest {
  public:
    Nearest(const NearestKept<T>& group, int32_t* nearest, float* best)
        : group_(group), nearest_(nearest), best_(best) {}

    void run() {
        if (!try_int8()) {
            screen_vectors(pairs_ ? ProductUnit::kBfloat16Pair : ProductUnit::kFloat);
        }
    }

  private:
    const T* vector(int32_t token) const { return group_.metric + token * group_.stride; }

    void measure(int32_t token) const {
        measure_vector(vector(token), group_.width, &group_.scale[token], &group_.inverse[token]);
    }

    float cosine(int32_t dropped, int32_t kept) const {
        const float dropped_scale = group_.scale[dropped];
        const float kept_scale = group_.scale[kept];
        if (dropped_scale == 0.0f || kept_scale == 0.0f) return 0.0f;
        return multiversion<CosineDot<T>>(vector(dropped), dropped_scale, vector(kept), kept_scale,
                                          group_.width) *
               group_.inverse[kept];
    }

    // Of the columns that the screen left for a dropped token, the one with the highest cosine; of
    // equals the first. The most promising goes first: its cosine settles most of the others.
    // common: what the screen's values lack to be cosines, the same for all columns.
    void decide(int64_t dropped, const LeftColumns& left, float common, float slack) const {
        int64_t first = 0;
        for (int64_t i = 1; i < left.count; ++i) {
            if (left.upper[i] > left.upper[first]) first = i;
        }
        int32_t at = left.column[first];
        if (left.count > 1 || best_ != nullptr) {
            const int32_t token = group_.dropped[dropped];
            const float to_screen = group_.inverse[token];
            float highest = cosine(token, group_.kept[at]);
            for (int64_t i = 0; i < left.count; ++i) {
                const bool below = left.upper[i] + common < highest * to_screen - slack;
                if (i == first || below) continue;
                const float one = cosine(token, group_.kept[left.column[i]]);
                if (one > highest || (one == highest && left.column[i] < at)) {
                    highest = one;
                    at = left.column[i];
                }
            }
            if (best_ != nullptr) best_[dropped] = highest;
        }
        nearest_[dropped] = at;
    }

    int64_t tokens() const { return group_.kept_count + group_.dropped_count; }
    int32_t token(int64_t i) const {
        return i < group_.kept_count ? group_.kept[i] : group_.dropped[i - group_.kept_count];
    }

    // Decides all, or returns false with all vectors measured.
    bool try_int8() {
        if (!has_product(ProductUnit::kBytes) || group_.kept_count < kInt8Kept ||
            group_.width < kInt8Width || group_.width > kInt8MaxWidth) {
            parallel_items(tokens(), group_.width, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) measure(token(i));
            });
            return false;
        }
        const int64_t padded = (group_.width + kSumLanes - 1) / kSumLanes * kSumLanes;
        const std::vector<float> mean = mean_of_some(padded);
        const float mean_square = std::inner_product(mean.begin(), mean.end(), mean.begin(), 0.0f);
        // A unit of 32 bits is four columns. One more row of units keeps rows out of step in
        // caches.
        const int64_t pitch = padded / 4 + 16;
        const auto bytes = std::make_unique_for_overwrite<uint32_t[]>(tokens() * pitch);
        std::vector<Int8Vector> vectors(static_cast<size_t>(tokens()));
        parallel_items(tokens(), 4 * group_.width, [&](int64_t begin, int64_t end) {
            std::vector<float> unit(static_cast<size_t>(padded));
            for (int64_t i = begin; i < end; ++i) {
                measure(token(i));
                unit_vector(token(i), unit.data());
                multiversion<QuantiseVector>(unit.data(), mean.data(), padded,
                                             reinterpret_cast<int8_t*>(bytes.get() + i * pitch),
                                             &vectors[i]);
            }
        });
        ScreenColumns columns(group_.kept_count);
        for (int64_t c = 0; c < group_.kept_count; ++c) {
            columns.set(c, vectors[c].step, vectors[c].bias, vectors[c].length,
                        vectors[c].residual);
        }
        std::atomic<bool> too_many{false};
        const Screen screen(ProductUnit::kBytes, group_.kept_count, padded / 4);
        screen.pack([&](int64_t c, int64_t unit, int64_t n, uint32_t* to) {
            // Signed to unsigned: 128 more; run() takes 128 times the row's sum away again.
            const uint32_t* from = bytes.get() + c * pitch + unit;
            for (int64_t i = 0; i < n; ++i) to[i] = from[i] ^ 0x80808080u;
        });
        screen.for_rows(group_.dropped_count, [&](ScreenBlock& block, int64_t begin, int64_t end) {
            if (too_many) return;
            const uint32_t* rows = bytes.get() + (group_.kept_count + begin) * pitch;
            screen.multiply(block, end - begin, [&](int64_t r, int64_t unit, int64_t) {
                return rows + r * pitch + unit;
            });
            int64_t left = 0;
            for (int64_t d = begin; d < end; ++d) {
                const Int8Vector& row = vectors[group_.kept_count + d];
                left += screen.leave<int32_t>(block, d - begin,
                                              {row.step, -128 * row.sum, row.residual,
                                               row.length + row.residual, rounding(32)},
                                              columns);
            }
            if (left * kMostLeft > (end - begin) * group_.kept_count + 64 * kMostLeft) {
                too_many = true;
                return;
            }
            for (int64_t d = begin; d < end; ++d) {
                const float common = vectors[group_.kept_count + d].bias + mean_square;
                decide(d, block.left(d - begin), common, rounding(32));
            }
        });
        return !too_many;
    }

    void unit_vector(int32_t token, float* unit) const {
        if (group_.scale[token] == 0.0f) {
            std::fill_n(unit, group_.width, 0.0f);
        } else {
            multiversion<UnitVector<T>>(vector(token), group_.scale[token], group_.inverse[token],
                                        group_.width, unit);
        }
    }

    // Of 16 kept tokens, evenly apart. Any vector would do; this one takes away what they share.
    std::vector<float> mean_of_some(int64_t padded) const {
        constexpr int64_t kSome = 16;
        std::vector<float> mean(static_cast<size_t>(padded));
        std::vector<float> unit(static_cast<size_t>(padded));
        for (int64_t i = 0; i < kSome; ++i) {
            const int32_t one = group_.kept[i * group_.kept_count / kSome];
            measure(one);
            unit_vector(one, unit.data());
            multiversion<AddVector>(static_cast<const float*>(unit.data()), padded, mean.data());
        }
        for (float& value : mean) value /= static_cast<float>(kSome);
        return mean;
    }

    // What fp32 sums over the width in `lanes` lanes may be off, in cosines; twice, for both sides.
    float rounding(int64_t lanes) const {
        return static_cast<float>(group_.width / lanes + 32) * 0x1p-22f;
    }

    void screen_vectors(ProductUnit unit) {
        const int64_t per_unit = unit == ProductUnit::kBfloat16Pair ? 2 : 1;
        const Screen screen(unit, group_.kept_count, (group_.width + per_unit - 1) / per_unit);
        const auto stage = [&](int32_t token, int64_t first, int64_t n, uint32_t* to) {
            const int64_t begin = first * per_unit;
            multiversion<StageVector<T>>(vector(token) + begin, group_.scale[token],
                                         std::min(group_.width - begin, n * per_unit),
                                         per_unit == 2, n, to);
        };
        screen.pack([&](int64_t c, int64_t first, int64_t n, uint32_t* to) {
            stage(group_.kept[c], first, n, to);
        });
        ScreenColumns columns(group_.kept_count);
        for (int64_t c = 0; c < group_.kept_count; ++c) {
            columns.set(c, group_.inverse[group_.kept[c]], 0.0f, 1.0f, 0.0f);
        }
        screen.for_rows(group_.dropped_count, [&](ScreenBlock& block, int64_t begin, int64_t end) {
            screen.multiply(block, end - begin, [&](int64_t r, int64_t first, int64_t n) {
                uint32_t* to = block.staged(r);
                stage(group_.dropped[begin + r], first, n, to);
                return static_cast<const uint32_t*>(to);
            });
            for (int64_t d = begin; d < end; ++d) {
                screen.leave<float>(
                    block, d - begin,
                    {group_.inverse[group_.dropped[d]], 0, rounding(1), 0.0f, rounding(1)},
                    columns);
                decide(d, block.left(d - begin), 0.0f, rounding(1));
            }
        });
    }

    const NearestKept<T>& group_;
    int32_t* nearest_;
    float* best_;
    const bool pairs_ = std::is_same_v<T, bfloat16_t> && has_product(ProductUnit::kBfloat16Pair);
};

}  // namespace nearest_detail

// nearest[d] gets the position in `kept` of the token most similar to dropped[d], and best[d],
// unless best is null, dot(dropped[d], kept) * inverse_length(kept). Measures all tokens. width >
// 0.
template <typename T>
void find_nearest_kept(const NearestKept<T>& group, int32_t* nearest, float* best) {
    nearest_detail::Nearest<T>(group, nearest, best).run();
}

}  // namespace lightvlm
