// Features of select_diverse on the device: their scale and norm, and their way into shared memory
// as fp16 operands of mma.
//
// A vector is brought near 1 by a power of two (diverse_scale) and rounded to fp16: exact for fp16
// and bf16 except for components 2^-14 below the largest, which lose less than 2^-25 of it. An fp32
// vector is split in two terms, x = high + 2^-11 low, each fp16: 22 bits.
#pragma once

#include <type_traits>

#include "common/block.cuh"
#include "common/float16.cuh"
#include "common/ptx.cuh"
#include "selection/diverse_value.h"

namespace lightvlm {

constexpr int kDiverseChunk = 128;                // channels in shared memory at a time
constexpr int kDiversePitch = kDiverseChunk + 8;  // halves: the rows of a fragment in 32 banks
constexpr int kDiverseGroup = 8;                  // channels that a thread loads at once
constexpr float kDiverseLow = 2048.0f;            // 2^11, see above

template <typename T>
constexpr int kDiverseTerms = std::is_same_v<T, float> ? 2 : 1;

template <typename T>
struct DiverseFeatures {
    const T* data;
    int64_t token_stride;
    int32_t channels;
    bool aligned;  // 16 bytes may be loaded at every eighth channel

    __device__ DiverseFeatures(const T* data, int64_t token_stride, int64_t channels)
        : data(data),
          token_stride(token_stride),
          channels(static_cast<int32_t>(channels)),
          aligned((reinterpret_cast<uintptr_t>(data) | token_stride * sizeof(T)) % 16 == 0 &&
                  channels % kDiverseGroup == 0) {}

    // Channels [c, c + 8) of token i, zeros past the last.
    __device__ __forceinline__ void load(int64_t i, int32_t c, float (&x)[kDiverseGroup]) const {
        const T* from = data + i * token_stride + c;
        if (aligned && c < channels) {
            union {
                uint4 words[sizeof(T) * kDiverseGroup / sizeof(uint4)];
                T values[kDiverseGroup];
            } loaded;
            LIGHTVLM_UNROLL
            for (size_t w = 0; w < sizeof(loaded) / sizeof(uint4); ++w) {
                loaded.words[w] = reinterpret_cast<const uint4*>(from)[w];
            }
            LIGHTVLM_UNROLL
            for (int k = 0; k < kDiverseGroup; ++k) x[k] = to_float(loaded.values[k]);
            return;
        }
        LIGHTVLM_UNROLL
        for (int k = 0; k < kDiverseGroup; ++k) {
            x[k] = c + k < channels ? to_float(from[k]) : 0.0f;
        }
    }
};

// Rows of kDiverseChunk channels, the high terms and for fp32 the low ones behind them.
template <int kTerms, int kRows>
struct DiverseOperand {
    alignas(16) uint32_t pairs[kTerms][kRows][kDiversePitch / 2];  // of halves

    __device__ __forceinline__ void store(int row, int c, const float (&x)[kDiverseGroup],
                                          float scale) {
        uint32_t split[kTerms][kDiverseGroup / 2];
        LIGHTVLM_UNROLL
        for (int k = 0; k < kDiverseGroup; k += 2) {
            // What has no scale may be NaN or infinite.
            const float first = scale > 0.0f ? x[k] * scale : 0.0f;
            const float second = scale > 0.0f ? x[k + 1] * scale : 0.0f;
            const uint32_t pair = ptx::convert_pair<half_t>(first, second);
            split[0][k / 2] = pair;
            if constexpr (kTerms == 2) {
                const float high_first = to_float(half_t{static_cast<uint16_t>(pair)});
                const float high_second = to_float(half_t{static_cast<uint16_t>(pair >> 16)});
                split[1][k / 2] = ptx::convert_pair<half_t>((first - high_first) * kDiverseLow,
                                                            (second - high_second) * kDiverseLow);
            }
        }
        LIGHTVLM_UNROLL
        for (int t = 0; t < kTerms; ++t) {
            *reinterpret_cast<uint4*>(&pairs[t][row][c / 2]) =
                uint4{split[t][0], split[t][1], split[t][2], split[t][3]};
        }
    }

    __device__ __forceinline__ uint32_t pair(int term, int row, int c) const {
        return pairs[term][row][c / 2];
    }
};

// scale[i] and inverse_norm[i] (of the scaled vector) of a row's tokens. 16 lanes share a token and
// have kAtOnce tokens under way: the loads are far apart.
template <int kThreads, typename T>
__device__ void measure_features(const DiverseFeatures<T>& features, int64_t tokens, float* scale,
                                 float* inverse_norm) {
    constexpr int kLanes = kDiverseChunk / kDiverseGroup;
    constexpr int kAtOnce = 4;
    constexpr int kTeams = kThreads / kLanes;
    const int lane = threadIdx.x % kLanes;
    const int32_t chunks = (features.channels + kDiverseChunk - 1) / kDiverseChunk;
    const int64_t rounds = (tokens + kTeams * kAtOnce - 1) / (kTeams * kAtOnce);
    for (int64_t round = 0; round < rounds; ++round) {
        int64_t token[kAtOnce];
        LIGHTVLM_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
            const int64_t i = (round * kAtOnce + j) * kTeams + threadIdx.x / kLanes;
            token[j] = i < tokens ? i : tokens - 1;
        }
        float x[kAtOnce][kDiverseGroup];
        uint32_t largest[kAtOnce] = {};  // as bits, where NaN is above infinity
        for (int32_t chunk = 0; chunk < chunks; ++chunk) {
            const int32_t c = chunk * kDiverseChunk + lane * kDiverseGroup;
            LIGHTVLM_UNROLL
            for (int j = 0; j < kAtOnce; ++j) features.load(token[j], c, x[j]);
            LIGHTVLM_UNROLL
            for (int j = 0; j < kAtOnce; ++j) {
                LIGHTVLM_UNROLL
                for (int k = 0; k < kDiverseGroup; ++k) {
                    const uint32_t bits = __float_as_uint(x[j][k]) & 0x7fffffffu;
                    largest[j] = bits > largest[j] ? bits : largest[j];
                }
            }
        }
        float own_scale[kAtOnce];
        float squares[kAtOnce] = {};
        LIGHTVLM_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
            for (int step = kLanes / 2; step > 0; step /= 2) {
                const uint32_t other = __shfl_xor_sync(kFullWarp, largest[j], step);
                largest[j] = other > largest[j] ? other : largest[j];
            }
            own_scale[j] = diverse_scale(__uint_as_float(largest[j]));
        }
        for (int32_t chunk = 0; chunk < chunks; ++chunk) {
            const int32_t c = chunk * kDiverseChunk + lane * kDiverseGroup;
            if (chunks > 1) {  // else it is still there
                LIGHTVLM_UNROLL
                for (int j = 0; j < kAtOnce; ++j) features.load(token[j], c, x[j]);
            }
            LIGHTVLM_UNROLL
            for (int j = 0; j < kAtOnce; ++j) {
                LIGHTVLM_UNROLL
                for (int k = 0; k < kDiverseGroup; ++k) {
                    const float scaled = x[j][k] * own_scale[j];
                    squares[j] += scaled * scaled;
                }
            }
        }
        LIGHTVLM_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
            for (int step = kLanes / 2; step > 0; step /= 2) {
                squares[j] += __shfl_xor_sync(kFullWarp, squares[j], step);
            }
            // A token past the last repeats the last one: the same numbers to the same place.
            if (lane == 0) {
                scale[token[j]] = own_scale[j];
                inverse_norm[token[j]] = own_scale[j] > 0.0f ? 1.0f / sqrtf(squares[j]) : 0.0f;
            }
        }
    }
}

}  // namespace lightvlm
