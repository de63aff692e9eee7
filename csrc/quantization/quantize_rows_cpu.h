// Rows of keys and values for the CPU twin of quantize_kv, vectorised: extremes of each channel,
// and codes of each token.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "quantization/packed_kv.h"
#include "quantization/packed_vector_cpu.h"
#include "quantization/quantize_kv.h"
#include "quantization/quantize_numbers.h"

namespace lightvlm::quantize_detail {

// Floats as integers in the same order: -0 just below 0, and what is not finite at the two ends.
template <typename T>
using Ordered = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;

template <typename Integer>
LIGHTVLM_INLINE Integer to_ordered(Integer bits) {
    constexpr int kSignBit = 8 * sizeof(Integer) - 1;
    return static_cast<Integer>(bits ^ ((bits >> kSignBit) & std::numeric_limits<Integer>::max()));
}

template <typename T>
LIGHTVLM_INLINE float from_ordered(Ordered<T> ordered) {
    const Ordered<T> bits = to_ordered(ordered);  // its own inverse
    T value;
    std::memcpy(&value, &bits, sizeof(value));
    return to_float(value);
}

// The bits of infinity.
template <typename T>
constexpr Ordered<T> kInfinityBits =
    std::is_same_v<T, float> ? 0x7f800000 : (std::is_same_v<T, half_t> ? 0x7c00 : 0x7f80);

// Extremes of the channels of one head: low and high of the keys, largest magnitude of the values.
template <typename T>
struct Extremes {
    Ordered<T> low[kPackedMaxHeadDim];
    Ordered<T> high[kPackedMaxHeadDim];
    Ordered<T> largest[kPackedMaxHeadDim];

    void clear() {
        std::fill_n(low, kPackedMaxHeadDim, std::numeric_limits<Ordered<T>>::max());
        std::fill_n(high, kPackedMaxHeadDim, std::numeric_limits<Ordered<T>>::min());
        std::fill_n(largest, kPackedMaxHeadDim, Ordered<T>{0});
    }
};

// Rows of one head: token n's numbers stand at data + n * stride.
template <typename T>
struct Rows {
    const T* data;
    int64_t stride;
};

// Brings in a row some tokens ahead: the hardware follows one head's rows only where they lie in
// one piece. An address past the end does no harm.
template <typename T>
LIGHTVLM_INLINE void prefetch_row(const T* row, int64_t width) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t d = 0; d < width; d += kLine) __builtin_prefetch(row + d);
}

// How many tokens ahead: the next group of this head's.
constexpr int64_t kPrefetchTokens = 8;

template <typename T>
struct RaiseExtremes {
    // Takes `count` tokens into the extremes of the first `width` channels.
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(Rows<T> key, Rows<T> value, int64_t count, int64_t width,
                                    Extremes<T>* extremes) {
        for (int64_t n = 0; n < count; n += kRows) {
            const Rows<T> keys{key.data + n * key.stride, key.stride};
            const Rows<T> values{value.data + n * value.stride, value.stride};
            const int64_t rows = count - n < kRows ? count - n : kRows;
            for (int64_t r = 0; r < rows; ++r) {
                prefetch_row(keys.data + (r + kPrefetchTokens) * key.stride, width);
                prefetch_row(values.data + (r + kPrefetchTokens) * value.stride, width);
            }
            // A register's worth at a time; of the last channels of a width of 80, half of that.
            constexpr int kLanes = kVectorLanes<level> * 4 / sizeof(T);
            int64_t d = 0;
            for (; d + kLanes <= width; d += kLanes) {
                columns<kLanes>(keys, values, rows, d, *extremes);
            }
            if constexpr (kLanes > 16) {
                if (d < width) columns<16>(keys, values, rows, d, *extremes);
            }
        }
    }

    // Rows that are read side by side: the more, the less often extremes are loaded and stored, but
    // the more streams there are for the hardware to follow.
    static constexpr int64_t kRows = 4;

    template <int kLanes>
    static LIGHTVLM_INLINE void columns(Rows<T> key, Rows<T> value, int64_t count, int64_t d,
                                        Extremes<T>& extremes) {
        using Vector = typename VectorOf<Ordered<T>, kLanes>::Type;
        constexpr auto kMagnitude = std::numeric_limits<Ordered<T>>::max();
        Vector low;
        Vector high;
        Vector largest;
        std::memcpy(&low, extremes.low + d, sizeof(low));
        std::memcpy(&high, extremes.high + d, sizeof(high));
        std::memcpy(&largest, extremes.largest + d, sizeof(largest));
        for (int64_t n = 0; n < count; ++n) {
            Vector bits;
            std::memcpy(&bits, key.data + n * key.stride + d, sizeof(bits));
            const Vector ordered = bits ^ (bits >> (8 * sizeof(Ordered<T>) - 1) & kMagnitude);
            low = ordered < low ? ordered : low;
            high = ordered > high ? ordered : high;
            std::memcpy(&bits, value.data + n * value.stride + d, sizeof(bits));
            const Vector magnitude = bits & kMagnitude;
            largest = magnitude > largest ? magnitude : largest;
        }
        std::memcpy(extremes.low + d, &low, sizeof(low));
        std::memcpy(extremes.high + d, &high, sizeof(high));
        std::memcpy(extremes.largest + d, &largest, sizeof(largest));
    }
};

// What the codes of a head's block are made with, by channel.
struct ChannelNumbers {
    alignas(64) float half_zero[kPackedMaxHeadDim];
    alignas(64) float inverse[kPackedMaxHeadDim];
    alignas(64) float weight[kPackedMaxHeadDim];  // 1 / value_channel
};

template <typename T, int kBits>
struct PackKeys {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(Rows<T> key, int64_t count, int64_t width,
                                    const ChannelNumbers* numbers, uint8_t* out,
                                    int64_t out_stride) {
        constexpr int kLanes = kVectorLanes<level>;
        using Vector = FloatVector<kLanes>;
        for (int64_t n = 0; n < count; ++n) {
            const T* row = key.data + n * key.stride;
            prefetch_row(row + kPrefetchTokens * key.stride, width);
            uint8_t* row_out = out + n * out_stride;
            for (int64_t d = 0; d < width; d += kCodeGroup) {
                Vector levels[kCodeGroup / kLanes];
                for (int i = 0; i < kCodeGroup / kLanes; ++i) {
                    const int64_t at = d + i * kLanes;
                    const Vector half = load_vector<kLanes>(row + at) * 0.5f;
                    levels[i] = (half - load_vector<kLanes>(numbers->half_zero + at)) *
                                load_vector<kLanes>(numbers->inverse + at);
                }
                store_group<kBits, kLanes>(levels, row_out + d * kBits / 8);
            }
            clear_past(width, kBits, row_out);
        }
    }
};

// The ValueToken of a few tokens, and the extremes that it comes from.
constexpr int kValueRows = 8;
struct ValueTokens {
    alignas(32) float low[kValueRows];
    alignas(32) float high[kValueRows];
    alignas(32) float zero_value[kValueRows];
    alignas(32) float inverse[kValueRows];
    alignas(16) half_t scale[kValueRows];
    alignas(16) half_t zero[kValueRows];
};

// From low and high the rest, as value_token_of().
template <CpuLevel level>
LIGHTVLM_INLINE void find_value_tokens(float levels, ValueTokens& tokens) {
#if defined(__x86_64__)
    if constexpr (level >= CpuLevel::kAvx2) {
        static_assert(kValueRows == 8);
        constexpr int kDown = 1;
        constexpr int kUp = 2;
        using Vector = FloatVector<8>;
        const Vector low = load_vector<8>(tokens.low) + 0.0f;
        const Vector high = load_vector<8>(tokens.high) + 0.0f;
        const auto zero = __builtin_ia32_vcvtps2ph256(low, kDown);
        const Vector zero_value = __builtin_ia32_vcvtph2ps256(zero);
        const Vector spread = (high - zero_value) * (1.0f / levels);
        const auto scale = __builtin_ia32_vcvtps2ph256(spread, kUp);
        const Vector scale_value = __builtin_ia32_vcvtph2ps256(scale);
        const Vector inverse = scale_value > 0.0f ? 1.0f / scale_value : Vector{};
        std::memcpy(tokens.zero, &zero, sizeof(zero));
        std::memcpy(tokens.scale, &scale, sizeof(scale));
        std::memcpy(tokens.zero_value, &zero_value, sizeof(zero_value));
        std::memcpy(tokens.inverse, &inverse, sizeof(inverse));
        return;
    }
#endif
    for (int r = 0; r < kValueRows; ++r) {
        const ValueToken one = value_token_of(tokens.low[r], tokens.high[r], levels);
        tokens.scale[r] = one.scale;
        tokens.zero[r] = one.zero;
        tokens.zero_value[r] = one.zero_value;
        tokens.inverse[r] = one.inverse;
    }
}

template <typename T, int kBits>
struct PackValues {
    // kValueRows tokens at a time: their numbers are found together.
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(Rows<T> value, int64_t count, int64_t width,
                                    const ChannelNumbers* numbers, uint8_t* out, int64_t out_stride,
                                    half_t* token, int64_t token_stride) {
        constexpr auto kLevels = static_cast<float>((1 << kBits) - 1);
        alignas(64) float shared[kValueRows][kPackedMaxHeadDim];
        ValueTokens tokens = {};
        for (int64_t n = 0; n < count; n += kValueRows) {
            const int64_t rows = count - n < kValueRows ? count - n : kValueRows;
            for (int64_t r = 0; r < rows; ++r) {
                const T* row = value.data + (n + r) * value.stride;
                prefetch_row(row + kPrefetchTokens * value.stride, width);
                share<level>(row, width, numbers->weight, shared[r], &tokens.low[r],
                             &tokens.high[r]);
            }
            find_value_tokens<level>(kLevels, tokens);
            for (int64_t r = 0; r < rows; ++r) {
                token[(n + r) * token_stride] = tokens.scale[r];
                token[(n + r) * token_stride + 1] = tokens.zero[r];
                pack<level>(shared[r], width, tokens.zero_value[r], tokens.inverse[r],
                            out + (n + r) * out_stride);
            }
        }
    }

    // A row in units of value_channel, and its extremes.
    template <CpuLevel level>
    static LIGHTVLM_INLINE void share(const T* row, int64_t width, const float* weight,
                                      float* shared, float* lowest, float* highest) {
        constexpr int kLanes = kVectorLanes<level>;
        using Vector = FloatVector<kLanes>;
        Vector low = load_vector<kLanes>(row) * load_vector<kLanes>(weight);
        Vector high = low;
        for (int64_t d = 0; d < width; d += kLanes) {
            const Vector one = load_vector<kLanes>(row + d) * load_vector<kLanes>(weight + d);
            std::memcpy(shared + d, &one, sizeof(one));
            low = one < low ? one : low;
            high = one > high ? one : high;
        }
        *lowest = fold_lanes<kLanes>(
            low, [](auto a, auto b) LIGHTVLM_INLINE_LAMBDA { return a < b ? a : b; });
        *highest = fold_lanes<kLanes>(
            high, [](auto a, auto b) LIGHTVLM_INLINE_LAMBDA { return a > b ? a : b; });
    }

    template <CpuLevel level>
    static LIGHTVLM_INLINE void pack(const float* shared, int64_t width, float zero, float inverse,
                                     uint8_t* out) {
        constexpr int kLanes = kVectorLanes<level>;
        for (int64_t d = 0; d < width; d += kCodeGroup) {
            FloatVector<kLanes> levels[kCodeGroup / kLanes];
            for (int i = 0; i < kCodeGroup / kLanes; ++i) {
                levels[i] = (load_vector<kLanes>(shared + d + i * kLanes) - zero) * inverse;
            }
            store_group<kBits, kLanes>(levels, out + d * kBits / 8);
        }
        clear_past(width, kBits, out);
    }
};

}  // namespace lightvlm::quantize_detail
