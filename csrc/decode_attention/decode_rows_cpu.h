// Rows of a span as AVX-512 wants them. Keys: a dword of 16 tokens in a vector, be it a number or
// several that a dot-product instruction adds up. Values: the same word of two tokens in a dword.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/multiversion.h"
#include "decode_attention/decode_span_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

// GCC takes its own _mm512_undefined for a mistake (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace lightvlm::decode_detail {

// Keys [first, first + 32) to dwords[j * 32 + token]; row_bytes is a multiple of 8. Rows
// past the span's repeat the last; the second 16 are left out where all are.
template <typename Rows>
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE void transpose_rows(const Rows& keys, int tokens, int first,
                                                           int64_t row_bytes, uint32_t* dwords) {
    for (int begin = first; begin < first + 32 && begin < tokens; begin += 16) {
        const char* row[16];
        for (int i = 0; i < 16; ++i) {
            const int n = begin + i < tokens ? begin + i : tokens - 1;
            row[i] = keys[n];
        }
        uint32_t* to = dwords + (begin - first);
        for (int64_t at = 0; at < row_bytes; at += 16, to += 4 * 32) {
            // Lane L of four[i] gets row i + 4 L.
            const __mmask8 some = row_bytes - at >= 16 ? 0xf : 0x3;
            __m512i four[4];
            for (int i = 0; i < 4; ++i) {
                four[i] = _mm512_castsi128_si512(_mm_maskz_loadu_epi32(some, row[i] + at));
                four[i] =
                    _mm512_inserti32x4(four[i], _mm_maskz_loadu_epi32(some, row[i + 4] + at), 1);
                four[i] =
                    _mm512_inserti32x4(four[i], _mm_maskz_loadu_epi32(some, row[i + 8] + at), 2);
                four[i] =
                    _mm512_inserti32x4(four[i], _mm_maskz_loadu_epi32(some, row[i + 12] + at), 3);
            }
            const __m512i low01 = _mm512_unpacklo_epi32(four[0], four[1]);
            const __m512i high01 = _mm512_unpackhi_epi32(four[0], four[1]);
            const __m512i low23 = _mm512_unpacklo_epi32(four[2], four[3]);
            const __m512i high23 = _mm512_unpackhi_epi32(four[2], four[3]);
            _mm512_store_si512(to, _mm512_unpacklo_epi64(low01, low23));
            _mm512_store_si512(to + 32, _mm512_unpackhi_epi64(low01, low23));
            if (some == 0x3) continue;
            _mm512_store_si512(to + 64, _mm512_unpacklo_epi64(high01, high23));
            _mm512_store_si512(to + 96, _mm512_unpackhi_epi64(high01, high23));
        }
    }
}

// Words [16 c, 16 c + 32) of two tokens side by side, for all pairs of tokens: the first half to
// pairs[i], the second to pairs[kSpanTokens / 2 + i]. Words past the row and a token past the last
// are 0; a second half with no words is left out.
template <typename Rows>
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE void pair_rows(const Rows& values, int tokens,
                                                      int64_t row_bytes, int64_t c,
                                                      __m512i* pairs) {
    const int64_t words = row_bytes / 2 - 16 * c;
    const __mmask32 some = words >= 32 ? 0xffffffff : (__mmask32{1} << words) - 1;
    const __m512i low = _mm512_add_epi32(
        _mm512_set1_epi32(0x00200000),
        _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                           _mm512_set1_epi32(0x00010001)));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int n = 0; n < tokens; n += 2) {
        const __m512i even = _mm512_maskz_loadu_epi16(some, values[n] + 32 * c);
        const __m512i odd =
            _mm512_maskz_loadu_epi16(n + 1 < tokens ? some : 0, values[n + 1] + 32 * c);
        _mm512_store_si512(pairs + n / 2, _mm512_permutex2var_epi16(even, low, odd));
        if (words <= 16) continue;
        _mm512_store_si512(pairs + (kSpanTokens + n) / 2,
                           _mm512_permutex2var_epi16(even, high, odd));
    }
}

// fn(a constant of the number of heads)
template <typename Fn>
LIGHTVLM_INLINE void dispatch_heads(int heads, const Fn& fn) {
    switch (heads) {
        case 1:
            return fn(std::integral_constant<int, 1>{});
        case 2:
            return fn(std::integral_constant<int, 2>{});
        case 3:
            return fn(std::integral_constant<int, 3>{});
        case 4:
            return fn(std::integral_constant<int, 4>{});
        case 5:
            return fn(std::integral_constant<int, 5>{});
        case 6:
            return fn(std::integral_constant<int, 6>{});
        case 7:
            return fn(std::integral_constant<int, 7>{});
        default:
            return fn(std::integral_constant<int, 8>{});
    }
}

}  // namespace lightvlm::decode_detail

#pragma GCC diagnostic pop

#endif
