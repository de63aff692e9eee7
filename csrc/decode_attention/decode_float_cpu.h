// Scores and values of a span in fp32: every format, every processor. Tokens are widened to fp32 a
// tile at a time; the values' channel factors alone wait until the end.
#pragma once

#include <cstdint>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "decode_attention/decode_span_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lightvlm::decode_detail {

constexpr int kTileTokens = 8;

// A tile of tokens: widened[n * channels + d]; tokens past `count` and channels past head_dim are
// 0.
template <typename T, bool keys>
LIGHTVLM_INLINE void widen_dense(const Span& span, int begin, int count, float* widened) {
    for (int n = begin; n < begin + count; ++n) {
        const T* row = reinterpret_cast<const T*>(keys ? span.key_row(n) : span.value_row(n));
        float* out = widened + (n - begin) * span.channels;
        for (int64_t d = 0; d < span.head_dim; ++d) out[d] = to_float(row[d]);
        for (int64_t d = span.head_dim; d < span.channels; ++d) out[d] = 0.0f;
    }
}

// Keys: scale[d] * code + zero[d]. Values: the token's scale * code + zero.
template <int bits, bool keys>
LIGHTVLM_INLINE void widen_codes(const Span& span, int begin, int count, float* widened) {
    constexpr int kPerByte = 8 / bits;
    constexpr int kMask = (1 << bits) - 1;
    for (int n = begin; n < begin + count; ++n) {
        const auto* row =
            reinterpret_cast<const uint8_t*>(keys ? span.key_row(n) : span.value_row(n));
        const uint16_t* pair = span.value_token + n * span.value_token_stride;
        const float token_scale = keys ? 0.0f : to_float(half_t{pair[0]});
        const float token_zero = keys ? 0.0f : to_float(half_t{pair[1]});
        float* out = widened + (n - begin) * span.channels;
        for (int64_t i = 0; i < span.head_dim / kPerByte; ++i) {
            for (int k = 0; k < kPerByte; ++k) {
                const int64_t d = i * kPerByte + k;
                const auto code = static_cast<float>(row[i] >> (k * bits) & kMask);
                out[d] = keys ? code * span.key_scale[d] + span.key_zero[d]
                              : code * token_scale + token_zero;
            }
        }
        for (int64_t d = span.head_dim; d < span.channels; ++d) out[d] = 0.0f;
    }
}

// Tokens [begin, begin + count) of the span's keys or values.
template <bool keys>
LIGHTVLM_INLINE void widen(const Span& span, int begin, int count, float* widened) {
    switch (span.format) {
        case KVFormat::kFloat32:
            widen_dense<float, keys>(span, begin, count, widened);
            break;
        case KVFormat::kFloat16:
            widen_dense<half_t, keys>(span, begin, count, widened);
            break;
        case KVFormat::kBFloat16:
            widen_dense<bfloat16_t, keys>(span, begin, count, widened);
            break;
        case KVFormat::kPacked8:
            widen_codes<8, keys>(span, begin, count, widened);
            break;
        case KVFormat::kPacked4:
            widen_codes<4, keys>(span, begin, count, widened);
            break;
        case KVFormat::kPacked2:
            widen_codes<2, keys>(span, begin, count, widened);
            break;
    }
    for (int64_t i = count * span.channels; i < kTileTokens * span.channels; ++i) widened[i] = 0.0f;
}

// Channels that are summed before the sum joins the rest: keeps rounding errors small. It divides
// every number of channels.
constexpr int64_t kSumBlock = 16;

// out[n * kHeadTile + h] = sum over d of query[d * kHeadTile + h] * tile[n * channels + d]
template <CpuLevel level>
struct TileScores {
    static LIGHTVLM_INLINE void run(const float* query, const float* tile, int64_t channels,
                                    float* out) {
        for (int i = 0; i < kTileTokens * kHeadTile; ++i) out[i] = 0.0f;
        for (int64_t begin = 0; begin < channels; begin += kSumBlock) {
            float sums[kTileTokens][kHeadTile] = {};
            for (int64_t d = begin; d < begin + kSumBlock; ++d) {
                for (int n = 0; n < kTileTokens; ++n) {
                    const float x = tile[n * channels + d];
                    for (int h = 0; h < kHeadTile; ++h) sums[n][h] += x * query[d * kHeadTile + h];
                }
            }
            for (int n = 0; n < kTileTokens; ++n) {
                for (int h = 0; h < kHeadTile; ++h) out[n * kHeadTile + h] += sums[n][h];
            }
        }
    }
};

// out[h * kMaxChannels + d] += the sum over the tile's n of weight[h * kScorePitch + n] * tile[n,
// d]
template <CpuLevel level>
struct TileValues {
    static LIGHTVLM_INLINE void run(const float* weight, const float* tile, int heads,
                                    int64_t channels, float* out) {
        constexpr int kLanes = 16;
        for (int h = 0; h < heads; ++h) {
            float* o = out + h * kMaxChannels;
            const float* w = weight + h * kScorePitch;
            for (int64_t d = 0; d < channels; d += kLanes) {
                float sums[kLanes] = {};
                for (int n = 0; n < kTileTokens; ++n) {
                    const float* x = tile + n * channels + d;
                    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += w[n] * x[lane];
                }
                for (int lane = 0; lane < kLanes; ++lane) o[d + lane] += sums[lane];
            }
        }
    }
};

#if defined(__x86_64__)

// Heads across the lanes, 8 tokens side by side: 9 of 16 registers.
template <>
struct TileScores<CpuLevel::kAvx2> {
    LIGHTVLM_TARGET_AVX2 static void run(const float* query, const float* tile, int64_t channels,
                                         float* out) {
        for (int64_t begin = 0; begin < channels; begin += kSumBlock) {
            __m256 sums[kTileTokens];
            for (int n = 0; n < kTileTokens; ++n) sums[n] = _mm256_setzero_ps();
            for (int64_t d = begin; d < begin + kSumBlock; ++d) {
                const __m256 q = _mm256_loadu_ps(query + d * kHeadTile);
                for (int n = 0; n < kTileTokens; ++n) {
                    sums[n] = _mm256_fmadd_ps(_mm256_set1_ps(tile[n * channels + d]), q, sums[n]);
                }
            }
            for (int n = 0; n < kTileTokens; ++n) {
                float* to = out + n * kHeadTile;
                _mm256_storeu_ps(
                    to, begin == 0 ? sums[n] : _mm256_add_ps(_mm256_loadu_ps(to), sums[n]));
            }
        }
    }
};

// 4 heads against 2 vectors of channels: 11 of 16 registers.
template <>
struct TileValues<CpuLevel::kAvx2> {
    LIGHTVLM_TARGET_AVX2 static void run(const float* weight, const float* tile, int heads,
                                         int64_t channels, float* out) {
        int h = 0;
        for (; h + 4 <= heads; h += 4) some<4>(weight, tile, h, channels, out);
        for (; h < heads; ++h) some<1>(weight, tile, h, channels, out);
    }

  private:
    template <int kHeads>
    LIGHTVLM_TARGET_AVX2 static void some(const float* weight, const float* tile, int head,
                                          int64_t channels, float* out) {
        for (int64_t d = 0; d < channels; d += 16) {
            __m256 sums[kHeads][2];
            for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = _mm256_setzero_ps();
            for (int n = 0; n < kTileTokens; ++n) {
                const __m256 low = _mm256_loadu_ps(tile + n * channels + d);
                const __m256 high = _mm256_loadu_ps(tile + n * channels + d + 8);
                for (int h = 0; h < kHeads; ++h) {
                    const __m256 w = _mm256_set1_ps(weight[(head + h) * kScorePitch + n]);
                    sums[h][0] = _mm256_fmadd_ps(w, low, sums[h][0]);
                    sums[h][1] = _mm256_fmadd_ps(w, high, sums[h][1]);
                }
            }
            for (int h = 0; h < kHeads; ++h) {
                float* o = out + (head + h) * kMaxChannels + d;
                _mm256_storeu_ps(o, _mm256_add_ps(_mm256_loadu_ps(o), sums[h][0]));
                _mm256_storeu_ps(o + 8, _mm256_add_ps(_mm256_loadu_ps(o + 8), sums[h][1]));
            }
        }
    }
};

#endif

// Two vectors of 256 bits are as good as one of 512 here.
constexpr CpuLevel tile_level(CpuLevel level) {
    return level >= CpuLevel::kAvx2 ? CpuLevel::kAvx2 : CpuLevel::kPortable;
}

struct FloatScores {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const Span* span_, SpanScratch* scratch, float* scores) {
        const Span& span = *span_;
        auto* across = reinterpret_cast<float*>(scratch->work);  // [channels][kHeadTile]
        float* tile = across + kMaxChannels * kHeadTile;         // [kTileTokens][channels]
        float* products = tile + kTileTokens * kMaxChannels;     // [kTileTokens][kHeadTile]
        for (int64_t d = 0; d < span.channels; ++d) {
            for (int h = 0; h < kHeadTile; ++h) {
                across[d * kHeadTile + h] =
                    h < span.heads ? scratch->query[h * kMaxChannels + d] : 0.0f;
            }
        }
        for (int begin = 0; begin < span.tokens; begin += kTileTokens) {
            const int left = span.tokens - begin;
            const int count = left < kTileTokens ? left : kTileTokens;
            widen<true>(span, begin, count, tile);
            TileScores<tile_level(level)>::run(across, tile, span.channels, products);
            for (int h = 0; h < span.heads; ++h) {
                float* to = scores + h * kScorePitch + begin;
                for (int n = 0; n < count; ++n) to[n] = products[n * kHeadTile + h] * span.unit;
            }
        }
    }
};

struct FloatValues {
    // p: [heads][kScorePitch], 0 past the span's tokens.
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const Span* span_, const float* p, SpanScratch* scratch) {
        const Span& span = *span_;
        auto* tile = reinterpret_cast<float*>(scratch->work);
        for (int h = 0; h < span.heads; ++h) {
            for (int64_t d = 0; d < span.channels; ++d) scratch->out[h * kMaxChannels + d] = 0.0f;
        }
        for (int begin = 0; begin < span.tokens; begin += kTileTokens) {
            const int left = span.tokens - begin;
            const int count = left < kTileTokens ? left : kTileTokens;
            widen<false>(span, begin, count, tile);
            TileValues<tile_level(level)>::run(p + begin, tile, span.heads, span.channels,
                                               scratch->out);
        }
        for (int h = 0; is_packed(span.format) && h < span.heads; ++h) {
            float* out = scratch->out + h * kMaxChannels;
            for (int64_t d = 0; d < span.head_dim; ++d) out[d] *= span.value_channel[d];
        }
    }
};

}  // namespace lightvlm::decode_detail
