// Scores and values of a bf16 span with vdpbf16ps, for bf16 queries: exact products of 16-bit
// numbers, summed in fp32. Weights are rounded to bf16 before they meet the values, as in any
// attention in that precision; their sum is not.
//
// Two vectors of tokens (keys) or channels (values) against up to 8 heads at a time, laid out as
// decode_rows_cpu.h does: 16 sums, 2 vectors, a weight.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "decode_attention/decode_rows_cpu.h"
#include "decode_attention/decode_span_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace lightvlm::decode_detail {

// How SpanScratch::work is used. 64 bytes of the rows are paired at a time.
struct Bf16Work {
    alignas(64) uint32_t dwords[kMaxChannels / 2 * 32];
    alignas(64) __m512i pairs[kSpanTokens];
    uint32_t query[kMaxChannels / 2 * kHeadTile];  // [pair of channels][head]
    bfloat16_t weights[kHeadTile * kSpanTokens];
};
static_assert(sizeof(Bf16Work) <= sizeof(SpanScratch::work));

LIGHTVLM_TARGET_AVX512_BF16 LIGHTVLM_INLINE __m512 dot_bf16(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

template <int kHeads, typename Rows>
LIGHTVLM_TARGET_AVX512_BF16 void score_bf16(const Span& span, const SpanRows<Rows>& rows,
                                            Bf16Work* work, float* scores) {
    const __m512 unit = _mm512_set1_ps(span.unit);
    RowsAhead<Rows> ahead(rows.value, span.head_dim * 2);
    for (int n = 0; n < span.tokens; n += 32) {
        transpose_rows(rows.key, span.tokens, n, span.head_dim * 2, work->dwords);
        __m512 sums[kHeads][2];
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = _mm512_setzero_ps();
        for (int64_t j = 0; j < span.head_dim / 2; ++j) {
            ahead.step();
            ahead.step();
            const __m512i a = _mm512_load_si512(work->dwords + j * 32);
            const __m512i b = _mm512_load_si512(work->dwords + j * 32 + 16);
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; ++h) {
                const __m512i q =
                    _mm512_set1_epi32(static_cast<int>(work->query[j * kHeadTile + h]));
                sums[h][0] = dot_bf16(sums[h][0], a, q);
                sums[h][1] = dot_bf16(sums[h][1], b, q);
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
            float* to = scores + h * kScorePitch + n;
            _mm512_storeu_ps(to, _mm512_mul_ps(sums[h][0], unit));
            _mm512_storeu_ps(to + 16, _mm512_mul_ps(sums[h][1], unit));
        }
    }
}

template <int kHeads, typename Rows>
LIGHTVLM_TARGET_AVX512_BF16 void value_bf16(const Span& span, const SpanRows<Rows>& rows,
                                            Bf16Work* work, float* out) {
    RowsAhead<Rows> ahead(rows.next_key, span.head_dim * 2);
    for (int64_t d = 0; d < span.channels; d += 32) {
        pair_rows(rows.value, span.tokens, span.head_dim * 2, d / 16, work->pairs);
        __m512 sums[kHeads][2];
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = _mm512_setzero_ps();
        if (d + 16 >= span.head_dim) {
            for (int i = kSpanTokens / 2; i < kSpanTokens; ++i) work->pairs[i] = __m512i{};
        }
        for (int n = 0; n < span.tokens; n += 2) {
            ahead.step();
            ahead.step();
            const __m512i a = _mm512_load_si512(work->pairs + n / 2);
            const __m512i b = _mm512_load_si512(work->pairs + (kSpanTokens + n) / 2);
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; ++h) {
                int pair;
                std::memcpy(&pair, work->weights + h * kSpanTokens + n, sizeof(pair));
                const __m512i w = _mm512_set1_epi32(pair);
                sums[h][0] = dot_bf16(sums[h][0], a, w);
                sums[h][1] = dot_bf16(sums[h][1], b, w);
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
            _mm512_storeu_ps(out + h * kMaxChannels + d, sums[h][0]);
            _mm512_storeu_ps(out + h * kMaxChannels + d + 16, sums[h][1]);
        }
    }
}

LIGHTVLM_TARGET_AVX512_BF16 inline void pack_bf16_query(const Span& span, const float* query,
                                                        uint32_t* pairs) {
    for (int h = 0; h < span.heads; ++h) {
        const float* q = query + h * kMaxChannels;
        for (int64_t j = 0; j < span.head_dim / 2; ++j) {
            // They come from bf16: the upper halves are all there is.
            pairs[j * kHeadTile + h] = float16_detail::float_bits(q[2 * j]) >> 16 |
                                       (float16_detail::float_bits(q[2 * j + 1]) & 0xffff0000u);
        }
    }
}

LIGHTVLM_TARGET_AVX512_BF16 inline void round_weights(const Span& span, const float* p,
                                                      bfloat16_t* weights) {
    for (int h = 0; h < span.heads; ++h) {
        for (int n = 0; n < (span.tokens + 15) / 16 * 16; n += 16) {
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(p + h * kScorePitch + n));
            std::memcpy(weights + h * kSpanTokens + n, &rounded, sizeof(rounded));
        }
    }
}

inline void bf16_scores(const Span& span, SpanScratch* scratch, float* scores) {
    auto* work = reinterpret_cast<Bf16Work*>(scratch->work);
    if (scratch->folded != scratch->query) {
        pack_bf16_query(span, scratch->query, work->query);
        scratch->folded = scratch->query;
    }
    dispatch_heads(span.heads, [&](auto heads) {
        constexpr int kHeads = decltype(heads)::value;
        if (span.in_pages) return score_bf16<kHeads>(span, span.listed, work, scores);
        score_bf16<kHeads>(span, span.strided, work, scores);
    });
}

inline void bf16_values(const Span& span, const float* p, SpanScratch* scratch) {
    auto* work = reinterpret_cast<Bf16Work*>(scratch->work);
    round_weights(span, p, work->weights);
    dispatch_heads(span.heads, [&](auto heads) {
        constexpr int kHeads = decltype(heads)::value;
        if (span.in_pages) return value_bf16<kHeads>(span, span.listed, work, scratch->out);
        value_bf16<kHeads>(span, span.strided, work, scratch->out);
    });
}

}  // namespace lightvlm::decode_detail

#pragma GCC diagnostic pop

#endif
