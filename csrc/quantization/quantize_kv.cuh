// quantize_kv: keys and values into 8, 4 or 2 bits.
//
// Formula   quantize_numbers.h; docs/kernels/quantization.md.
// Owner     A lane owns 8 channels of a row (packed_lanes.cuh), a block of threads one part of a
//           block of tokens in one head: a part's extremes, or a tile's codes.
// Launches  A block of tokens in one part: one launch does all, and reads it a second time from L2.
//           Otherwise three: extremes of the parts to the workspace; channel parameters from them;
//           codes.
// Errors    An entry that is not finite counts as 0, a row whose length is out of range as empty.
// Shared    28 KiB: extremes of 8 warps, and what codes are made with.
// Bound     Bytes: 16-bit rows read twice (the second time from L2 where they fit), codes written
// once.
#pragma once

#include "common/device_error.cuh"
#include "quantization/packed_lanes.cuh"
#include "quantization/quantize_kv.h"
#include "quantization/quantize_numbers.h"

namespace lightvlm {

constexpr int kQuantizeThreads = 256;
constexpr int kQuantizeWarps = kQuantizeThreads / kWarpThreads;
constexpr int64_t kQuantizeTile = 128;  // tokens of one block of threads in quantize_codes_kernel
constexpr int kChannels = static_cast<int>(kPackedMaxHeadDim);

static_assert(kQuantizeThreads >= kChannels, "a thread has one channel parameter at most");

// What the alignment of all pointers and strides allows.
struct QuantizeAccess {
    bool in_vectors;  // keys and values: 16 bytes at once
    bool in_words;    // codes: those of a lane at once
};

struct QuantizeNumbers {
    float half_zero[kChannels];
    float inverse[kChannels];
    float weight[kChannels];
};

struct QuantizeShared {
    float extremes[kQuantizeWarps][3][kChannels];
    QuantizeNumbers numbers;
    float scratch[kQuantizeWarps];
};

struct ChannelsShared {
    float scratch[kQuantizeWarps];
};

struct ChannelExtremes {
    float low;
    float high;
    float largest;
};

// One head of one block of tokens.
struct QuantizeBlock {
    int64_t batch;
    int64_t head;
    int64_t block;
    int64_t first;  // its first token
    int64_t last;   // past its last one
    int64_t end;    // past its last valid one; at least `first`
};

// Heads of the same tokens lie next to each other, in time as in memory.
__device__ __forceinline__ QuantizeBlock quantize_block(const QuantizeKvParams& params,
                                                        int64_t item) {
    QuantizeBlock at;
    at.head = item % params.heads;
    at.block = item / params.heads % params.blocks;
    at.batch = item / params.heads / params.blocks;
    at.first = at.block * params.block;
    at.last = min(at.first + params.block, params.tokens);
    int64_t length = params.tokens;
    if (params.lens != nullptr) {
        length = params.lens[at.batch * params.lens_stride];
        if (length < 0 || length > params.tokens) {
            if (threadIdx.x == 0) report_device_error(params.error, kErrorLens);
            length = 0;
        }
    }
    at.end = max(at.first, min(at.last, length));
    return at;
}

// Extremes of tokens [first, end), one channel a thread; of threads below head_dim.
template <typename T>
__device__ ChannelExtremes find_extremes(const QuantizeKvParams& params, const QuantizeBlock& at,
                                         int64_t first, int64_t end, bool in_vectors,
                                         QuantizeShared& shared) {
    constexpr int kUnroll = sizeof(T) == 4 ? 2 : 4;
    const LanePlace place = lane_place<kQuantizeThreads>(params.head_dim);
    const T* key = static_cast<const T*>(params.key) +
                   params.key_strides.at(at.batch, at.head, first) + place.channel;
    const T* value = static_cast<const T*>(params.value) +
                     params.value_strides.at(at.batch, at.head, first) + place.channel;
    float low[kLaneChannels];
    float high[kLaneChannels];
    float largest[kLaneChannels];
    LIGHTVLM_UNROLL
    for (int i = 0; i < kLaneChannels; ++i) {
        low[i] = CUDART_INF_F;
        high[i] = -CUDART_INF_F;
        largest[i] = 0.0f;
    }
    bool wrong = false;
    const int64_t count = place.loads ? end - first : 0;
    for (int64_t n = place.row; n < count; n += kUnroll * place.rows) {
        LaneBits<T> keys[kUnroll];
        LaneBits<T> values[kUnroll];
        LIGHTVLM_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            // Past the end, the first row again: it changes no extreme.
            const int64_t row = n + u * place.rows < count ? n + u * place.rows : n;
            keys[u] = load_lane(key + row * params.key_strides.token, in_vectors);
            values[u] = load_lane(value + row * params.value_strides.token, in_vectors);
        }
        LIGHTVLM_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            float numbers[kLaneChannels];
            wrong |= lane_floats(keys[u], numbers);
            LIGHTVLM_UNROLL
            for (int i = 0; i < kLaneChannels; ++i) {
                low[i] = fminf(low[i], numbers[i]);
                high[i] = fmaxf(high[i], numbers[i]);
            }
            wrong |= lane_floats(values[u], numbers);
            LIGHTVLM_UNROLL
            for (int i = 0; i < kLaneChannels; ++i)
                largest[i] = fmaxf(largest[i], fabsf(numbers[i]));
        }
    }
    if (wrong) report_device_error(params.error, kErrorNotFinite);

    // Rows of the warp, then warps.
    const int warp = threadIdx.x / kWarpThreads;
    for (int step = place.group; step < kWarpThreads; step *= 2) {
        LIGHTVLM_UNROLL
        for (int i = 0; i < kLaneChannels; ++i) {
            low[i] = fminf(low[i], __shfl_xor_sync(kFullWarp, low[i], step));
            high[i] = fmaxf(high[i], __shfl_xor_sync(kFullWarp, high[i], step));
            largest[i] = fmaxf(largest[i], __shfl_xor_sync(kFullWarp, largest[i], step));
        }
    }
    if (static_cast<int>(threadIdx.x) % kWarpThreads < place.group && place.loads) {
        LIGHTVLM_UNROLL
        for (int i = 0; i < kLaneChannels; ++i) {
            shared.extremes[warp][0][place.channel + i] = low[i];
            shared.extremes[warp][1][place.channel + i] = high[i];
            shared.extremes[warp][2][place.channel + i] = largest[i];
        }
    }
    __syncthreads();
    ChannelExtremes all{CUDART_INF_F, -CUDART_INF_F, 0.0f};
    if (threadIdx.x < params.head_dim) {
        for (int w = 0; w < kQuantizeWarps; ++w) {
            all.low = fminf(all.low, shared.extremes[w][0][threadIdx.x]);
            all.high = fmaxf(all.high, shared.extremes[w][1][threadIdx.x]);
            all.largest = fmaxf(all.largest, shared.extremes[w][2][threadIdx.x]);
        }
    }
    return all;
}

// Channel parameters of a block of tokens, from the extremes of one channel a thread.
__device__ __forceinline__ void write_channels(const QuantizeKvParams& params,
                                               const QuantizeBlock& at, ChannelExtremes all,
                                               float* scratch) {
    const int d = static_cast<int>(threadIdx.x);
    const float levels = params.levels();
    const float largest = block_reduce<kQuantizeThreads>(
        all.largest, scratch, [](float a, float b) { return fmaxf(a, b); });
    if (d >= params.head_dim) return;
    if (at.end == at.first) all.low = all.high = 0.0f;
    const float zero = all.low + 0.0f;  // of -0 and 0, the latter
    params.key_zero[params.key_zero_strides.at(at.batch, at.head, at.block) + d] = zero;
    params.key_scale[params.key_scale_strides.at(at.batch, at.head, at.block) + d] =
        key_scale_of(zero, all.high, levels);
    params.value_channel[params.value_channel_strides.at(at.batch, at.head, at.block) + d] =
        value_root(all.largest) * value_factor(value_root(largest), levels);
}

// What codes are made with, from the channel parameters. Ends with a barrier.
__device__ __forceinline__ void read_numbers(const QuantizeKvParams& params,
                                             const QuantizeBlock& at, QuantizeNumbers& numbers) {
    const int d = static_cast<int>(threadIdx.x);
    if (d < params.head_dim) {
        const float scale =
            params.key_scale[params.key_scale_strides.at(at.batch, at.head, at.block) + d];
        const float zero =
            params.key_zero[params.key_zero_strides.at(at.batch, at.head, at.block) + d];
        const float channel =
            params.value_channel[params.value_channel_strides.at(at.batch, at.head, at.block) + d];
        numbers.half_zero[d] = rounded_product(zero, 0.5f);
        numbers.inverse[d] = key_inverse(scale);
        numbers.weight[d] = 1.0f / channel;
    }
    __syncthreads();
}

// Levels of 8 channels to their codes, the first in the lowest bits. What code_of() takes from each
// comes off all at once.
template <int kBits>
__device__ __forceinline__ void join_codes(const float (&levels)[kLaneChannels],
                                           uint32_t (&words)[2]) {
    constexpr int kPerWord = kBits == 8 ? 4 : kLaneChannels;
    LIGHTVLM_UNROLL
    for (int w = 0; w < kLaneChannels / kPerWord; ++w) {
        uint32_t word = 0;
        LIGHTVLM_UNROLL
        for (int i = 0; i < kPerWord; ++i) word += code_of(levels[w * kPerWord + i]) << (i * kBits);
        words[w] = word;
    }
}

// Codes of tokens [first, last).
template <typename T, int kBits>
__device__ void write_codes(const QuantizeKvParams& params, const QuantizeBlock& at, int64_t first,
                            int64_t last, QuantizeAccess access, const QuantizeNumbers& shared) {
    constexpr int kUnroll = 2;
    constexpr auto kLevels = static_cast<float>((1 << kBits) - 1);
    const LanePlace place = lane_place<kQuantizeThreads>(params.head_dim);
    const T* key = static_cast<const T*>(params.key) +
                   params.key_strides.at(at.batch, at.head, first) + place.channel;
    const T* value = static_cast<const T*>(params.value) +
                     params.value_strides.at(at.batch, at.head, first) + place.channel;
    const int64_t byte = static_cast<int64_t>(place.channel) * kBits / 8;
    uint8_t* key_codes =
        params.key_codes + params.key_codes_strides.at(at.batch, at.head, first) + byte;
    uint8_t* value_codes =
        params.value_codes + params.value_codes_strides.at(at.batch, at.head, first) + byte;
    half_t* value_token =
        params.value_token + params.value_token_strides.at(at.batch, at.head, first);
    float half_zero[kLaneChannels];
    float inverse[kLaneChannels];
    float weight[kLaneChannels];
    LIGHTVLM_UNROLL
    for (int i = 0; i < kLaneChannels; ++i) {
        half_zero[i] = place.loads ? shared.half_zero[place.channel + i] : 0.0f;
        inverse[i] = place.loads ? shared.inverse[place.channel + i] : 0.0f;
        weight[i] = place.loads ? shared.weight[place.channel + i] : 0.0f;
    }
    const int64_t count = last - first;
    const int64_t valid = at.end - first;
    // All lanes of a warp take the same number of turns.
    for (int64_t turn = 0; turn < count; turn += kUnroll * place.rows) {
        LaneBits<T> keys[kUnroll];
        LaneBits<T> values[kUnroll];
        LIGHTVLM_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t n = turn + u * place.rows + place.row;
            keys[u] = values[u] = LaneBits<T>{};
            if (place.loads && n < valid) {
                keys[u] = load_lane(key + n * params.key_strides.token, access.in_vectors);
                values[u] = load_lane(value + n * params.value_strides.token, access.in_vectors);
            }
        }
        LIGHTVLM_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t n = turn + u * place.rows + place.row;
            const bool is_valid = n < valid;
            float numbers[kLaneChannels];
            float levels[kLaneChannels];
            uint32_t words[2] = {0, 0};
            lane_floats(keys[u], numbers);
            LIGHTVLM_UNROLL
            for (int i = 0; i < kLaneChannels; ++i) {
                levels[i] = is_valid ? key_level(numbers[i], half_zero[i], inverse[i]) : 0.0f;
            }
            join_codes<kBits>(levels, words);
            if (place.stores && n < count) {
                store_codes<kBits>(key_codes + n * params.key_codes_strides.token, words,
                                   access.in_words);
            }

            lane_floats(values[u], numbers);
            float low = CUDART_INF_F;
            float high = -CUDART_INF_F;
            LIGHTVLM_UNROLL
            for (int i = 0; i < kLaneChannels; ++i) {
                const float one = rounded_product(numbers[i], weight[i]);
                low = fminf(low, one);
                high = fmaxf(high, one);
            }
            low = place.loads ? low : CUDART_INF_F;
            high = place.loads ? high : -CUDART_INF_F;
            for (int step = place.group / 2; step > 0; step /= 2) {
                low = fminf(low, __shfl_xor_sync(kFullWarp, low, step));
                high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, step));
            }
            const ValueToken token = value_token_of(low, high, kLevels);
            LIGHTVLM_UNROLL
            for (int i = 0; i < kLaneChannels; ++i) {
                levels[i] = place.loads && is_valid ? value_level(numbers[i], weight[i],
                                                                  token.zero_value, token.inverse)
                                                    : 0.0f;
            }
            join_codes<kBits>(levels, words);
            if (place.stores && n < count) {
                store_codes<kBits>(value_codes + n * params.value_codes_strides.token, words,
                                   access.in_words);
            }
            if (place.channel == 0 && n < count) {
                half_t* pair = value_token + n * params.value_token_strides.token;
                pair[0] = is_valid ? token.scale : half_t{0};
                pair[1] = is_valid ? token.zero : half_t{0};
            }
        }
    }
}

// Grid: (batch, blocks, heads). Two blocks of threads an SM at least: 64 KiB are on their way.
template <typename T, int kBits>
__global__ void __launch_bounds__(kQuantizeThreads, 2)
    quantize_block_kernel(const __grid_constant__ QuantizeKvParams params, QuantizeAccess access) {
    auto& shared = *shared_memory<QuantizeShared>();
    const QuantizeBlock at = quantize_block(params, blockIdx.x);
    const ChannelExtremes all =
        find_extremes<T>(params, at, at.first, at.end, access.in_vectors, shared);
    write_channels(params, at, all, shared.scratch);
    // A thread reads back what it has itself written.
    read_numbers(params, at, shared.numbers);
    write_codes<T, kBits>(params, at, at.first, at.last, access, shared.numbers);
}

// Grid: (batch, blocks, parts, heads).
template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads, 2)
    quantize_extremes_kernel(const __grid_constant__ QuantizeKvParams params,
                             QuantizeAccess access) {
    auto& shared = *shared_memory<QuantizeShared>();
    const int64_t head = blockIdx.x % params.heads;
    const int64_t part = blockIdx.x / params.heads % params.parts;
    const int64_t batch_block = blockIdx.x / params.heads / params.parts;
    const QuantizeBlock at = quantize_block(params, batch_block * params.heads + head);
    const int64_t size = (min(params.block, params.tokens) + params.parts - 1) / params.parts;
    const int64_t first = min(at.end, at.first + part * size);
    const ChannelExtremes all =
        find_extremes<T>(params, at, first, min(at.end, first + size), access.in_vectors, shared);
    if (threadIdx.x >= params.head_dim) return;
    const int64_t block = (at.batch * params.heads + at.head) * params.blocks + at.block;
    float* out =
        params.workspace + (block * params.parts + part) * 3 * params.head_dim + threadIdx.x;
    out[0] = all.low;
    out[params.head_dim] = all.high;
    out[2 * params.head_dim] = all.largest;
}

// Grid: (batch, blocks, heads).
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_channels_kernel(const __grid_constant__ QuantizeKvParams params) {
    auto& shared = *shared_memory<ChannelsShared>();
    const QuantizeBlock at = quantize_block(params, blockIdx.x);
    const int64_t block = (at.batch * params.heads + at.head) * params.blocks + at.block;
    ChannelExtremes all{CUDART_INF_F, -CUDART_INF_F, 0.0f};
    if (threadIdx.x < params.head_dim) {
        const float* from =
            params.workspace + block * params.parts * 3 * params.head_dim + threadIdx.x;
        for (int64_t part = 0; part < params.parts; ++part, from += 3 * params.head_dim) {
            all.low = fminf(all.low, from[0]);
            all.high = fmaxf(all.high, from[params.head_dim]);
            all.largest = fmaxf(all.largest, from[2 * params.head_dim]);
        }
    }
    write_channels(params, at, all, shared.scratch);
}

// Grid: (batch, blocks, tiles, heads).
template <typename T, int kBits>
__global__ void __launch_bounds__(kQuantizeThreads, 2)
    quantize_codes_kernel(const __grid_constant__ QuantizeKvParams params, int64_t tiles,
                          QuantizeAccess access) {
    auto& numbers = *shared_memory<QuantizeNumbers>();
    const int64_t head = blockIdx.x % params.heads;
    const int64_t tile = blockIdx.x / params.heads % tiles;
    const int64_t batch_block = blockIdx.x / params.heads / tiles;
    const QuantizeBlock at = quantize_block(params, batch_block * params.heads + head);
    read_numbers(params, at, numbers);
    const int64_t first = min(at.last, at.first + tile * kQuantizeTile);
    write_codes<T, kBits>(params, at, first, min(at.last, first + kQuantizeTile), access, numbers);
}

}  // namespace lightvlm
