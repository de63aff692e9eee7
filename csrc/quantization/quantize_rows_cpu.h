// Rows of keys and values for the CPU twin of quantize_kv, vectorised: extremes of each channel,
// and codes of each token.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "quantization/packed_kv.h"
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

template <typename T>
struct RaiseExtremes {
    // Takes `count` tokens into the extremes of the first `width` channels.
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(Rows<T> key, Rows<T> value, int64_t count, int64_t width,
                                    Extremes<T>* extremes) {
        int64_t d = 0;
        for (; d + 32 <= width; d += 32) columns<32>(key, value, count, d, *extremes);
        for (; d < width; d += 16) columns<16>(key, value, count, d, *extremes);
    }

    template <int kLanes>
    static LIGHTVLM_INLINE void columns(Rows<T> key, Rows<T> value, int64_t count, int64_t d,
                                        Extremes<T>& extremes) {
        using Integer = Ordered<T>;
        Integer low[kLanes];
        Integer high[kLanes];
        Integer largest[kLanes];
        std::memcpy(low, extremes.low + d, sizeof(low));
        std::memcpy(high, extremes.high + d, sizeof(high));
        std::memcpy(largest, extremes.largest + d, sizeof(largest));
        for (int64_t n = 0; n < count; ++n) {
            Integer bits[kLanes];
            std::memcpy(bits, key.data + n * key.stride + d, sizeof(bits));
            for (int i = 0; i < kLanes; ++i) {
                const Integer one = to_ordered(bits[i]);
                low[i] = one < low[i] ? one : low[i];
                high[i] = one > high[i] ? one : high[i];
            }
            std::memcpy(bits, value.data + n * value.stride + d, sizeof(bits));
            for (int i = 0; i < kLanes; ++i) {
                const auto one =
                    static_cast<Integer>(bits[i] & std::numeric_limits<Integer>::max());
                largest[i] = one > largest[i] ? one : largest[i];
            }
        }
        std::memcpy(extremes.low + d, low, sizeof(low));
        std::memcpy(extremes.high + d, high, sizeof(high));
        std::memcpy(extremes.largest + d, largest, sizeof(largest));
    }
};

// Codes of one token to a row of packed_row_bytes(); those past width are 0 already.
template <int kBits>
LIGHTVLM_INLINE void pack_row(const uint8_t* codes, int64_t row_bytes, uint8_t* row) {
    constexpr int kPerByte = 8 / kBits;
    for (int64_t i = 0; i < row_bytes; ++i) {
        unsigned byte = 0;
        for (int j = 0; j < kPerByte; ++j) {
            byte |= static_cast<unsigned>(codes[i * kPerByte + j]) << (j * kBits);
        }
        row[i] = static_cast<uint8_t>(byte);
    }
}

// What the codes of a head's block are made with, by channel.
struct ChannelNumbers {
    float half_zero[kPackedMaxHeadDim];
    float inverse[kPackedMaxHeadDim];
    float weight[kPackedMaxHeadDim];  // 1 / value_channel
};

template <typename T, int kBits>
struct PackKeys {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(Rows<T> key, int64_t count, int64_t width,
                                    const ChannelNumbers* numbers, uint8_t* out,
                                    int64_t out_stride) {
        alignas(64) uint8_t codes[kPackedMaxHeadDim] = {};
        const int64_t row_bytes = packed_row_bytes(width, kBits);
        for (int64_t n = 0; n < count; ++n) {
            const T* row = key.data + n * key.stride;
            for (int64_t d = 0; d < width; ++d) {
                const float at =
                    key_level(to_float(row[d]), numbers->half_zero[d], numbers->inverse[d]);
                codes[d] = static_cast<uint8_t>(code_of(at));
            }
            pack_row<kBits>(codes, row_bytes, out + n * out_stride);
        }
    }
};

template <typename T, int kBits>
struct PackValues {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(Rows<T> value, int64_t count, int64_t width,
                                    const ChannelNumbers* numbers, uint8_t* out, int64_t out_stride,
                                    half_t* token, int64_t token_stride) {
        constexpr int kLanes = 16;
        constexpr auto kLevels = static_cast<float>((1 << kBits) - 1);
        alignas(64) float shared[kPackedMaxHeadDim];
        alignas(64) uint8_t codes[kPackedMaxHeadDim] = {};
        const int64_t row_bytes = packed_row_bytes(width, kBits);
        for (int64_t n = 0; n < count; ++n) {
            const T* row = value.data + n * value.stride;
            float low[kLanes];
            float high[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                low[i] = high[i] = rounded_product(to_float(row[i]), numbers->weight[i]);
            }
            for (int64_t d = 0; d < width; d += kLanes) {
                for (int i = 0; i < kLanes; ++i) {
                    const float one = rounded_product(to_float(row[d + i]), numbers->weight[d + i]);
                    shared[d + i] = one;
                    low[i] = one < low[i] ? one : low[i];
                    high[i] = one > high[i] ? one : high[i];
                }
            }
            for (int half = kLanes / 2; half > 0; half /= 2) {
                for (int i = 0; i < half; ++i) {
                    low[i] = low[i + half] < low[i] ? low[i + half] : low[i];
                    high[i] = high[i + half] > high[i] ? high[i + half] : high[i];
                }
            }
            const ValueToken pair = value_token_of(low[0], high[0], kLevels);
            token[n * token_stride] = pair.scale;
            token[n * token_stride + 1] = pair.zero;
            for (int64_t d = 0; d < width; ++d) {
                const float at = rounded_product(shared[d] - pair.zero_value, pair.inverse);
                codes[d] = static_cast<uint8_t>(code_of(at));
            }
            pack_row<kBits>(codes, row_bytes, out + n * out_stride);
        }
    }
};

}  // namespace lightvlm::quantize_detail
