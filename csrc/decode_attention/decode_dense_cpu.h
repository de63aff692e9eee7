// Scores and values of a dense span in fp32 with AVX-512: 32 and 16 bit, for queries of any dtype.
// Each number is widened in a register, and nothing is copied but the keys, which are transposed so
// that a vector holds one channel of 16 tokens.
//
// Two vectors of tokens (keys) or channels (values) against up to 8 heads at a time: 16 sums, 2
// vectors, a factor. bf16 queries have decode_bf16_cpu.h where the processor multiplies bf16.
#pragma once

#include <algorithm>
#include <cstdint>

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

// How SpanScratch::work is used.
struct DenseWork {
    alignas(64) uint32_t dwords[kMaxChannels * 32];
    float query[kMaxChannels * kHeadTile];  // [channel][head]
};
static_assert(sizeof(DenseWork) <= sizeof(SpanScratch::work));

// 16 numbers of type T, next to each other, or as `channel`'s part of 16 dwords.
template <typename T>
struct Widen;

template <>
struct Widen<float> {
    LIGHTVLM_TARGET_AVX512 static LIGHTVLM_INLINE __m512 row(__mmask16 some, const char* at) {
        return _mm512_maskz_loadu_ps(some, at);
    }
    template <int channel>
    LIGHTVLM_TARGET_AVX512 static LIGHTVLM_INLINE __m512 part(__m512i dwords) {
        return _mm512_castsi512_ps(dwords);
    }
};

template <>
struct Widen<half_t> {
    LIGHTVLM_TARGET_AVX512 static LIGHTVLM_INLINE __m512 row(__mmask16 some, const char* at) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, at));
    }
    template <int channel>
    LIGHTVLM_TARGET_AVX512 static LIGHTVLM_INLINE __m512 part(__m512i dwords) {
        return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(dwords, 16 * channel)));
    }
};

template <>
struct Widen<bfloat16_t> {
    LIGHTVLM_TARGET_AVX512 static LIGHTVLM_INLINE __m512 row(__mmask16 some, const char* at) {
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, at));
        return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    }
    template <int channel>
    LIGHTVLM_TARGET_AVX512 static LIGHTVLM_INLINE __m512 part(__m512i dwords) {
        const __m512i words =
            channel == 0
                ? _mm512_slli_epi32(dwords, 16)
                : _mm512_and_si512(dwords, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
        return _mm512_castsi512_ps(words);
    }
};

// Sums that join the rest only when they are complete: keeps rounding errors small.
constexpr int64_t kSumDwords = 16;
constexpr int kSumTokens = 32;

LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE void join(bool first, __m512 sum, float* to) {
    _mm512_storeu_ps(to, first ? sum : _mm512_add_ps(_mm512_loadu_ps(to), sum));
}

// Adds channel j's products to the sums of 32 tokens.
template <int kHeads>
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE void add_channel(__m512 a, __m512 b, const float* query,
                                                        __m512 (*sums)[2]) {
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
        const __m512 q = _mm512_set1_ps(query[h]);
        sums[h][0] = _mm512_fmadd_ps(a, q, sums[h][0]);
        sums[h][1] = _mm512_fmadd_ps(b, q, sums[h][1]);
    }
}

template <typename T, int kHeads, typename Rows>
LIGHTVLM_TARGET_AVX512 void score_dense(const Span& span, const SpanRows<Rows>& rows,
                                        DenseWork* work, float* scores) {
    constexpr int64_t kChannels = 4 / sizeof(T);  // of a dword
    const int64_t row_bytes = span.head_dim * static_cast<int64_t>(sizeof(T));
    const __m512 unit = _mm512_set1_ps(span.unit);
    RowsAhead<Rows> ahead(rows.value, row_bytes);
    for (int n = 0; n < span.tokens; n += 32) {
        transpose_rows(rows.key, span.tokens, n, row_bytes, work->dwords);
        for (int64_t begin = 0; begin < row_bytes / 4; begin += kSumDwords) {
            const int64_t end = std::min(begin + kSumDwords, row_bytes / 4);
            __m512 sums[kHeads][2];
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = _mm512_setzero_ps();
            for (int64_t j = begin; j < end; ++j) {
                ahead.step();
                ahead.step();
                const __m512i a = _mm512_load_si512(work->dwords + j * 32);
                const __m512i b = _mm512_load_si512(work->dwords + j * 32 + 16);
                const float* query = work->query + j * kChannels * kHeadTile;
                add_channel<kHeads>(Widen<T>::template part<0>(a), Widen<T>::template part<0>(b),
                                    query, sums);
                if constexpr (kChannels == 2) {
                    add_channel<kHeads>(Widen<T>::template part<1>(a),
                                        Widen<T>::template part<1>(b), query + kHeadTile, sums);
                }
            }
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; ++h) {
                float* to = scores + h * kScorePitch + n;
                join(begin == 0, _mm512_mul_ps(sums[h][0], unit), to);
                join(begin == 0, _mm512_mul_ps(sums[h][1], unit), to + 16);
            }
        }
    }
}

template <typename T, int kHeads, typename Rows>
LIGHTVLM_TARGET_AVX512 void value_dense(const Span& span, const SpanRows<Rows>& rows,
                                        const float* p, float* out) {
    constexpr int64_t kSize = sizeof(T);
    RowsAhead<Rows> ahead(rows.next_key, span.head_dim * kSize);
    for (int64_t d = 0; d < span.channels; d += 32) {
        // Widths are multiples of 16: a vector lies in the row or behind it.
        const __mmask16 second = d + 16 < span.head_dim ? 0xffff : 0;
        for (int begin = 0; begin < span.tokens; begin += kSumTokens) {
            const int end = std::min(begin + kSumTokens, span.tokens);
            __m512 sums[kHeads][2];
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; ++h) sums[h][0] = sums[h][1] = _mm512_setzero_ps();
            for (int n = begin; n < end; ++n) {
                ahead.step();
                if (kSize == 4 && second) ahead.step();  // not past the row: a list would end
                const char* row = rows.value[n] + d * kSize;
                const __m512 a = Widen<T>::row(0xffff, row);
                const __m512 b = Widen<T>::row(second, row + 16 * kSize);
#pragma GCC unroll 8
                for (int h = 0; h < kHeads; ++h) {
                    const __m512 w = _mm512_set1_ps(p[h * kScorePitch + n]);
                    sums[h][0] = _mm512_fmadd_ps(a, w, sums[h][0]);
                    sums[h][1] = _mm512_fmadd_ps(b, w, sums[h][1]);
                }
            }
#pragma GCC unroll 8
            for (int h = 0; h < kHeads; ++h) {
                float* to = out + h * kMaxChannels + d;
                join(begin == 0, sums[h][0], to);
                join(begin == 0, sums[h][1], to + 16);
            }
        }
    }
}

// fn(a value of the type of the span's numbers, a constant of the number of heads, its rows)
template <typename Fn>
LIGHTVLM_INLINE void dispatch_dense(const Span& span, const Fn& fn) {
    const auto of_type = [&](auto type) {
        dispatch_heads(span.heads, [&](auto heads) {
            if (span.in_pages) return fn(type, heads, span.listed);
            fn(type, heads, span.strided);
        });
    };
    if (span.format == KVFormat::kFloat32) return of_type(float{});
    if (span.format == KVFormat::kFloat16) return of_type(half_t{});
    of_type(bfloat16_t{});
}

inline void dense_scores(const Span& span, SpanScratch* scratch, float* scores) {
    auto* work = reinterpret_cast<DenseWork*>(scratch->work);
    if (scratch->folded != scratch->query) {
        for (int64_t d = 0; d < span.head_dim; ++d) {
            for (int h = 0; h < span.heads; ++h) {
                work->query[d * kHeadTile + h] = scratch->query[h * kMaxChannels + d];
            }
        }
        scratch->folded = scratch->query;
    }
    dispatch_dense(span, [&](auto type, auto heads, const auto& rows) {
        score_dense<decltype(type), decltype(heads)::value>(span, rows, work, scores);
    });
}

inline void dense_values(const Span& span, const float* p, SpanScratch* scratch) {
    dispatch_dense(span, [&](auto type, auto heads, const auto& rows) {
        value_dense<decltype(type), decltype(heads)::value>(span, rows, p, scratch->out);
    });
}

}  // namespace lightvlm::decode_detail

#pragma GCC diagnostic pop

#endif
