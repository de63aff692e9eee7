// decode_attention over fp32 segments, on the CUDA cores: exact products, made to be right and
// simple. Every lane reads the keys it scores from the cache; lanes that share a key read the same
// addresses at the same time.
#pragma once

#include "common/block.cuh"
#include "common/launch.h"
#include "decode_attention/decode_run.cuh"
#include "decode_attention/decode_state.cuh"

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

// query: fp32 in shared memory, head 0 of the tile; heads are `pitch` apart. The rest as in
// DecodeTiles::attend.
template <int kWidth>
__device__ __forceinline__ void attend_float32(const DecodeRun& run, const float* query, int pitch,
                                               int head_dim, float scale, bool fresh,
                                               DecodePartial<kWidth>* partial) {
    using Format = DecodeFloat32<kWidth>;
    constexpr int kTile = Format::kTile;
    const int lane = threadIdx.x % kWarpThreads;
    const int g = lane / 4;
    const int t = lane % 4;
    const auto row_of = [&run](const DecodeRows& rows, int32_t n) {
        const int64_t offset =
            run.pages != nullptr ? DecodePlace(run, n).offset(rows) : n * rows.stride;
        return reinterpret_cast<const float*>(rows.data + offset);
    };
    const bool key_aligned = run.keys.unit == 16;
    const bool value_aligned = run.values.unit == 16;
    DecodeAccumulator<kWidth> held;
    held.clear();

    for (int32_t n = run.first; n < run.end; n += kTile) {
        const int count = min(run.end - n, kTile);
        float logits[1][4] = {};
        const float* rows[2] = {row_of(run.keys, n + (g < count ? g : 0)),
                                row_of(run.keys, n + (g + 8 < count ? g + 8 : 0))};
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
        keep_decode_weights<true>(logits, n, count, held, run);

        for (int key = 0; key < count; ++key) {
            const int from = key % 8 * 4 + t;
            const float first = __shfl_sync(kFullWarp, key < 8 ? logits[0][0] : logits[0][2], from);
            const float second =
                __shfl_sync(kFullWarp, key < 8 ? logits[0][1] : logits[0][3], from);
            const float* row = row_of(run.values, n + key);
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
