// Products of a tile: some tokens' keys or values in fp32, a row each, against up to kHeadTile
// heads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/multiversion.h"
#include "decode_attention/decode_span_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lightvlm::decode_detail {

constexpr int kTileTokens = 32;

// Rows that will be read next. They are fetched a few at a time, as memory takes no more at once.
struct NextRows {
    StridedRows strided;
    const char* const* listed;  // in pages, else null
    int64_t bytes;              // of a row
    int count;
    int done;

    LIGHTVLM_INLINE void fetch(int rows) {
        const int end = std::min(count, done + rows);
        for (; done < end; ++done) {
            const char* row = listed != nullptr ? listed[done] : strided[done];
            // Widths are multiples of 16 numbers; two lines at a time, as most have that many.
            int64_t at = 0;
            for (; at + 128 <= bytes; at += 128) {
                __builtin_prefetch(row + at, 0, 2);
                __builtin_prefetch(row + at + 64, 0, 2);
            }
            if (at < bytes) __builtin_prefetch(row + at, 0, 2);
        }
    }
};

// row[n][d]; up to a multiple of kTokenStep, tokens past `tokens` are rows of zeros.
struct Tile {
    const float* row[kTileTokens];
    int tokens;
    NextRows next;
};

constexpr int kTokenStep = 8;

// scores[h * kScorePitch + n] = unit * the sum over d of query[h * kMaxChannels + d] *
// tile.row[n][d]
template <CpuLevel level>
struct TileScores {
    static LIGHTVLM_INLINE void run(const float* query, Tile* tile, int heads, int64_t head_dim,
                                    float unit, float* scores) {
        for (int n = 0; n < tile->tokens; ++n) {
            const float* x = tile->row[n];
            for (int h = 0; h < heads; ++h) {
                const float* q = query + h * kMaxChannels;
                float sums[kLanes] = {};
                for (int64_t d = 0; d < head_dim; d += kLanes) {
                    for (int lane = 0; lane < kLanes; ++lane) {
                        sums[lane] += x[d + lane] * q[d + lane];
                    }
                }
                scores[h * kScorePitch + n] = fold_lanes(sums) * unit;
            }
        }
    }

  private:
    static constexpr int kLanes = 16;
};

// out[h * kMaxChannels + d] = (first ? 0 : itself) + the sum over the tile's n of
// weight[h * kScorePitch + n] * tile.row[n][d]
template <CpuLevel level>
struct TileValues {
    static LIGHTVLM_INLINE void run(const float* weight, Tile* tile, int heads, int64_t head_dim,
                                    bool first, float* out) {
        constexpr int kLanes = 16;
        for (int h = 0; h < heads; ++h) {
            float* o = out + h * kMaxChannels;
            const float* w = weight + h * kScorePitch;
            for (int64_t d = 0; d < head_dim; d += kLanes) {
                float sums[kLanes] = {};
                for (int n = 0; n < tile->tokens; ++n) {
                    const float* x = tile->row[n] + d;
                    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += w[n] * x[lane];
                }
                for (int lane = 0; lane < kLanes; ++lane) {
                    o[d + lane] = first ? sums[lane] : o[d + lane] + sums[lane];
                }
            }
        }
    }
};

#if defined(__x86_64__)

// fn(a constant of at most 3 heads, the first of them), until all had their turn. With 4 tokens or
// vectors of channels they take 12 sums of 16 registers; 2 take 8, as many as hide an addition's
// latency, so 4 heads are 2 and 2.
template <typename Fn>
LIGHTVLM_TARGET_AVX2 LIGHTVLM_INLINE void for_heads(int heads, const Fn& fn) {
    int h = 0;
    for (; heads - h >= 5 || heads - h == 3; h += 3) fn(std::integral_constant<int, 3>{}, h);
    for (; heads - h >= 2; h += 2) fn(std::integral_constant<int, 2>{}, h);
    if (heads - h == 1) fn(std::integral_constant<int, 1>{}, h);
}

// Loads once. GCC takes a load that is used twice for two operands in memory, and loads are scarce:
// two a cycle, as are products.
LIGHTVLM_TARGET_AVX2 LIGHTVLM_INLINE __m256 load_once(const float* at) {
    __m256 loaded = _mm256_loadu_ps(at);
    __asm__("" : "+x"(loaded));
    return loaded;
}

template <>
struct TileScores<CpuLevel::kAvx2> {
    LIGHTVLM_TARGET_AVX2 static void run(const float* query, Tile* tile, int heads,
                                         int64_t head_dim, float unit, float* scores) {
        // As many rows as tokens: one head takes its tokens in one turn, 3 in two, more in four.
        const int share = heads == 1 ? 8 : heads <= 3 ? 4 : 2;
        for (int n = 0; n < tile->tokens; n += kTokenStep) {
            for_heads(heads, [&](auto count, int h) LIGHTVLM_TARGET_AVX2 {
                constexpr int kHeads = decltype(count)::value;
                constexpr int kTokens = kHeads == 1 ? 8 : 4;
                for (int i = 0; i < kTokenStep; i += kTokens) {
                    tile->next.fetch(share);
                    some<kHeads, kTokens>(query + h * kMaxChannels, tile->row + n + i, head_dim,
                                          unit, scores + h * kScorePitch + n + i);
                }
            });
        }
    }

  private:
    // Lanes a0 + a2, a1 + a3, b2 + b0, b3 + b1 of each half.
    LIGHTVLM_TARGET_AVX2 static LIGHTVLM_INLINE __m256 halve(__m256 a, __m256 b) {
        return _mm256_add_ps(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, 0x4e));
    }

    // Of 4 vectors the sums of each one's low and high 4 lanes, side by side in each half. hadd
    // would take twice the shuffles, which share a port with the products.
    LIGHTVLM_TARGET_AVX2 static LIGHTVLM_INLINE __m256 add_lanes(const __m256* s) {
        const __m256 ab = halve(s[0], s[1]);
        const __m256 cd = halve(s[2], s[3]);
        return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x88), _mm256_shuffle_ps(ab, cd, 0xdd));
    }

    // Sums of 8 channels in each lane; what the lanes have is added up at the end.
    template <int kHeads, int kTokens>
    LIGHTVLM_TARGET_AVX2 static LIGHTVLM_INLINE void some(const float* query,
                                                          const float* const* row, int64_t head_dim,
                                                          float unit, float* scores) {
        __m256 sums[kHeads][kTokens];
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; ++i) sums[h][i] = _mm256_setzero_ps();
        }
        for (int64_t d = 0; d < head_dim; d += 8) {
            __m256 q[kHeads];
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; ++h) q[h] = _mm256_loadu_ps(query + h * kMaxChannels + d);
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; ++i) {
                const __m256 k = load_once(row[i] + d);
#pragma GCC unroll 8
                for (int h = 0; h < kHeads; ++h) sums[h][i] = _mm256_fmadd_ps(k, q[h], sums[h][i]);
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; i += 4) {
                const __m256 quarters = add_lanes(sums[h] + i);
                const __m128 four = _mm_add_ps(_mm256_castps256_ps128(quarters),
                                               _mm256_extractf128_ps(quarters, 1));
                _mm_storeu_ps(scores + h * kScorePitch + i, _mm_mul_ps(four, _mm_set1_ps(unit)));
            }
        }
    }
};

template <>
struct TileValues<CpuLevel::kAvx2> {
    LIGHTVLM_TARGET_AVX2 static void run(const float* weight, Tile* tile, int heads,
                                         int64_t head_dim, bool first, float* out) {
        // Of the tile's next rows, what one of about heads / 3 * head_dim / 32 turns fetches.
        const int share = static_cast<int>(kTileTokens * 96 / (heads * head_dim)) + 1;
        for_heads(heads, [&](auto count, int h) LIGHTVLM_TARGET_AVX2 {
            constexpr int kHeads = decltype(count)::value;
            const float* w = weight + h * kScorePitch;
            float* o = out + h * kMaxChannels;
            int64_t d = 0;
            if constexpr (kHeads == 1) {
                for (; d + 64 <= head_dim; d += 64) {
                    tile->next.fetch(2 * share);
                    some<1, 8>(w, *tile, d, first, o);
                }
            }
            for (; d + 32 <= head_dim; d += 32) {
                tile->next.fetch(share);
                some<kHeads, 4>(w, *tile, d, first, o);
            }
            if (d < head_dim) some<kHeads, 2>(w, *tile, d, first, o);  // widths are 16 * n
        });
    }

  private:
    template <int kHeads, int kVectors>
    LIGHTVLM_TARGET_AVX2 static LIGHTVLM_INLINE void some(const float* weight, const Tile& tile,
                                                          int64_t d, bool first, float* out) {
        __m256 sums[kHeads][kVectors];
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) sums[h][i] = _mm256_setzero_ps();
        }
        for (int n = 0; n < tile.tokens; ++n) {
            __m256 w[kHeads];
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; ++h) w[h] = _mm256_set1_ps(weight[h * kScorePitch + n]);
            const float* row = tile.row[n] + d;
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) {
                const __m256 v = load_once(row + 8 * i);
#pragma GCC unroll 8
                for (int h = 0; h < kHeads; ++h) sums[h][i] = _mm256_fmadd_ps(v, w[h], sums[h][i]);
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) {
                float* o = out + h * kMaxChannels + d + 8 * i;
                _mm256_storeu_ps(
                    o, first ? sums[h][i] : _mm256_add_ps(_mm256_loadu_ps(o), sums[h][i]));
            }
        }
    }
};

#endif

// Two vectors of 256 bits are as good as one of 512 here.
constexpr CpuLevel tile_level(CpuLevel level) {
    return level >= CpuLevel::kAvx2 ? CpuLevel::kAvx2 : CpuLevel::kPortable;
}

}  // namespace lightvlm::decode_detail
