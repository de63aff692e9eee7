// The numbers of a row's marks: ascending indices, and each token's slot.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/multiversion.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lightvlm {

#if defined(__x86_64__)

// 16 tokens a step. Compressed in registers: vpcompressd to memory is microcoded on Zen 4.
LIGHTVLM_TARGET_AVX512 inline int64_t number_marks_avx512(const uint8_t* kept, int64_t n,
                                                          int32_t* index, int64_t capacity,
                                                          int32_t* inverse) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i none = _mm512_set1_epi32(-1);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 here = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1u);
        const __m128i bytes = _mm_maskz_loadu_epi8(here, kept + i);
        const __mmask16 marks = _mm_test_epi8_mask(bytes, bytes);
        const int64_t found = __builtin_popcount(marks);
        const __m512i slots =
            _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(count)), lanes);
        _mm512_mask_storeu_epi32(inverse + i, here, _mm512_mask_expand_epi32(none, marks, slots));
        const __m512i tokens = _mm512_maskz_compress_epi32(
            marks, _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(i)), lanes));
        const int64_t room = capacity - count;
        if (room >= 16) {
            _mm512_storeu_si512(index + count, tokens);
        } else if (room > 0) {
            _mm512_mask_storeu_epi32(index + count, static_cast<__mmask16>((1u << room) - 1u),
                                     tokens);
        }
        count += found;
    }
    return count;
}

#endif

// index[0, count): the tokens whose kept[i] is not 0, -1 behind them; inverse[i]: the slot of token
// i, or -1. Returns count; where that is above capacity, only the first `capacity` are in index.
struct NumberMarks {
    template <CpuLevel level>
    static LIGHTVLM_INLINE int64_t run(const uint8_t* kept, int64_t n, int32_t* index,
                                       int64_t capacity, int32_t* inverse) {
        int64_t count = 0;
#if defined(__x86_64__)
        if constexpr (level == CpuLevel::kAvx512) {
            count = number_marks_avx512(kept, n, index, capacity, inverse);
        } else
#endif
        {
            for (int64_t i = 0; i < n; ++i) {
                const bool keep = kept[i] != 0;
                // Written before it is known to stay, which saves a branch that nothing predicts.
                if (count < capacity) index[count] = static_cast<int32_t>(i);
                inverse[i] = keep ? static_cast<int32_t>(count) : -1;
                count += keep;
            }
        }
        std::fill(index + std::min(count, capacity), index + capacity, -1);
        return count;
    }
};

}  // namespace lightvlm
