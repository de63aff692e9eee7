// Vectors of the compiler's own kind for the CPU twins of quantize_kv and dequantize_kv: a few
// floats or integers that it keeps in one register, with the operators of numbers. As wide as the
// level has them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "quantization/packed_kv.h"

// Vectors are never passed by value in the end: everything here is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define LIGHTVLM_INLINE_LAMBDA __attribute__((always_inline))

namespace lightvlm::quantize_detail {

template <CpuLevel level>
constexpr int kVectorLanes = level >= CpuLevel::kAvx512 ? 16 : (level == CpuLevel::kAvx2 ? 8 : 4);

// Codes that are packed together; every head width is a multiple of it.
constexpr int kCodeGroup = 16;

template <typename T, int kLanes>
struct VectorOf {
    typedef T Type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <int kLanes>
using FloatVector = typename VectorOf<float, kLanes>::Type;
template <int kLanes>
using WordVector = typename VectorOf<uint32_t, kLanes>::Type;

template <int kLanes>
LIGHTVLM_INLINE FloatVector<kLanes> load_vector(const float* from) {
    FloatVector<kLanes> vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

template <int kLanes>
LIGHTVLM_INLINE WordVector<kLanes> load_words(const void* from) {
    typename VectorOf<uint16_t, kLanes>::Type bits;
    std::memcpy(&bits, from, sizeof(bits));
#if defined(__x86_64__)
    if constexpr (kLanes == 16) {  // The compiler takes more instructions.
        using Halves = VectorOf<int16_t, 16>::Type;
        using Words = VectorOf<int32_t, 16>::Type;
        return (WordVector<kLanes>)__builtin_ia32_pmovzxwd512_mask((Halves)bits, Words{}, -1);
    } else if constexpr (kLanes == 8) {
        return (WordVector<kLanes>)__builtin_ia32_pmovzxwd256((VectorOf<int16_t, 8>::Type)bits);
    }
#endif
    return __builtin_convertvector(bits, WordVector<kLanes>);
}

template <int kLanes>
LIGHTVLM_INLINE FloatVector<kLanes> load_vector(const bfloat16_t* from) {
    return (FloatVector<kLanes>)(load_words<kLanes>(from) << 16);
}

// Words below 2^16.
template <int kLanes>
LIGHTVLM_INLINE void store_halves(WordVector<kLanes> words, void* to) {
#if defined(__x86_64__)
    if constexpr (kLanes == 16) {
        using Halves = VectorOf<int16_t, 16>::Type;
        using Words = VectorOf<int32_t, 16>::Type;
        const auto halves = __builtin_ia32_pmovdw512_mask((Words)words, Halves{}, -1);
        std::memcpy(to, &halves, sizeof(halves));
        return;
    } else if constexpr (kLanes == 8) {
        VectorOf<int32_t, 4>::Type parts[2];
        std::memcpy(parts, &words, sizeof(words));
        const auto halves = __builtin_ia32_packusdw128(parts[0], parts[1]);
        std::memcpy(to, &halves, sizeof(halves));
        return;
    }
#endif
    const auto halves = __builtin_convertvector(words, typename VectorOf<uint16_t, kLanes>::Type);
    std::memcpy(to, &halves, sizeof(halves));
}

// As to_float of a half_t, for numbers that are finite.
template <int kLanes>
LIGHTVLM_INLINE FloatVector<kLanes> load_vector(const half_t* from) {
    const WordVector<kLanes> bits = load_words<kLanes>(from);
    const WordVector<kLanes> magnitude = bits & 0x7fffu;
    const WordVector<kLanes> normal = (magnitude << 13) + ((127u - 15u) << 23);
    // Subnormal numbers: 2^-14 and as many units of 2^-24, less 2^-14. No float subnormal on the
    // way.
    const auto above = (FloatVector<kLanes>)((magnitude << 13) + ((127u - 14u) << 23));
    const auto subnormal = (WordVector<kLanes>)(above - 0x1p-14f);
    const WordVector<kLanes> number = magnitude < 0x0400u ? subnormal : normal;
    return (FloatVector<kLanes>)(number | (bits & 0x8000u) << 16);
}

// Over the lanes, in halves.
template <int kLanes, typename Combine>
LIGHTVLM_INLINE float fold_lanes(FloatVector<kLanes> vector, Combine combine) {
    if constexpr (kLanes == 4) {
        return combine(combine(vector[0], vector[1]), combine(vector[2], vector[3]));
    } else {
        FloatVector<kLanes / 2> halves[2];
        std::memcpy(halves, &vector, sizeof(vector));
        return fold_lanes<kLanes / 2>(combine(halves[0], halves[1]), combine);
    }
}

using CodeVector = VectorOf<uint8_t, kCodeGroup>::Type;

// The lowest bytes of kCodeGroup words. What the compiler makes of a conversion goes through
// general registers, lane by lane.
template <int kLanes>
LIGHTVLM_INLINE CodeVector lowest_bytes(const WordVector<kLanes>* words) {
#if defined(__x86_64__)
    using Bytes = VectorOf<char, 16>::Type;
    using Shorts = VectorOf<int16_t, 8>::Type;
    using Ints = VectorOf<int32_t, kLanes>::Type;
    if constexpr (kLanes == 16) {
        return (CodeVector)__builtin_ia32_pmovdb512_mask((Ints)words[0], Bytes{}, -1);
    } else if constexpr (kLanes == 8) {
        const auto pairs =
            __builtin_ia32_packusdw256((Ints)(words[0] & 0xffu), (Ints)(words[1] & 0xffu));
        Shorts halves[2];
        std::memcpy(halves, &pairs, sizeof(pairs));
        // Fours of words 0 and 1 took turns.
        const auto turns =
            (VectorOf<int32_t, 4>::Type)__builtin_ia32_packuswb128(halves[0], halves[1]);
        return (CodeVector)__builtin_shufflevector(turns, turns, 0, 2, 1, 3);
    } else {
        const Shorts low =
            __builtin_ia32_packssdw128((Ints)(words[0] & 0xffu), (Ints)(words[1] & 0xffu));
        const Shorts high =
            __builtin_ia32_packssdw128((Ints)(words[2] & 0xffu), (Ints)(words[3] & 0xffu));
        return (CodeVector)__builtin_ia32_packuswb128(low, high);
    }
#else
    CodeVector bytes;
    for (int i = 0; i < kCodeGroup; ++i) {
        bytes[i] = static_cast<uint8_t>(words[i / kLanes][i % kLanes]);
    }
    return bytes;
#endif
}

// Levels of kCodeGroup neighbouring channels, rounded to codes as code_of() does, to their
// kCodeGroup * kBits / 8 bytes.
template <int kBits, int kLanes>
LIGHTVLM_INLINE void store_group(const FloatVector<kLanes>* levels, uint8_t* out) {
    WordVector<kLanes> words[kCodeGroup / kLanes];
    for (int i = 0; i < kCodeGroup / kLanes; ++i) {
        words[i] =
            (WordVector<kLanes>)(levels[i] + 12582912.0f);  // the codes are their lowest bytes
    }
    const CodeVector codes = lowest_bytes<kLanes>(words);
    if constexpr (kBits == 8) {
        std::memcpy(out, &codes, sizeof(codes));
    } else if constexpr (kBits == 4) {
        const auto pairs = (VectorOf<uint16_t, 8>::Type)codes;
        const auto bytes = __builtin_convertvector(pairs | pairs >> 4, VectorOf<uint8_t, 8>::Type);
        std::memcpy(out, &bytes, sizeof(bytes));
    } else {
        auto fours = (VectorOf<uint32_t, 4>::Type)codes;
        fours |= fours >> 6;
        fours |= fours >> 12;
        const auto bytes = __builtin_convertvector(fours, VectorOf<uint8_t, 4>::Type);
        std::memcpy(out, &bytes, sizeof(bytes));
    }
}

// kCodeGroup codes of a row from their kCodeGroup * kBits / 8 bytes: store_group() backwards.
template <int kBits>
LIGHTVLM_INLINE CodeVector load_group(const uint8_t* from) {
    CodeVector bytes = {};
    std::memcpy(&bytes, from, kCodeGroup * kBits / 8);
    const CodeVector zero = {};
    if constexpr (kBits == 4) {
        auto pairs = (VectorOf<uint16_t, 8>::Type)__builtin_shufflevector(
            bytes, zero, 0, 16, 1, 16, 2, 16, 3, 16, 4, 16, 5, 16, 6, 16, 7, 16);
        pairs |= pairs << 4;
        return (CodeVector)pairs & 0x0f;
    } else if constexpr (kBits == 2) {
        auto fours = (VectorOf<uint32_t, 4>::Type)__builtin_shufflevector(
            bytes, zero, 0, 16, 16, 16, 1, 16, 16, 16, 2, 16, 16, 16, 3, 16, 16, 16);
        fours |= fours << 12;
        fours |= fours << 6;
        return (CodeVector)fours & 0x03;
    }
    return bytes;
}

// Codes [i * kLanes, (i + 1) * kLanes) of a group, as numbers.
template <int kLanes>
LIGHTVLM_INLINE FloatVector<kLanes> code_numbers(CodeVector codes, int i) {
    using Words = typename VectorOf<int32_t, kLanes>::Type;
    Words words;
#if defined(__x86_64__)
    if constexpr (kLanes == 16) {
        words = __builtin_ia32_pmovzxbd512_mask((VectorOf<char, 16>::Type)codes, Words{}, -1);
    } else if constexpr (kLanes == 8) {
        if (i > 0) {
            codes = __builtin_shufflevector(codes, codes, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10,
                                            11, 12, 13, 14, 15);
        }
        words = __builtin_ia32_pmovzxbd256((VectorOf<char, 16>::Type)codes);
    } else
#endif
    {
        for (int lane = 0; lane < kLanes; ++lane) words[lane] = codes[i * kLanes + lane];
    }
    return __builtin_convertvector(words, FloatVector<kLanes>);
}

// a * b + c, rounded once.
template <CpuLevel level, typename Vector>
LIGHTVLM_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
    constexpr int kLanes = sizeof(Vector) / sizeof(float);
#if defined(__x86_64__)
    if constexpr (level >= CpuLevel::kAvx512) {
        constexpr int kCurrentRounding = 4;
        return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, kCurrentRounding);
    } else if constexpr (level == CpuLevel::kAvx2) {
        return __builtin_ia32_vfmaddps256(a, b, c);
    }
#endif
    Vector sum;
    for (int i = 0; i < kLanes; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return sum;
}

template <int kLanes>
LIGHTVLM_INLINE void store_vector(FloatVector<kLanes> numbers, float* to) {
    std::memcpy(to, &numbers, sizeof(numbers));
}

// As from_float<bfloat16_t>.
template <int kLanes>
LIGHTVLM_INLINE void store_vector(FloatVector<kLanes> numbers, bfloat16_t* to) {
    const auto bits = (WordVector<kLanes>)numbers;
    const WordVector<kLanes> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const WordVector<kLanes> quiet_nan = bits >> 16 | 0x0040u;
    store_halves<kLanes>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded, to);
}

// As from_float<half_t>.
template <int kLanes>
LIGHTVLM_INLINE void store_vector(FloatVector<kLanes> numbers, half_t* to) {
    const auto bits = (WordVector<kLanes>)numbers;
    const WordVector<kLanes> magnitude = bits & 0x7fffffffu;
    const WordVector<kLanes> normal =
        (magnitude - ((127u - 15u) << 23) + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
    const WordVector<kLanes> subnormal =
        (WordVector<kLanes>)((FloatVector<kLanes>)magnitude + 0.5f) - 0x3f000000u;
    WordVector<kLanes> half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    store_halves<kLanes>(half | (bits >> 16 & 0x8000u), to);
}

// Zeros for the codes past `width`.
LIGHTVLM_INLINE void clear_past(int64_t width, int bits, uint8_t* row) {
    const int64_t past = packed_channels(width) - width;
    if (past > 0) std::memset(row + width * bits / 8, 0, static_cast<size_t>(past * bits / 8));
}

}  // namespace lightvlm::quantize_detail
