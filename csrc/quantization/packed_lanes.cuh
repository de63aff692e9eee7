// How the threads of a warp share rows of a packed segment: a lane owns kLaneChannels neighbouring
// channels, which are 16 bytes of a 16-bit row and `bits` bytes of a packed one. The lanes of a row
// are a group of 4, 8, 16 or 32 of the warp; a group that is wider than the row has idle lanes.
#pragma once

#include "common/block.cuh"
#include "common/float16.cuh"
#include "common/launch.h"
#include "quantization/packed_kv.h"
#include "quantization/quantize_kv.h"

namespace lightvlm {

constexpr int kLaneChannels = 8;

// Whether every row of a tensor with items of `item` bytes begins on a multiple of `bytes`.
inline bool is_multiple(const void* data, const PackedStrides& strides, int64_t item,
                        int64_t bytes) {
    const int64_t all = strides.batch | strides.head | strides.token;
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 && all * item % bytes == 0;
}

// Where a thread stands in a block of kThreads.
struct LanePlace {
    int group;    // lanes of a row
    int rows;     // rows that the block holds at once
    int row;      // this thread's, in [0, rows)
    int channel;  // its first
    bool loads;   // its channels are in the head
    bool stores;  // its codes are in the packed row
};

template <int kThreads>
__device__ __forceinline__ LanePlace lane_place(int64_t head_dim) {
    const int lanes = static_cast<int>(packed_channels(head_dim)) / kLaneChannels;
    LanePlace place;
    place.group = 4;
    while (place.group < lanes) place.group *= 2;
    place.rows = kThreads / place.group;
    place.row = static_cast<int>(threadIdx.x) / place.group;
    const int lane = static_cast<int>(threadIdx.x) % place.group;
    place.channel = lane * kLaneChannels;
    place.loads = place.channel < head_dim;
    place.stores = lane < lanes;
    return place;
}

// A lane's numbers of one row, as they lie in memory.
template <typename T>
struct LaneBits {
    static constexpr int kWords = kLaneChannels * sizeof(T) / 4;
    uint32_t words[kWords];
};

// in_vectors: the row begins on a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ LaneBits<T> load_lane(const T* from, bool in_vectors) {
    LaneBits<T> bits;
    if (in_vectors) {
        LIGHTVLM_UNROLL
        for (int v = 0; v < LaneBits<T>::kWords / 4; ++v) {
            const uint4 four = reinterpret_cast<const uint4*>(from)[v];
            bits.words[4 * v] = four.x;
            bits.words[4 * v + 1] = four.y;
            bits.words[4 * v + 2] = four.z;
            bits.words[4 * v + 3] = four.w;
        }
    } else {
        LIGHTVLM_UNROLL
        for (int w = 0; w < LaneBits<T>::kWords; ++w) {
            if constexpr (sizeof(T) == 4) {
                bits.words[w] = float16_detail::float_bits(from[w]);
            } else {
                bits.words[w] = from[2 * w].bits | static_cast<uint32_t>(from[2 * w + 1].bits)
                                                       << 16;
            }
        }
    }
    return bits;
}

// The exponent's bits of each number in a word, and the lowest of them.
template <typename T>
constexpr uint32_t kExponentBits = 0x7f800000u;
template <>
inline constexpr uint32_t kExponentBits<half_t> = 0x7c007c00u;
template <>
inline constexpr uint32_t kExponentBits<bfloat16_t> = 0x7f807f80u;
template <typename T>
constexpr uint32_t kExponentOne = 0x00800000u;
template <>
inline constexpr uint32_t kExponentOne<half_t> = 0x04000400u;
template <>
inline constexpr uint32_t kExponentOne<bfloat16_t> = 0x00800080u;

// Numbers of a lane; one that is not finite counts as 0. Returns whether there is such a one.
template <typename T>
__device__ __forceinline__ bool lane_floats(const LaneBits<T>& bits,
                                            float (&values)[kLaneChannels]) {
    constexpr uint32_t kSigns = sizeof(T) == 4 ? 0x80000000u : 0x80008000u;
    uint32_t found = 0;
    LIGHTVLM_UNROLL
    for (int w = 0; w < LaneBits<T>::kWords; ++w) {
        // An exponent of all ones carries into the sign's place.
        found |= (bits.words[w] & kExponentBits<T>)+kExponentOne<T>;
        if constexpr (sizeof(T) == 4) {
            values[w] = float16_detail::float_of(bits.words[w]);
        } else {
            values[2 * w] = to_float(T{static_cast<uint16_t>(bits.words[w] & 0xffffu)});
            values[2 * w + 1] = to_float(T{static_cast<uint16_t>(bits.words[w] >> 16)});
        }
    }
    if ((found & kSigns) == 0) return false;
    LIGHTVLM_UNROLL
    for (int i = 0; i < kLaneChannels; ++i) {
        values[i] = fabsf(values[i]) < CUDART_INF_F ? values[i] : 0.0f;
    }
    return true;
}

// A lane's codes, which are `bits` bytes of the row. in_words: these begin on a multiple of as
// many.
template <int kBits>
__device__ __forceinline__ void store_codes(uint8_t* to, const uint32_t (&words)[2],
                                            bool in_words) {
    if (!in_words) {
        LIGHTVLM_UNROLL
        for (int i = 0; i < kBits; ++i) {
            to[i] = static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
        }
    } else if constexpr (kBits == 8) {
        *reinterpret_cast<uint2*>(to) = uint2{words[0], words[1]};
    } else if constexpr (kBits == 4) {
        *reinterpret_cast<uint32_t*>(to) = words[0];
    } else {
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0]);
    }
}

template <int kBits>
__device__ __forceinline__ void load_codes(const uint8_t* from, uint32_t (&words)[2],
                                           bool in_words) {
    words[0] = words[1] = 0;
    if (!in_words) {
        LIGHTVLM_UNROLL
        for (int i = 0; i < kBits; ++i) {
            words[i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
        }
    } else if constexpr (kBits == 8) {
        const uint2 both = *reinterpret_cast<const uint2*>(from);
        words[0] = both.x;
        words[1] = both.y;
    } else if constexpr (kBits == 4) {
        words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else {
        words[0] = *reinterpret_cast<const uint16_t*>(from);
    }
}

}  // namespace lightvlm
