// dequantize_kv: a packed segment back to keys and values.
//
// Formula   unpacked_key, unpacked_value of quantize_numbers.h, in fp32, then rounded to T.
// Owner     A lane owns 8 channels of a row (packed_lanes.cuh), a block of threads a tile of tokens
// of
//           one head, which lies in one block of tokens.
// Errors    A row whose length is out of range is 0.
// Shared    None: a lane's channel parameters stay in registers.
// Bound     Bytes: codes read once, rows written once.
#pragma once

#include "common/device_error.cuh"
#include "quantization/dequantize_kv.h"
#include "quantization/packed_lanes.cuh"
#include "quantization/quantize_numbers.h"

namespace lightvlm {

constexpr int kDequantizeThreads = 256;
constexpr int64_t kDequantizeTile = 64;  // divides a block of tokens

struct DequantizeAccess {
    bool in_words;     // codes: those of a lane at once
    bool out_vectors;  // keys and values: 16 bytes at once
};

// 8 neighbouring numbers.
template <typename T>
__device__ __forceinline__ void store_lane(T* to, const float (&values)[kLaneChannels],
                                           bool out_vectors) {
    if (!out_vectors) {
        LIGHTVLM_UNROLL
        for (int i = 0; i < kLaneChannels; ++i) to[i] = from_float<T>(values[i]);
        return;
    }
    uint32_t words[LaneBits<T>::kWords];
    LIGHTVLM_UNROLL
    for (int w = 0; w < LaneBits<T>::kWords; ++w) {
        if constexpr (sizeof(T) == 4) {
            words[w] = float16_detail::float_bits(values[w]);
        } else {
            words[w] = from_float<T>(values[2 * w]).bits |
                       static_cast<uint32_t>(from_float<T>(values[2 * w + 1]).bits) << 16;
        }
    }
    LIGHTVLM_UNROLL
    for (int v = 0; v < LaneBits<T>::kWords / 4; ++v) {
        reinterpret_cast<uint4*>(to)[v] =
            uint4{words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]};
    }
}

template <int kBits>
__device__ __forceinline__ float code_at(const uint32_t (&words)[2], int i) {
    constexpr int kPerWord = kBits == 8 ? 4 : kLaneChannels;
    return static_cast<float>(words[i / kPerWord] >> (i % kPerWord * kBits) & ((1u << kBits) - 1));
}

// Grid: (batch, tiles, heads). Little is kept in registers, so that many warps hide the latency.
template <typename T, int kBits>
__global__ void __launch_bounds__(kDequantizeThreads, 3)
    dequantize_kernel(const __grid_constant__ DequantizeKvParams params, int64_t tiles,
                      DequantizeAccess access) {
    const int64_t h = blockIdx.x % params.heads;
    const int64_t tile = blockIdx.x / params.heads % tiles;
    const int64_t b = blockIdx.x / params.heads / tiles;
    const int64_t first = tile * kDequantizeTile;
    const int64_t block = first / params.block;
    int64_t length = params.tokens;
    if (params.lens != nullptr) {
        length = params.lens[b * params.lens_stride];
        if (length < 0 || length > params.tokens) {
            if (threadIdx.x == 0) report_device_error(params.error, kErrorLens);
            length = 0;
        }
    }
    const LanePlace place = lane_place<kDequantizeThreads>(params.head_dim);
    if (!place.loads) return;
    const float* scale =
        params.key_scale + params.key_scale_strides.at(b, h, block) + place.channel;
    const float* zero = params.key_zero + params.key_zero_strides.at(b, h, block) + place.channel;
    const float* channel =
        params.value_channel + params.value_channel_strides.at(b, h, block) + place.channel;
    float key_scale[kLaneChannels];
    float key_zero[kLaneChannels];
    float value_channel[kLaneChannels];
    LIGHTVLM_UNROLL
    for (int i = 0; i < kLaneChannels; ++i) {
        key_scale[i] = scale[i];
        key_zero[i] = zero[i];
        value_channel[i] = channel[i];
    }
    const int64_t byte = static_cast<int64_t>(place.channel) * kBits / 8;
    const int64_t last = min(first + kDequantizeTile, params.tokens);
    for (int64_t n = first + place.row; n < last; n += place.rows) {
        const bool is_valid = n < length;
        uint32_t keys[2] = {0, 0};
        uint32_t values[2] = {0, 0};
        float token_scale = 0.0f;
        float token_zero = 0.0f;
        if (is_valid) {
            load_codes<kBits>(params.key_codes + params.key_codes_strides.at(b, h, n) + byte, keys,
                              access.in_words);
            load_codes<kBits>(params.value_codes + params.value_codes_strides.at(b, h, n) + byte,
                              values, access.in_words);
            const half_t* pair = params.value_token + params.value_token_strides.at(b, h, n);
            token_scale = to_float(pair[0]);
            token_zero = to_float(pair[1]);
        }
        float numbers[kLaneChannels];
        LIGHTVLM_UNROLL
        for (int i = 0; i < kLaneChannels; ++i) {
            const float one = unpacked_key(code_at<kBits>(keys, i), key_scale[i], key_zero[i]);
            numbers[i] = is_valid ? one : 0.0f;
        }
        store_lane(static_cast<T*>(params.key) + params.key_strides.at(b, h, n) + place.channel,
                   numbers, access.out_vectors);
        LIGHTVLM_UNROLL
        for (int i = 0; i < kLaneChannels; ++i) {
            const float one = unpacked_value(code_at<kBits>(values, i), token_scale, token_zero,
                                             value_channel[i]);
            numbers[i] = is_valid ? one : 0.0f;
        }
        store_lane(static_cast<T*>(params.value) + params.value_strides.at(b, h, n) + place.channel,
                   numbers, access.out_vectors);
    }
}

}  // namespace lightvlm
