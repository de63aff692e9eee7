// Scores and values of a packed span with vpdpwssd: 32 products of 16-bit weights and codes at a
// time, summed exactly in 32 bits. For queries in 16 bits.
//
//   q . k = step * sum_d u_d c_d + sum_d q_d key_zero_d          q_d key_scale_d = step * u_d
//   o_d   = channel_d * (step * sum_n u_n c_nd + sum_n p_n z_n)  p_n s_n = step * u_n
//
// u are whole numbers of 16 bits, step is a 32767th of the largest weight of a head (and span), so
// that a weight is off by 2^-16 of the largest: a 128th of what bf16 makes of a key as large.
//
// A word of a row holds 16 / bits codes. vpdpwssd adds up the two words of a dword, so
//   keys    tokens go across the lanes: a 16 x 16 transposition of dwords, shared by all heads; the
//           dword j of a token has codes 2 j w + k and 2 j w + k + w in its words, w = 16 / bits;
//   values  the same word of two tokens is put side by side, channels stay across the lanes.
// Both then take 2 vectors against up to 8 heads at a time: 16 sums, 4 vectors, a mask, a weight.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "decode_attention/decode_rows_cpu.h"
#include "decode_attention/decode_span_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

// GCC takes its own _mm512_undefined for a mistake (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace lightvlm::decode_detail {

constexpr float kWeightMax = 32767.0f;
// Weights that are all smaller count as 0; the reciprocal of what is left is a normal number.
constexpr float kWeightMin = 1e-30f;

template <int bits>
constexpr int kCodesPerWord = 16 / bits;

// Code k of every word.
template <int bits>
LIGHTVLM_TARGET_AVX512_VNNI LIGHTVLM_INLINE __m512i code_of(__m512i words, int k) {
    if (k == kCodesPerWord<bits> - 1) return _mm512_srli_epi16(words, k * bits);
    if (k > 0) words = _mm512_srli_epi32(words, k * bits);
    return _mm512_and_si512(words, _mm512_set1_epi16((1 << bits) - 1));
}

// What a row of weights is multiplied with to become whole numbers, and their step. NaN and
// infinity end up in the step.
struct Steps {
    float inverse;
    float step;
};

LIGHTVLM_TARGET_AVX512_VNNI LIGHTVLM_INLINE Steps steps_of(float largest, float sum) {
    if (!(largest >= kWeightMin)) return {0.0f, 0.0f * sum};
    return {kWeightMax / largest, largest / kWeightMax + 0.0f * sum};
}

// ---- Scores ----

// The folded query of up to 8 heads: weight[(j * kHeadTile + h) * kCodesPerWord + k] is a pair.
struct PackedQuery {
    uint32_t weight[kMaxChannels / 2 * kHeadTile];
    float step[kHeadTile];  // times unit
    float zero[kHeadTile];
};

template <int bits>
LIGHTVLM_TARGET_AVX512_VNNI void fold_query(const Span& span, const float* query,
                                            PackedQuery* folded) {
    constexpr int kCodes = kCodesPerWord<bits>;
    for (int h = 0; h < span.heads; ++h) {
        const float* q = query + h * kMaxChannels;
        alignas(64) float scaled[kMaxChannels];
        __m512 largest = _mm512_setzero_ps();
        __m512 sum = _mm512_setzero_ps();
        __m512 zero = _mm512_setzero_ps();
        for (int64_t d = 0; d < span.channels; d += 16) {
            const int64_t left = span.head_dim - d;
            const __mmask16 some = left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1;
            const __m512 one = _mm512_loadu_ps(q + d);
            const __m512 x = _mm512_mul_ps(one, _mm512_maskz_loadu_ps(some, span.key_scale + d));
            zero = _mm512_fmadd_ps(one, _mm512_maskz_loadu_ps(some, span.key_zero + d), zero);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
            sum = _mm512_add_ps(sum, x);
            _mm512_store_ps(scaled + d, x);
        }
        const Steps steps = steps_of(_mm512_reduce_max_ps(largest), _mm512_reduce_add_ps(sum));
        folded->step[h] = steps.step * span.unit;
        folded->zero[h] = _mm512_reduce_add_ps(zero) * span.unit;
        alignas(64) int16_t whole[kMaxChannels];
        for (int64_t d = 0; d < span.channels; d += 16) {
            const __m512 x =
                _mm512_mul_ps(_mm512_load_ps(scaled + d), _mm512_set1_ps(steps.inverse));
            _mm256_store_si256(reinterpret_cast<__m256i*>(whole + d),
                               _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
        }
        for (int64_t j = 0; j < span.channels / (2 * kCodes); ++j) {
            uint32_t* to = folded->weight + (j * kHeadTile + h) * kCodes;
            const int16_t* from = whole + j * 2 * kCodes;
            for (int k = 0; k < kCodes; ++k) {
                to[k] = static_cast<uint16_t>(from[k]) |
                        static_cast<uint32_t>(static_cast<uint16_t>(from[k + kCodes])) << 16;
            }
        }
    }
}

// 32 tokens against kHeads heads.
template <int bits, int kHeads>
LIGHTVLM_TARGET_AVX512_VNNI void score_tokens(const uint32_t* dwords, const PackedQuery& query,
                                              int64_t count, RowsAhead<StridedRows>* ahead,
                                              float* scores) {
    constexpr int kCodes = kCodesPerWord<bits>;
    __m512i sums[kHeads][2];
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = _mm512_setzero_si512();
    for (int64_t j = 0; j < count; ++j) {
        const __m512i first = _mm512_load_si512(dwords + j * 32);
        const __m512i second = _mm512_load_si512(dwords + j * 32 + 16);
        const uint32_t* weight = query.weight + j * kHeadTile * kCodes;
        // 32 tokens have two lines in 4 bytes of their rows.
        ahead->step();
        ahead->step();
#pragma GCC unroll 8
        for (int k = 0; k < kCodes; ++k) {
            const __m512i a = code_of<bits>(first, k);
            const __m512i b = code_of<bits>(second, k);
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; ++h) {
                const __m512i w = _mm512_set1_epi32(static_cast<int>(weight[h * kCodes + k]));
                sums[h][0] = _mm512_dpwssd_epi32(sums[h][0], a, w);
                sums[h][1] = _mm512_dpwssd_epi32(sums[h][1], b, w);
            }
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
        const __m512 step = _mm512_set1_ps(query.step[h]);
        const __m512 zero = _mm512_set1_ps(query.zero[h]);
        for (int i = 0; i < 2; ++i) {
            _mm512_storeu_ps(scores + h * kScorePitch + 16 * i,
                             _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[h][i]), step, zero));
        }
    }
}

template <int bits, int kHeads>
LIGHTVLM_TARGET_AVX512_VNNI void score_span(const Span& span, const PackedQuery& query,
                                            uint32_t* dwords, float* scores) {
    const int64_t row_bytes = span.channels * bits / 8;
    RowsAhead<StridedRows> ahead(span.strided.value, row_bytes);
    for (int n = 0; n < span.tokens; n += 32) {
        transpose_rows(span.strided.key, span.tokens, n, row_bytes, dwords);
        score_tokens<bits, kHeads>(dwords, query, row_bytes / 4, &ahead, scores + n);
    }
}

// ---- Values ----

// Weights of tokens: weight[h * kSpanTokens + n], 0 past the span's tokens.
struct PackedWeights {
    int16_t weight[kHeadTile * kSpanTokens];
    float step[kHeadTile];
    float zero[kHeadTile];
};

LIGHTVLM_TARGET_AVX512_VNNI inline void weigh_tokens(const Span& span, const float* p,
                                                     PackedWeights* weights) {
    alignas(64) float scale[kSpanTokens];
    alignas(64) float zero[kSpanTokens];
    const int padded = (span.tokens + 31) / 32 * 32;
    for (int n = 0; n < padded; n += 16) {
        const int left = span.tokens - n;
        const __mmask16 some = left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1;
        alignas(64) uint32_t pairs[16];
        if (span.value_token_stride == 2) {
            _mm512_store_si512(pairs, _mm512_maskz_loadu_epi32(some, span.value_token + 2 * n));
        } else {
            for (int i = 0; i < 16; ++i) {
                pairs[i] = 0;
                if (i >= left) continue;
                std::memcpy(&pairs[i], span.value_token + (n + i) * span.value_token_stride, 4);
            }
        }
        const __m512i both = _mm512_load_si512(pairs);
        _mm512_store_ps(scale + n, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both)));
        _mm512_store_ps(zero + n,
                        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16))));
    }
    for (int h = 0; h < span.heads; ++h) {
        const float* from = p + h * kScorePitch;
        __m512 largest = _mm512_setzero_ps();
        __m512 sum = _mm512_setzero_ps();
        __m512 shift = _mm512_setzero_ps();
        for (int n = 0; n < padded; n += 16) {
            const __m512 one = _mm512_loadu_ps(from + n);
            const __m512 x = _mm512_mul_ps(one, _mm512_load_ps(scale + n));
            shift = _mm512_fmadd_ps(one, _mm512_load_ps(zero + n), shift);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
            sum = _mm512_add_ps(sum, x);
        }
        const Steps steps = steps_of(_mm512_reduce_max_ps(largest), _mm512_reduce_add_ps(sum));
        weights->step[h] = steps.step;
        weights->zero[h] = _mm512_reduce_add_ps(shift);
        const __m512 inverse = _mm512_set1_ps(steps.inverse);
        for (int n = 0; n < padded; n += 16) {
            const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + n), _mm512_load_ps(scale + n));
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights->weight + h * kSpanTokens + n),
                                _mm512_cvtsepi32_epi16(whole));
        }
    }
}

// Codes first and first + 1 of every word: sums[(h * kCodesPerWord + k) * 16 + lane].
template <int bits, int kHeads, int first>
LIGHTVLM_TARGET_AVX512_VNNI void sum_codes(const __m512i* pairs, int count, const int16_t* weight,
                                           RowsAhead<StridedRows>* ahead, float* sums) {
    __m512i sum[kHeads][2];
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) sum[h][0] = sum[h][1] = _mm512_setzero_si512();
    for (int i = 0; i < count; ++i) {
        const __m512i words = _mm512_load_si512(pairs + i);
        // Two tokens have a line in 32 bytes of their rows.
        if constexpr (first == 0) ahead->step();
        const __m512i a = code_of<bits>(words, first);
        const __m512i b = code_of<bits>(words, first + 1);
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
            int pair;
            std::memcpy(&pair, weight + h * kSpanTokens + 2 * i, 4);
            const __m512i w = _mm512_set1_epi32(pair);
            sum[h][0] = _mm512_dpwssd_epi32(sum[h][0], a, w);
            sum[h][1] = _mm512_dpwssd_epi32(sum[h][1], b, w);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
        float* to = sums + (h * kCodesPerWord<bits> + first) * 16;
        _mm512_store_ps(to, _mm512_cvtepi32_ps(sum[h][0]));
        _mm512_store_ps(to + 16, _mm512_cvtepi32_ps(sum[h][1]));
    }
    if constexpr (first + 2 < kCodesPerWord<bits>) {
        sum_codes<bits, kHeads, first + 2>(pairs, count, weight, ahead, sums);
    }
}

// in[k * 16 + lane] to out[lane * kCodes + k]
template <int kCodes>
LIGHTVLM_TARGET_AVX512_VNNI LIGHTVLM_INLINE void interleave(const float* in, float* out) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512 x[kCodes];
    for (int k = 0; k < kCodes; ++k) x[k] = _mm512_load_ps(in + 16 * k);
    // Each round interleaves the first half of the vectors with the second.
    for (int round = 1; round < kCodes; round *= 2) {
        __m512 y[kCodes];
        for (int k = 0; k < kCodes / 2; ++k) {
            y[2 * k] = _mm512_permutex2var_ps(x[k], low, x[k + kCodes / 2]);
            y[2 * k + 1] = _mm512_permutex2var_ps(x[k], high, x[k + kCodes / 2]);
        }
        for (int k = 0; k < kCodes; ++k) x[k] = y[k];
    }
    for (int k = 0; k < kCodes; ++k) _mm512_storeu_ps(out + 16 * k, x[k]);
}

template <int bits, int kHeads>
LIGHTVLM_TARGET_AVX512_VNNI void value_span(const Span& span, const PackedWeights& weights,
                                            __m512i* pairs, float* out) {
    constexpr int kCodes = kCodesPerWord<bits>;
    const int64_t row_bytes = span.channels * bits / 8;
    alignas(64) float sums[kHeads * kCodes * 16];
    RowsAhead<StridedRows> ahead(span.strided.next_key, row_bytes);
    for (int64_t c = 0; 32 * c < row_bytes; ++c) {
        if (c % 2 == 0) pair_rows(span.strided.value, span.tokens, row_bytes, c, pairs);
        sum_codes<bits, kHeads, 0>(pairs + c % 2 * (kSpanTokens / 2), (span.tokens + 1) / 2,
                                   weights.weight, &ahead, sums);
#pragma GCC unroll 8
        for (int h = 0; h < kHeads; ++h) {
            const int64_t first = c * kCodes * 16;
            alignas(64) float row[kCodes * 16];
            interleave<kCodes>(sums + h * kCodes * 16, row);
            const __m512 step = _mm512_set1_ps(weights.step[h]);
            const __m512 zero = _mm512_set1_ps(weights.zero[h]);
            for (int64_t d = first; d < span.channels && d < first + kCodes * 16; d += 16) {
                const int64_t left = span.head_dim - d;
                const __mmask16 some = left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1;
                const __m512 channel = _mm512_maskz_loadu_ps(some, span.value_channel + d);
                const __m512 x = _mm512_fmadd_ps(_mm512_load_ps(row + d - first), step, zero);
                _mm512_storeu_ps(out + h * kMaxChannels + d, _mm512_mul_ps(x, channel));
            }
        }
    }
}

template <typename Fn>
LIGHTVLM_INLINE void dispatch_bits(int bits, const Fn& fn) {
    switch (bits) {
        case 8:
            return fn(std::integral_constant<int, 8>{});
        case 4:
            return fn(std::integral_constant<int, 4>{});
        default:
            return fn(std::integral_constant<int, 2>{});
    }
}

// How work is used.
struct PackedWork {
    alignas(64) uint32_t dwords[kMaxChannels / 4 * 32];
    alignas(64) __m512i pairs[kSpanTokens];
    PackedWeights weights;
    PackedQuery query;
};
static_assert(sizeof(PackedWork) <= sizeof(SpanScratch::work));

inline void packed_scores(const Span& span, SpanScratch* scratch, float* scores) {
    auto* work = reinterpret_cast<PackedWork*>(scratch->work);
    dispatch_bits(span.bits, [&](auto bits) {
        constexpr int kBits = decltype(bits)::value;
        if (scratch->folded != span.key_scale) {
            fold_query<kBits>(span, scratch->query, &work->query);
            scratch->folded = span.key_scale;
        }
        dispatch_heads(span.heads, [&](auto heads) {
            score_span<kBits, decltype(heads)::value>(span, work->query, work->dwords, scores);
        });
    });
}

inline void packed_values(const Span& span, const float* p, SpanScratch* scratch) {
    auto* work = reinterpret_cast<PackedWork*>(scratch->work);
    weigh_tokens(span, p, &work->weights);
    dispatch_bits(span.bits, [&](auto bits) {
        constexpr int kBits = decltype(bits)::value;
        dispatch_heads(span.heads, [&](auto heads) {
            value_span<kBits, decltype(heads)::value>(span, work->weights, work->pairs,
                                                      scratch->out);
        });
    });
}

}  // namespace lightvlm::decode_detail

#pragma GCC diagnostic pop

#endif
