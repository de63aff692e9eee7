// Scores and values of a span in fp32: every format, every processor. What is not fp32 is widened a
// tile of tokens at a time; the values' channel factors alone wait until the end.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "decode_attention/decode_span_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lightvlm::decode_detail {

constexpr int kTileTokens = 16;

// A tile of tokens in fp32: row[n][d]; tokens past the span's are rows of zeros.
struct Tile {
    const float* row[kTileTokens];
};

template <typename T, bool keys>
LIGHTVLM_INLINE void widen_dense(const Span& span, int begin, int count, float* widened) {
    for (int n = begin; n < begin + count; ++n) {
        const T* row = reinterpret_cast<const T*>(keys ? span.key_row(n) : span.value_row(n));
        float* out = widened + (n - begin) * span.head_dim;
        for (int64_t d = 0; d < span.head_dim; ++d) out[d] = to_float(row[d]);
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
        float* out = widened + (n - begin) * span.head_dim;
        for (int64_t i = 0; i < span.head_dim / kPerByte; ++i) {
            for (int k = 0; k < kPerByte; ++k) {
                const int64_t d = i * kPerByte + k;
                const auto code = static_cast<float>(row[i] >> (k * bits) & kMask);
                out[d] = keys ? code * span.key_scale[d] + span.key_zero[d]
                              : code * token_scale + token_zero;
            }
        }
    }
}

// Tokens [begin, begin + count) of the span's keys or values: where they are, or in `room`, which
// has a row for each token of a tile and one of zeros.
template <bool keys>
LIGHTVLM_INLINE Tile tile_of(const Span& span, int begin, int count, float* room) {
    Tile tile;
    const float* zeros = room + kTileTokens * kMaxChannels;
    for (int n = 0; n < kTileTokens; ++n)
        tile.row[n] = n < count ? room + n * span.head_dim : zeros;
    switch (span.format) {
        case KVFormat::kFloat32:
            for (int n = 0; n < count; ++n) {
                const char* row = keys ? span.key_row(begin + n) : span.value_row(begin + n);
                tile.row[n] = reinterpret_cast<const float*>(row);
            }
            break;
        case KVFormat::kFloat16:
            widen_dense<half_t, keys>(span, begin, count, room);
            break;
        case KVFormat::kBFloat16:
            widen_dense<bfloat16_t, keys>(span, begin, count, room);
            break;
        case KVFormat::kPacked8:
            widen_codes<8, keys>(span, begin, count, room);
            break;
        case KVFormat::kPacked4:
            widen_codes<4, keys>(span, begin, count, room);
            break;
        case KVFormat::kPacked2:
            widen_codes<2, keys>(span, begin, count, room);
            break;
    }
    return tile;
}

// Channels that are summed before the sum joins the rest: keeps rounding errors small. It divides
// every head_dim.
constexpr int64_t kSumBlock = 16;

// scores[h * kScorePitch + n] = unit * the sum over d of query[d * kHeadTile + h] * tile.row[n][d]
template <CpuLevel level>
struct TileScores {
    // turned: room for the tile with its tokens side by side.
    static LIGHTVLM_INLINE void run(const float* query, const Tile& tile, int heads,
                                    int64_t head_dim, float unit, float* /*turned*/,
                                    float* scores) {
        for (int n = 0; n < kTileTokens; n += kTokens) {
            float totals[kTokens][kHeadTile] = {};
            for (int64_t begin = 0; begin < head_dim; begin += kSumBlock) {
                float sums[kTokens][kHeadTile] = {};
                for (int64_t d = begin; d < begin + kSumBlock; ++d) {
                    for (int i = 0; i < kTokens; ++i) {
                        const float x = tile.row[n + i][d];
                        for (int h = 0; h < kHeadTile; ++h) {
                            sums[i][h] += x * query[d * kHeadTile + h];
                        }
                    }
                }
                for (int i = 0; i < kTokens; ++i) {
                    for (int h = 0; h < kHeadTile; ++h) totals[i][h] += sums[i][h];
                }
            }
            for (int h = 0; h < heads; ++h) {
                for (int i = 0; i < kTokens; ++i) {
                    scores[h * kScorePitch + n + i] = totals[i][h] * unit;
                }
            }
        }
    }

  private:
    static constexpr int kTokens = 2;  // side by side: as many sums as fit 16 registers of 128 bits
};

// out[h * kMaxChannels + d] += the sum over the tile's n of weight[h * kScorePitch + n] *
// tile.row[n][d]
template <CpuLevel level>
struct TileValues {
    static LIGHTVLM_INLINE void run(const float* weight, const Tile& tile, int heads,
                                    int64_t channels, float* out) {
        constexpr int kLanes = 16;
        for (int h = 0; h < heads; ++h) {
            float* o = out + h * kMaxChannels;
            const float* w = weight + h * kScorePitch;
            for (int64_t d = 0; d < channels; d += kLanes) {
                float sums[kLanes] = {};
                for (int n = 0; n < kTileTokens; ++n) {
                    const float* x = tile.row[n] + d;
                    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += w[n] * x[lane];
                }
                for (int lane = 0; lane < kLanes; ++lane) o[d + lane] += sums[lane];
            }
        }
    }
};

#if defined(__x86_64__)

// fn(a constant of at most 4 heads, the first of them), until all had their turn.
template <typename Fn>
LIGHTVLM_TARGET_AVX2 LIGHTVLM_INLINE void for_heads(int heads, const Fn& fn) {
    int h = 0;
    for (; h + 4 <= heads; h += 4) fn(std::integral_constant<int, 4>{}, h);
    if (heads - h == 3) fn(std::integral_constant<int, 3>{}, h);
    if (heads - h == 2) fn(std::integral_constant<int, 2>{}, h);
    if (heads - h == 1) fn(std::integral_constant<int, 1>{}, h);
}

// 16 tokens, two vectors, against 4 heads: 11 of 16 registers.
template <>
struct TileScores<CpuLevel::kAvx2> {
    LIGHTVLM_TARGET_AVX2 static void run(const float* query, const Tile& tile, int heads,
                                         int64_t head_dim, float unit, float* turned,
                                         float* scores) {
        for (int64_t d = 0; d < head_dim; d += 8) {
            turn(tile.row, d, turned + d * kTileTokens);
            turn(tile.row + 8, d, turned + d * kTileTokens + 8);
        }
        for_heads(heads, [&](auto count, int h) LIGHTVLM_TARGET_AVX2 {
            some<decltype(count)::value>(query + h, turned, head_dim, unit,
                                         scores + h * kScorePitch);
        });
    }

  private:
    // Channels [d, d + 8) of 8 tokens: out[channel * kTileTokens + token].
    LIGHTVLM_TARGET_AVX2 static void turn(const float* const* row, int64_t d, float* out) {
        __m256 half[8];
        for (int i = 0; i < 4; ++i) {
            // Tokens i and i + 4, channels 0 to 3 and 4 to 7.
            const __m256 a = _mm256_loadu_ps(row[i] + d);
            const __m256 b = _mm256_loadu_ps(row[i + 4] + d);
            half[i] = _mm256_permute2f128_ps(a, b, 0x20);
            half[i + 4] = _mm256_permute2f128_ps(a, b, 0x31);
        }
        for (int i = 0; i < 8; i += 4) {
            const __m256 low01 = _mm256_unpacklo_ps(half[i], half[i + 1]);
            const __m256 high01 = _mm256_unpackhi_ps(half[i], half[i + 1]);
            const __m256 low23 = _mm256_unpacklo_ps(half[i + 2], half[i + 3]);
            const __m256 high23 = _mm256_unpackhi_ps(half[i + 2], half[i + 3]);
            float* to = out + i * kTileTokens;
            _mm256_storeu_ps(to, _mm256_shuffle_ps(low01, low23, 0x44));
            _mm256_storeu_ps(to + kTileTokens, _mm256_shuffle_ps(low01, low23, 0xee));
            _mm256_storeu_ps(to + 2 * kTileTokens, _mm256_shuffle_ps(high01, high23, 0x44));
            _mm256_storeu_ps(to + 3 * kTileTokens, _mm256_shuffle_ps(high01, high23, 0xee));
        }
    }

    template <int kHeads>
    LIGHTVLM_TARGET_AVX2 static void some(const float* query, const float* turned, int64_t head_dim,
                                          float unit, float* scores) {
        for (int64_t begin = 0; begin < head_dim; begin += kSumBlock) {
            __m256 sums[kHeads][2];
            for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = _mm256_setzero_ps();
            for (int64_t d = begin; d < begin + kSumBlock; ++d) {
                const __m256 a = _mm256_loadu_ps(turned + d * kTileTokens);
                const __m256 b = _mm256_loadu_ps(turned + d * kTileTokens + 8);
                for (int h = 0; h < kHeads; ++h) {
                    const __m256 q = _mm256_set1_ps(query[d * kHeadTile + h]);
                    sums[h][0] = _mm256_fmadd_ps(a, q, sums[h][0]);
                    sums[h][1] = _mm256_fmadd_ps(b, q, sums[h][1]);
                }
            }
            for (int h = 0; h < kHeads; ++h) {
                for (int half = 0; half < 2; ++half) {
                    float* to = scores + h * kScorePitch + half * 8;
                    const __m256 sum = _mm256_mul_ps(sums[h][half], _mm256_set1_ps(unit));
                    _mm256_storeu_ps(to,
                                     begin == 0 ? sum : _mm256_add_ps(_mm256_loadu_ps(to), sum));
                }
            }
        }
    }
};

// 4 heads against 2 vectors of channels: 11 of 16 registers.
template <>
struct TileValues<CpuLevel::kAvx2> {
    LIGHTVLM_TARGET_AVX2 static void run(const float* weight, const Tile& tile, int heads,
                                         int64_t channels, float* out) {
        for_heads(heads, [&](auto count, int h) LIGHTVLM_TARGET_AVX2 {
            some<decltype(count)::value>(weight, tile, h, channels, out);
        });
    }

  private:
    template <int kHeads>
    LIGHTVLM_TARGET_AVX2 static void some(const float* weight, const Tile& tile, int head,
                                          int64_t channels, float* out) {
        for (int64_t d = 0; d < channels; d += 16) {
            __m256 sums[kHeads][2];
            for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = _mm256_setzero_ps();
            for (int n = 0; n < kTileTokens; ++n) {
                const __m256 low = _mm256_loadu_ps(tile.row[n] + d);
                const __m256 high = _mm256_loadu_ps(tile.row[n] + d + 8);
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

// The row of zeros of tile_of's room.
LIGHTVLM_INLINE void clear_row(float* room) {
    for (int d = 0; d < kMaxChannels; ++d) room[kTileTokens * kMaxChannels + d] = 0.0f;
}

struct FloatScores {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const Span* span_, SpanScratch* scratch, float* scores) {
        const Span& span = *span_;
        auto* across = reinterpret_cast<float*>(scratch->work);  // [head_dim][kHeadTile]
        float* turned = across + kMaxChannels * kHeadTile;       // [head_dim][kTileTokens]
        float* room = turned + kMaxChannels * kTileTokens;
        clear_row(room);
        for (int64_t d = 0; d < span.head_dim; ++d) {
            for (int h = 0; h < kHeadTile; ++h) {
                across[d * kHeadTile + h] =
                    h < span.heads ? scratch->query[h * kMaxChannels + d] : 0.0f;
            }
        }
        for (int begin = 0; begin < span.tokens; begin += kTileTokens) {
            const int left = span.tokens - begin;
            const int count = left < kTileTokens ? left : kTileTokens;
            const Tile tile = tile_of<true>(span, begin, count, room);
            TileScores<tile_level(level)>::run(across, tile, span.heads, span.head_dim, span.unit,
                                               turned, scores + begin);
        }
    }
};

struct FloatValues {
    // p: [heads][kScorePitch], 0 past the span's tokens.
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const Span* span_, const float* p, SpanScratch* scratch) {
        const Span& span = *span_;
        auto* room = reinterpret_cast<float*>(scratch->work);
        clear_row(room);
        for (int h = 0; h < span.heads; ++h) {
            for (int64_t d = 0; d < span.channels; ++d) scratch->out[h * kMaxChannels + d] = 0.0f;
        }
        for (int begin = 0; begin < span.tokens; begin += kTileTokens) {
            const int left = span.tokens - begin;
            const int count = left < kTileTokens ? left : kTileTokens;
            const Tile tile = tile_of<false>(span, begin, count, room);
            TileValues<tile_level(level)>::run(p + begin, tile, span.heads, span.head_dim,
                                               scratch->out);
        }
        for (int h = 0; is_packed(span.format) && h < span.heads; ++h) {
            float* out = scratch->out + h * kMaxChannels;
            for (int64_t d = 0; d < span.head_dim; ++d) out[d] *= span.value_channel[d];
        }
    }
};

}  // namespace lightvlm::decode_detail
