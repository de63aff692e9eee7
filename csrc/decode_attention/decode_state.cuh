// What a warp of decode_attention keeps of its softmax: in registers while the format and the
// channel parameters stay the same, in shared memory across such runs.
//
// Weights are exp2(logit - highest + 14): the 2^14 cancels in the result, and keeps weights down to
// 2^-28 of the largest exact to all bits where they are rounded to half_t.
// With g = lane / 4 and t = lane % 4, a lane holds heads 2t and 2t + 1 of the tile of 8.
#pragma once

#include "common/block.cuh"
#include "common/launch.h"
#include "decode_attention/decode_attention.h"

namespace lightvlm {

constexpr float kDecodeWeightExponent = 14.0f;
constexpr float kDecodeLog2E = 1.44269504f;
constexpr float kDecodeLn2 = 0.693147181f;

// What exponents are relative to: -inf - -inf would be NaN.
__device__ __forceinline__ float decode_base(float highest) {
    return highest == -CUDART_INF_F ? 0.0f : highest;
}

// The least power of two that is not below the size of x, within what has an inverse.
__device__ __forceinline__ float decode_power(float x) {
    const float size = fminf(fmaxf(fabsf(x), 0x1p-126f), 0x1p126f);
    return __uint_as_float((__float_as_uint(size) + 0x7fffffu) & 0x7f800000u);
}

// Of one batch row, tile of heads and run of tokens; also what a warp hands to its block.
template <int kWidth>
struct DecodePartial {
    float out[kDecodeHeadTile][kWidth + 4];  // the pitch spreads heads over banks
    float highest[kDecodeHeadTile];
    float sum[kDecodeHeadTile];
};

template <int kWidth>
struct DecodeAccumulator {
    // D of mma.m16n8k16: tile i has row g in [0] and [1], row g + 8 in [2] and [3], of the two
    // heads. Which channels these rows are, the format says.
    float out[kWidth / 16][4];
    float highest[2];
    float sum[2];   // of this lane's keys
    float zero[2];  // sum of weight * value_token.zero, likewise
    float bound;    // packed: out is to be multiplied by it, a power of two

    __device__ __forceinline__ void clear() {
        LIGHTVLM_UNROLL
        for (int i = 0; i < kWidth / 16; ++i) {
            LIGHTVLM_UNROLL
            for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
        }
        LIGHTVLM_UNROLL
        for (int h = 0; h < 2; ++h) {
            highest[h] = -CUDART_INF_F;
            sum[h] = zero[h] = 0.0f;
        }
        bound = 1.0f;
    }

    __device__ __forceinline__ void scale_out(float first, float second) {
        LIGHTVLM_UNROLL
        for (int i = 0; i < kWidth / 16; ++i) {
            out[i][0] *= first;
            out[i][1] *= second;
            out[i][2] *= first;
            out[i][3] *= second;
        }
    }

    // Turns logits (base 2; -inf where there is no key) into weights, and what is held so far to
    // the new maximum. logits[step]: keys g, g, g + 8, g + 8 of 16; heads 2t, 2t + 1, 2t, 2t + 1.
    template <int kSteps>
    __device__ __forceinline__ void weigh(float (&logits)[kSteps][4]) {
        float factor[2];
        float base[2];
        LIGHTVLM_UNROLL
        for (int h = 0; h < 2; ++h) {
            float most = highest[h];
            LIGHTVLM_UNROLL
            for (int step = 0; step < kSteps; ++step) {
                most = fmaxf(most, fmaxf(logits[step][h], logits[step][h + 2]));
            }
            LIGHTVLM_UNROLL
            for (int lanes = 4; lanes < kWarpThreads; lanes *= 2) {
                most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, lanes));
            }
            factor[h] = exp2f(highest[h] - decode_base(most));
            base[h] = decode_base(most) - kDecodeWeightExponent;
            highest[h] = most;
            sum[h] *= factor[h];
            zero[h] *= factor[h];
        }
        if (__any_sync(kFullWarp, factor[0] != 1.0f || factor[1] != 1.0f)) {
            scale_out(factor[0], factor[1]);
        }
        LIGHTVLM_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            LIGHTVLM_UNROLL
            for (int j = 0; j < 4; ++j) {
                logits[step][j] = exp2f(logits[step][j] - base[j % 2]);
                sum[j % 2] += logits[step][j];
            }
        }
    }

    // Adds what is held to *partial, or (fresh) replaces it. For the whole warp.
    // channels: value_channel of the run, null where dense.
    template <typename Format>
    __device__ __forceinline__ void flush(const float* channels, int head_dim, bool fresh,
                                          DecodePartial<kWidth>* partial) {
        const int lane = threadIdx.x % kWarpThreads;
        const int g = lane / 4;
        const int first_head = lane % 4 * 2;
        __syncwarp();
        float most[2];
        float kept[2];
        float added[2];
        LIGHTVLM_UNROLL
        for (int h = 0; h < 2; ++h) {
            LIGHTVLM_UNROLL
            for (int lanes = 4; lanes < kWarpThreads; lanes *= 2) {
                sum[h] += __shfl_xor_sync(kFullWarp, sum[h], lanes);
                zero[h] += __shfl_xor_sync(kFullWarp, zero[h], lanes);
            }
            const float before = fresh ? -CUDART_INF_F : partial->highest[first_head + h];
            most[h] = fmaxf(before, highest[h]);
            kept[h] = exp2f(before - decode_base(most[h]));
            added[h] = exp2f(highest[h] - decode_base(most[h]));
            sum[h] = sum[h] * added[h] + (fresh ? 0.0f : partial->sum[first_head + h] * kept[h]);
        }
        LIGHTVLM_UNROLL
        for (int i = 0; i < kWidth / 16; ++i) {
            LIGHTVLM_UNROLL
            for (int upper = 0; upper < 2; ++upper) {
                const int channel = Format::value_channel(g, i, upper);
                if (channel >= head_dim) continue;
                const float of_channel = channels != nullptr ? channels[channel] : 1.0f;
                LIGHTVLM_UNROLL
                for (int h = 0; h < 2; ++h) {
                    float* to = &partial->out[first_head + h][channel];
                    const float value = of_channel * (out[i][2 * upper + h] * bound + zero[h]);
                    *to = value * added[h] + (fresh ? 0.0f : *to * kept[h]);
                }
            }
        }
        __syncwarp();
        if (g == 0) {
            LIGHTVLM_UNROLL
            for (int h = 0; h < 2; ++h) {
                partial->highest[first_head + h] = most[h];
                partial->sum[first_head + h] = sum[h];
            }
        }
    }
};

}  // namespace lightvlm
