// The unit of work of the CPU twin: a span, up to kSpanTokens tokens of one segment, batch row and
// key/value head that share channel parameters, against up to kHeadTile query heads of the group.
//
//   scores   s[h][n] = unit * <q[h], k[n]>, in units of log2 (unit = scale * log2 e)
//   softmax  p[h][n] = 2^(s - m[h]), m[h] the span's maximum, l[h] the sum of p
//   values   o[h][d] = sum over n of p[h][n] * v[n][d]
//
// Here are what the steps share, and softmax. Scores and values are decode_float_cpu.h, for every
// format and processor, and the faster ones of decode_attention_cpu.cpp's choice.
#pragma once

#include <cstdint>
#include <limits>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "decode_attention/decode_attention.h"

namespace lightvlm::decode_detail {

constexpr int kHeadTile = 8;
// So many products of a 16-bit weight and an 8-bit code fit the sums of 32 bits.
constexpr int kSpanTokens = 256;
constexpr int kMaxChannels = 256;

struct Span {
    KVFormat format;
    int bits;  // of a code; packed formats only
    int tokens;
    int heads;
    int64_t head_dim;
    int64_t channels;  // head_dim rounded up to kPackedChannelMultiple
    float unit;

    // Of the first token; strides in bytes.
    const char* key;
    const char* value;
    int64_t key_stride;
    int64_t value_stride;

    // Packed formats only.
    const float* key_scale;
    const float* key_zero;
    const float* value_channel;
    const uint16_t* value_token;
    int64_t value_token_stride;  // in numbers
};

// What one thread needs. Rows of heads: scores[h * kSpanTokens + n], out[h * kMaxChannels + d].
struct alignas(64) SpanScratch {
    float query[kHeadTile * kMaxChannels];  // not scaled; 0 past head_dim
    float scores[kHeadTile * kSpanTokens];
    float out[kHeadTile * kMaxChannels];
    float highest[kHeadTile];
    float sum[kHeadTile];
    // Bytes that scores and values use as they like.
    unsigned char work[kSpanTokens * kMaxChannels * 2 + kHeadTile * kSpanTokens * 8];
};

// The sum of 16 numbers, in halves; they are overwritten.
LIGHTVLM_INLINE float fold_lanes(float* sum) {
    for (int half = 8; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
    }
    return sum[0];
}

// 2^x for x <= 0 with a relative error of about 1e-7; 0 below -126 where floats become subnormal,
// NaN for NaN. Taylor's polynomial of 2^r for |r| <= 1/2. Plain arithmetic, so that it vectorises.
LIGHTVLM_INLINE float exp2_of_negative(float x) {
    constexpr float kLow = -126.0f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const bool too_low = x < kLow;
    x = too_low ? kLow : x;
    const float shifted = x + kRound;
    const float r = x - (shifted - kRound);
    float y = 1.5403530e-4f;
    y = y * r + 1.3333558e-3f;
    y = y * r + 9.6181291e-3f;
    y = y * r + 5.5504109e-2f;
    y = y * r + 2.4022651e-1f;
    y = y * r + 6.9314718e-1f;
    y = y * r + 1.0f;
    const uint32_t power = (float16_detail::float_bits(shifted) - 0x4b400000u + 127u) << 23;
    return too_low ? 0.0f : y * float16_detail::float_of(power);
}

// In place; tokens past the span's get a p of 0, up to a multiple of 32.
struct SpanSoftmax {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(int heads, int tokens, float* scores, float* highest,
                                    float* sum) {
        constexpr int kLanes = 16;
        constexpr float kHidden = -std::numeric_limits<float>::infinity();
        const int padded = (tokens + 31) / 32 * 32;
        for (int h = 0; h < heads; ++h) {
            float* s = scores + h * kSpanTokens;
            for (int n = tokens; n < padded; ++n) s[n] = kHidden;
            float most[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) most[lane] = kHidden;
            for (int n = 0; n < padded; n += kLanes) {
                // A NaN is not noticed here, but makes the sum of exponentials one.
                for (int lane = 0; lane < kLanes; ++lane) {
                    most[lane] = s[n + lane] > most[lane] ? s[n + lane] : most[lane];
                }
            }
            float top = most[0];
            for (int lane = 1; lane < kLanes; ++lane) top = most[lane] > top ? most[lane] : top;
            highest[h] = top;
            // All scores -inf: 2^(-inf - 0) is 0, where -inf - -inf would be NaN.
            const float shift = top > kHidden ? top : 0.0f;
            float total[kLanes] = {};
            for (int n = 0; n < padded; n += kLanes) {
                for (int lane = 0; lane < kLanes; ++lane) {
                    const float p = exp2_of_negative(s[n + lane] - shift);
                    s[n + lane] = p;
                    total[lane] += p;
                }
            }
            sum[h] = fold_lanes(total);
        }
    }
};

}  // namespace lightvlm::decode_detail
