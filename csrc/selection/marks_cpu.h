// The numbers of a row's kept tokens: ascending indices, and each token's slot.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/multiversion.h"
#include "common/x86_intrinsics.h"

namespace lightvlm {

// Which tokens are kept, one by one, or 16 of them at i as a mask; only the lanes of `here` exist.
// The tokens whose kept[i] is not 0:
struct KeptFlags {
    const uint8_t* kept;

    LIGHTVLM_INLINE bool operator()(int64_t i) const { return kept[i] != 0; }
#if defined(__x86_64__)
    LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE __mmask16 lanes(int64_t i, __mmask16 here) const {
        const __m128i flags = _mm_maskz_loadu_epi8(here, kept + i);
        return _mm_test_epi8_mask(flags, flags);
    }
#endif
};

// The tokens whose key is at least `lowest`:
struct KeptKeys {
    const uint32_t* keys;
    uint32_t lowest;

    LIGHTVLM_INLINE bool operator()(int64_t i) const { return keys[i] >= lowest; }
#if defined(__x86_64__)
    LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE __mmask16 lanes(int64_t i, __mmask16 here) const {
        return _mm512_mask_cmpge_epu32_mask(here, _mm512_maskz_loadu_epi32(here, keys + i),
                                            _mm512_set1_epi32(static_cast<int32_t>(lowest)));
    }
#endif
};

// Where the numbers go, and how many there are so far.
struct KeptNumbers {
    int32_t* index;  // [capacity]
    int64_t capacity;
    int32_t* inverse;  // [tokens]
    int64_t count = 0;
};

#if defined(__x86_64__)

// Compressed in registers: vpcompressd to memory is microcoded on Zen 4.
template <typename Kept>
LIGHTVLM_TARGET_AVX512 void number_kept_avx512(Kept kept, int64_t begin, int64_t end,
                                               KeptNumbers* numbers) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i none = _mm512_set1_epi32(-1);
    int64_t count = numbers->count;
    for (int64_t i = begin; i < end; i += 16) {
        const __mmask16 here =
            end - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (end - i)) - 1u);
        const __mmask16 marks = kept.lanes(i, here);
        const __m512i slots =
            _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(count)), lanes);
        _mm512_mask_storeu_epi32(numbers->inverse + i, here,
                                 _mm512_mask_expand_epi32(none, marks, slots));
        const __m512i tokens = _mm512_maskz_compress_epi32(
            marks, _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(i)), lanes));
        const int64_t room = numbers->capacity - count;
        if (room >= 16) {
            _mm512_storeu_si512(numbers->index + count, tokens);
        } else if (room > 0) {
            _mm512_mask_storeu_epi32(numbers->index + count,
                                     static_cast<__mmask16>((1u << room) - 1u), tokens);
        }
        count += __builtin_popcount(marks);
    }
    numbers->count = count;
}

#endif

// Numbers the kept ones of the tokens [begin, end), which follow those numbered so far. Past
// capacity they are counted only.
template <typename Kept>
struct NumberKept {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(Kept kept, int64_t begin, int64_t end, KeptNumbers* numbers) {
#if defined(__x86_64__)
        if constexpr (level == CpuLevel::kAvx512) {
            number_kept_avx512(kept, begin, end, numbers);
            return;
        }
#endif
        const int64_t capacity = numbers->capacity;
        int32_t* index = numbers->index;
        int32_t* inverse = numbers->inverse;
        int64_t count = numbers->count;
        for (int64_t i = begin; i < end; ++i) {
            const bool keep = kept(i);
            // Written before it is known to stay, which saves a branch that nothing predicts.
            if (count < capacity) index[count] = static_cast<int32_t>(i);
            inverse[i] = keep ? static_cast<int32_t>(count) : -1;
            count += keep;
        }
        numbers->count = count;
    }
};

}  // namespace lightvlm
