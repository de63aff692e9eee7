// decode_attention over fp32 segments, on the CUDA cores: exact products, made to be right and
// simple. Every lane reads the keys it scores from the cache; lanes that share a key read the same
// addresses at the same time.
#pragma once

#include "common/block.cuh"
#include "common/launch.h"
#include "decode_attention/decode_plan.cuh"
#include "decode_attention/decode_state.cuh"
#include "decode_attention/decode_tile.cuh"

namespace lightvlm {

template <int width>
struct DecodeFloat32 {
    static constexpr int kWidth = width;
    static constexpr int kTile = 16;

    // Of accumulator tile `tile`, row g (upper = 0) or g + 8: a lane reads 4 channels at a time.
    __device__ __forceinline__ static int value_channel(int g, int tile, int upper) {
        const int number = 2 * tile + upper;
        return (number / 4 * 8 + g) * 4 + number % 4;
    }
};

__device__ __forceinline__ float4 load_decode_floats(const float* from, bool aligned) {
    if (aligned) return *reinterpret_cast<const float4*>(from);
    return make_float4(from[0], from[1], from[2], from[3]);
}

// query: fp32 in shared memory, head 0 of the tile; heads are `pitch` apart.
template <int kWidth, bool kPrecise>
__device__ __forceinline__ void attend_float32(const DecodeRun& run,
                                               const DecodeAttentionParams& params,
                                               const float* query, int pitch,
                                               const DecodeWeights<kPrecise>& weights, bool fresh,
                                               DecodePartial<kWidth>* partial) {
    using Format = DecodeFloat32<kWidth>;
    constexpr int kTile = Format::kTile;
    const KVSegmentParams& segment = *run.segment;
    const int lane = threadIdx.x % kWarpThreads;
    const int g = lane / 4;
    const int t = lane % 4;
    const auto head_dim = static_cast<int>(params.head_dim);
    const float scale = params.scale * kDecodeLog2E;
    const float* keys = static_cast<const float*>(segment.key) + run.b * segment.key_batch_stride +
                        run.key_head * segment.key_head_stride +
                        run.begin * segment.key_token_stride;
    const float* values =
        static_cast<const float*>(segment.value) + run.b * segment.value_batch_stride +
        run.key_head * segment.value_head_stride + run.begin * segment.value_token_stride;
    const bool key_aligned = run.plan->key_unit == 16;
    const bool value_aligned = run.plan->value_unit == 16;
    DecodeAccumulator<kWidth> held;
    held.clear();

    for (int64_t n = run.first; n < run.end; n += kTile) {
        const int count = static_cast<int>(min(run.end - n, int64_t{kTile}));
        float logits[1][4] = {};
        const float* rows[2] = {
            keys + (n + (g < count ? g : 0)) * segment.key_token_stride,
            keys + (n + (g + 8 < count ? g + 8 : 0)) * segment.key_token_stride};
        const float* heads[2] = {query + 2 * t * pitch, query + (2 * t + 1) * pitch};
        for (int channel = 0; channel < head_dim; channel += 4) {
            LIGHTVLM_UNROLL
            for (int upper = 0; upper < 2; ++upper) {
                const float4 key = load_decode_floats(rows[upper] + channel, key_aligned);
                LIGHTVLM_UNROLL
                for (int h = 0; h < 2; ++h) {
                    const float4 with = *reinterpret_cast<const float4*>(heads[h] + channel);
                    logits[0][2 * upper + h] +=
                        key.x * with.x + key.y * with.y + key.z * with.z + key.w * with.w;
                }
            }
        }
        LIGHTVLM_UNROLL
        for (int j = 0; j < 4; ++j) {
            logits[0][j] = j / 2 * 8 + g < count ? logits[0][j] * scale : -CUDART_INF_F;
        }
        held.weigh(logits);
        weights.template keep<kTile>(logits, n, count, held);

        for (int key = 0; key < count; ++key) {
            const int from = key % 8 * 4 + t;
            const float first = __shfl_sync(kFullWarp, key < 8 ? logits[0][0] : logits[0][2], from);
            const float second =
                __shfl_sync(kFullWarp, key < 8 ? logits[0][1] : logits[0][3], from);
            const float* row = values + (n + key) * segment.value_token_stride;
            LIGHTVLM_UNROLL
            for (int tile = 0; tile < kWidth / 16; tile += 2) {
                const int channel = Format::value_channel(g, tile, 0);
                if (channel >= head_dim) continue;
                const float4 value = load_decode_floats(row + channel, value_aligned);
                held.out[tile][0] += first * value.x;
                held.out[tile][1] += second * value.x;
                held.out[tile][2] += first * value.y;
                held.out[tile][3] += second * value.y;
                held.out[tile + 1][0] += first * value.z;
                held.out[tile + 1][1] += second * value.z;
                held.out[tile + 1][2] += first * value.w;
                held.out[tile + 1][3] += second * value.w;
            }
        }
    }
    held.template flush<Format>(nullptr, head_dim, fresh, partial);
}

}  // namespace lightvlm
