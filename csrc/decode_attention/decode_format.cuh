// What the tensor-core path of decode_attention has to know of a format, at compile time: how long
// its rows are, which piece of a row a lane reads, and which channels stand in it.
//
// A tile of rows lies in shared memory as it lies in the cache, one row after the other at a pitch.
// With g = lane / 4 and t = lane % 4 (the group and the place in it of mma.m16n8k16):
//
//   keys    rows are the M of S^T = K Q^T: a lane reads the rows g and g + 8 of 16, of each row a
//           quarter, in kKeyLoads pieces of kKeyUnit bytes that lie 4 units apart, at t units.
//           The order in which the channels are summed is free, so what it finds there, in the
//           order of its bits, is its part of the contraction; the query has the same order.
//   values  channels are the M of O^T = V^T P^T: a lane reads the rows of keys 2t, 2t + 1, 2t + 8
//           and 2t + 9 of 16, of each row an eighth, in kValueLoads pieces of kValueUnit bytes that
//           lie 8 units apart, at g units. Which channel an accumulator holds follows from that.
//
// The pitches make both free of bank conflicts: 8 rows of quarters, and 4 rows of eighths.
#pragma once

#include <type_traits>

#include "common/float16.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "decode_attention/decode_attention.h"

namespace lightvlm {

// The least odd multiple of `step` that is not below `bytes`.
constexpr int decode_pitch(int bytes, int step) {
    const int steps = (bytes + step - 1) / step;
    return (steps + 1 - steps % 2) * step;
}

// The widest access, up to 16 bytes, that divides `bytes`.
constexpr int decode_unit(int bytes) {
    int unit = 16;
    while (bytes % unit != 0) unit /= 2;
    return unit;
}

template <KVFormat format, int width>
struct DecodeFormat {
    static constexpr KVFormat kFormat = format;
    static constexpr int kWidth = width;  // channels, rounded up to a multiple of 32
    static constexpr bool kPacked = is_packed(format);
    static constexpr int kBits = kPacked ? packed_bits(format) : 16;
    using Element = std::conditional_t<format == KVFormat::kBFloat16, bfloat16_t, half_t>;

    static constexpr int kRowBytes = width * kBits / 8;
    static constexpr int kKeyUnit = decode_unit(kRowBytes / 4);
    static constexpr int kKeyLoads = kRowBytes / (4 * kKeyUnit);
    static constexpr int kKeyPitch = decode_pitch(kRowBytes, 4 * kKeyUnit);
    static constexpr int kValueUnit = decode_unit(kRowBytes / 8);
    static constexpr int kValueLoads = kRowBytes / (8 * kValueUnit);
    static constexpr int kValuePitch = decode_pitch(kRowBytes, 16);
    static constexpr int kTokenBytes = kPacked ? 4 : 0;

    // Keys of a tile: a stage of the ring should hold some 5 KiB, at least 16 keys.
    static constexpr int kKeyBytes = kKeyPitch + kValuePitch + kTokenBytes;
    static constexpr int kTile = kKeyBytes * 64 <= 6144 ? 64 : kKeyBytes * 32 <= 6144 ? 32 : 16;
    static constexpr int kStageBytes = kTile * kKeyBytes;
    static constexpr int kValueOffset = kTile * kKeyPitch;
    static constexpr int kTokenOffset = kValueOffset + kTile * kValuePitch;
    static_assert(kValueOffset % 16 == 0 && kTokenOffset % 16 == 0 && kStageBytes % 16 == 0);

    // Codes are computed with as code - kMiddle, which costs nothing and halves what rounding the
    // query and the weights to 16 bits does: scale * code alone is twice as large as the key is.
    static constexpr int kMiddle = kPacked ? 1 << (kBits - 1) : 0;

    // ---- Keys --------------------------------------------------------------------------------

    static constexpr int kPairCodes = 16 / kBits;  // codes in half a word
    static constexpr int kUnitPairs = kKeyUnit * 4 / kBits;
    // In a unit of two bytes the halves are spread over a word.
    static constexpr bool kSpread = kKeyUnit == 2;
    static constexpr int kWordPairs = kSpread ? kPairCodes / 2 : kPairCodes;

    // The channel of which `pair` of a lane's quarter row holds a code in its lower or upper half.
    __device__ __forceinline__ static int key_channel(int t, int pair, int half) {
        const int load = pair / kUnitPairs;
        const int word = pair % kUnitPairs / kWordPairs;
        const int code = word * 2 * kWordPairs + pair % kWordPairs + half * kWordPairs;
        return (load * 4 + t) * (kKeyUnit * 8 / kBits) + code;
    }

    // ---- Values ------------------------------------------------------------------------------

    static constexpr int kUnitCodes = kValueUnit * 8 / kBits;

    // The channel of the accumulator of M tile `tile`, row g (upper = 0) or g + 8.
    __device__ __forceinline__ static int value_channel(int g, int tile, int upper) {
        const int code = 2 * tile + upper;
        return (code / kUnitCodes * 8 + g) * kUnitCodes + code % kUnitCodes;
    }

    // ---- Codes to numbers --------------------------------------------------------------------

    // Code `c` of each half of the word, less kMiddle, as a pair of Elements; c counts the codes of
    // half a word. A code is put into the fraction of a half_t with a power of two around it that
    // gives its lowest bit the value 1, and that power and kMiddle are taken away again: exact.
    __device__ __forceinline__ static uint32_t number(uint32_t word, int c) {
        if constexpr (kBits == 16) {
            return word;
        } else if constexpr (kBits == 8) {
            const uint32_t pair = __byte_perm(word, 0x64646464u, c == 0 ? 0x4240 : 0x4341);
            return ptx::subtract_half_pair(pair, 0x64806480u);
        } else {
            constexpr int kShiftCodes = 8 / kBits;  // those that need no shift
            constexpr uint32_t kOnes = (1u << kBits) - 1;
            const int shift = c % kShiftCodes * kBits;
            // 1024, 256, 64 or 16: bit `shift` of the fraction counts 1.
            const uint32_t power = 0x6400u - (static_cast<uint32_t>(shift) << 10);
            const uint32_t middle = power | static_cast<uint32_t>(kMiddle) << shift;
            const uint32_t shifted = c < kShiftCodes ? word : word >> 8;
            const uint32_t pair = (shifted & (kOnes << shift) * 0x00010001u) | power * 0x00010001u;
            return ptx::subtract_half_pair(pair, middle * 0x00010001u);
        }
    }
};

// Reads kUnit bytes of shared memory into words, the first byte lowest.
template <int kUnit>
struct DecodePiece {
    uint32_t words[kUnit < 4 ? 1 : kUnit / 4];

    __device__ __forceinline__ explicit DecodePiece(const unsigned char* from) {
        if constexpr (kUnit == 16) {
            const auto read = *reinterpret_cast<const uint4*>(from);
            words[0] = read.x;
            words[1] = read.y;
            words[2] = read.z;
            words[3] = read.w;
        } else if constexpr (kUnit == 8) {
            const auto read = *reinterpret_cast<const uint2*>(from);
            words[0] = read.x;
            words[1] = read.y;
        } else if constexpr (kUnit == 4) {
            words[0] = *reinterpret_cast<const uint32_t*>(from);
        } else if constexpr (kUnit == 2) {
            words[0] = *reinterpret_cast<const uint16_t*>(from);
        } else {
            words[0] = *from;
        }
    }
};

}  // namespace lightvlm
