// What the CPU twins of merge_tokens and merge_pairs do with vectors and rows: lengths of metric
// vectors, lists of the tokens that arrive at each kept one, and their weighted mean.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "merging/merge_numbers.h"

namespace lightvlm {

struct AllWeights {
    template <CpuLevel level>
    static LIGHTVLM_INLINE bool run(const float* weight, int64_t n) {
        int32_t wrong = 0;
        for (int64_t i = 0; i < n; ++i) wrong |= is_weight(weight[i]) ? 0 : 1;
        return wrong == 0;
    }
};

// The sum of squares of vector * scale, and the largest magnitude of the vector as the bits of a
// float: those of infinity and NaN are above all others.
template <typename T>
struct SumOfSquares {
    template <CpuLevel level>
    static LIGHTVLM_INLINE float run(const T* vector, float scale, int64_t n, uint32_t* highest) {
        constexpr int kLanes = 64;
        float sums[kLanes] = {};
        uint32_t largest[kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            for (int l = 0; l < kLanes; ++l) {
                const float value = to_float(vector[i + l]);
                sums[l] += (value * scale) * (value * scale);
            }
            for (int l = 0; l < kLanes; ++l) {
                const uint32_t bits =
                    float16_detail::float_bits(to_float(vector[i + l])) & 0x7fffffffu;
                largest[l] = bits > largest[l] ? bits : largest[l];
            }
        }
        for (int l = 0; i < n; ++i, ++l) {
            const float value = to_float(vector[i]);
            sums[l] += (value * scale) * (value * scale);
            const uint32_t bits = float16_detail::float_bits(value) & 0x7fffffffu;
            largest[l] = bits > largest[l] ? bits : largest[l];
        }
        for (int half = kLanes / 2; half > 0; half /= 2) {
            for (int l = 0; l < half; ++l) {
                sums[l] += sums[l + half];
                largest[l] = largest[l] > largest[l + half] ? largest[l] : largest[l + half];
            }
        }
        *highest = largest[0];
        return sums[0];
    }
};

// The scale and the inverse length of a metric vector.
template <typename T>
void measure_vector(const T* vector, int64_t n, float* scale, float* inverse) {
    uint32_t largest;
    float sum = multiversion<SumOfSquares<T>>(vector, 1.0f, n, &largest);
    *scale = metric_scale(float16_detail::float_of(largest));
    if (*scale != 1.0f && *scale != 0.0f) {
        sum = multiversion<SumOfSquares<T>>(vector, *scale, n, &largest);
    }
    *inverse = *scale == 0.0f ? 0.0f : inverse_length(sum);
}

// Tokens by the entry they arrive at, ascending: entry j has [begin[j], begin[j + 1]).
struct ArrivalLists {
    std::vector<int32_t> begin;
    std::vector<int32_t> tokens;

    // entry_of: by token, negative for those that arrive nowhere.
    void build(const int32_t* entry_of, int64_t token_count, int64_t entries) {
        begin.assign(static_cast<size_t>(entries) + 1, 0);
        for (int64_t t = 0; t < token_count; ++t) {
            if (entry_of[t] >= 0) ++begin[entry_of[t]];
        }
        int32_t total = 0;
        for (int32_t& one : begin) {
            const int32_t here = one;
            one = total;
            total += here;
        }
        tokens.resize(static_cast<size_t>(total));
        for (int64_t t = 0; t < token_count; ++t) {
            if (entry_of[t] >= 0) tokens[begin[entry_of[t]]++] = static_cast<int32_t>(t);
        }
        // Each begin stands at its end now, which is where the next one began.
        for (int64_t j = entries; j > 0; --j) begin[j] = begin[j - 1];
        begin[0] = 0;
    }
};

// out = (sum of weights[i] * rows[i]) / total, columns [0, n), in the order of the rows.
template <typename T>
struct WeightedMean {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const T* x, int64_t stride, const int32_t* tokens,
                                    const float* weights, int64_t count, float total, T* out,
                                    int64_t n) {
        constexpr int64_t kColumns = 1024;  // 4 KiB of sums stay in the L1 cache
        alignas(64) float sums[kColumns];
        for (int64_t first = 0; first < n; first += kColumns) {
            const int64_t columns = n - first < kColumns ? n - first : kColumns;
            for (int64_t c = 0; c < columns; ++c) sums[c] = 0.0f;
            for (int64_t i = 0; i < count; ++i) {
                const T* row = x + tokens[i] * stride + first;
                const float weight = weights[i];
                for (int64_t c = 0; c < columns; ++c) sums[c] += weight * to_float(row[c]);
                // Row by row: g++ would take two at a time, and no longer vectorise.
                asm volatile("" ::: "memory");
            }
            for (int64_t c = 0; c < columns; ++c) {
                out[first + c] = from_float<T>(sums[c] / total);
            }
        }
    }
};

// The kept token, with those that arrive (each weighs something) merged into it. weight: by token,
// null for 1 each. eps: the least that a sum of weights is divided by.
template <typename T>
void merge_row(const T* x, int64_t stride, int64_t width, int32_t token, const int32_t* arrivals,
               int64_t count, const float* weight, double eps, T* out) {
    if (count == 0) {
        std::memcpy(out, x + token * stride, static_cast<size_t>(width) * sizeof(T));
        return;
    }
    const auto weight_of = [&](int32_t t) { return weight == nullptr ? 1.0f : weight[t]; };
    thread_local std::vector<int32_t> tokens;
    thread_local std::vector<float> weights;
    tokens.clear();
    weights.clear();
    if (weighs(weight_of(token))) tokens.push_back(token);
    tokens.insert(tokens.end(), arrivals, arrivals + count);
    // Bits, since a thread may take subnormal weights for zero.
    uint32_t highest = 0;
    for (const int32_t t : tokens) highest = std::max(highest, weight_bits(weight_of(t)));
    const int32_t exponent = weight_exponent(float16_detail::float_of(highest), count + 1);
    float total = 0.0f;
    for (const int32_t t : tokens) {
        weights.push_back(scaled_weight(weight_of(t), exponent));
        total += weights.back();
    }
    multiversion<WeightedMean<T>>(x, stride, static_cast<const int32_t*>(tokens.data()),
                                  static_cast<const float*>(weights.data()),
                                  static_cast<int64_t>(tokens.size()),
                                  weight_divisor(total, eps, exponent), out, width);
}

}  // namespace lightvlm
