// A run: consecutive valid tokens of one segment, batch row and key head, for one warp.
#pragma once

#include <type_traits>

#include "common/block.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "decode_attention/decode_plan.cuh"
#include "decode_attention/decode_state.cuh"

namespace lightvlm {

// Rows in the cache, from the segment's first valid token on, or (paged) from the first page on.
struct DecodeRows {
    const unsigned char* data;
    int64_t stride;       // bytes from a token to the next
    int64_t page_stride;  // paged only: from a page to the next
    int32_t bytes;        // of a row
    int32_t unit;         // the widest access that addresses, strides and bytes allow
};

// Lies in shared memory, so that the registers are left to the products.
struct DecodeRun {
    int32_t first;  // tokens [first, end) of the segment's valid ones
    int32_t end;
    DecodeRows keys;
    DecodeRows values;
    const int32_t* pages;    // paged only, else null: of the batch row's blocks
    int32_t begin;           // paged only: the segment's first valid token
    Divisor page_size;       // paged only
    DecodeRows tokens;       // packed only, as the rest of this part
    int32_t block;           // tokens that share channel parameters
    const float* key_scale;  // of the key head's first block
    const float* key_zero;
    const float* value_channel;
    // Where weights go if mass is wanted, else null: the first valid token's, of the tile's first
    // head; `weight_heads` from one token to the next, `tile_heads` of them in the tile.
    void* weights;
    float* weight_maxima;
    int32_t weight_heads;
    int32_t tile_heads;
};

// By one lane. begin: the segment's first valid token.
template <bool kPrecise>
__device__ __forceinline__ void set_decode_run(const DecodeArguments& arguments, int s, int32_t b,
                                               int32_t key_head, int head_tile, int32_t begin,
                                               int32_t first, int32_t end, DecodeRun* run) {
    const DecodeAttentionParams& params = arguments.params;
    const KVSegmentParams& segment = params.segment[s];
    const DecodeSegmentPlan& plan = arguments.plan[s];
    const int64_t key_row = b * params.key_heads + key_head;
    run->first = first;
    run->end = end;
    const auto rows_of = [&](const void* data, int64_t of_batch, int64_t of_head, int64_t of_token,
                             int32_t unit) {
        const int64_t size = plan.element_bytes;
        const int64_t of_row = segment.paged() ? 0 : b * of_batch + begin * of_token;
        return DecodeRows{
            static_cast<const unsigned char*>(data) + (of_row + key_head * of_head) * size,
            of_token * size, of_batch * size, plan.row_bytes, unit};
    };
    run->keys = rows_of(segment.key, segment.key_batch_stride, segment.key_head_stride,
                        segment.key_token_stride, plan.key_unit);
    run->values = rows_of(segment.value, segment.value_batch_stride, segment.value_head_stride,
                          segment.value_token_stride, plan.value_unit);
    run->pages = nullptr;
    if (segment.paged()) {
        run->pages = segment.block_table + b * segment.block_table_stride;
        run->begin = begin;
        run->page_size = plan.page_size;
    }
    if (is_packed(segment.format)) {
        const uint16_t* tokens = segment.value_token + b * segment.value_token_batch_stride +
                                 key_head * segment.value_token_head_stride;
        run->tokens = {reinterpret_cast<const unsigned char*>(tokens),
                       segment.value_token_token_stride * 2, 0, 4, plan.token_unit};
        run->block = static_cast<int32_t>(min(segment.block, int64_t{INT32_MAX}));
        const int64_t channels = key_row * segment.blocks * params.head_dim;
        run->key_scale = segment.key_scale + channels;
        run->key_zero = segment.key_zero + channels;
        run->value_channel = segment.value_channel + channels;
    }
    run->weights = nullptr;
    if (segment.mass == nullptr) return;
    using Weight = std::conditional_t<kPrecise, float, half_t>;
    const int64_t heads = decode_even(arguments.group);
    const int64_t slot = key_row * arguments.slots + plan.first_slot;
    const int64_t head = head_tile * kDecodeHeadTile;
    run->weights = static_cast<Weight*>(arguments.weights) + slot * heads + head;
    run->weight_maxima = arguments.weight_maxima + slot / kDecodeStep * heads + head;
    run->weight_heads = static_cast<int32_t>(heads);
    run->tile_heads = static_cast<int32_t>(heads - head);
}

// Where token n of a paged run lies, from the data of its rows on.
struct DecodePlace {
    int32_t page;
    int32_t slot;

    __device__ __forceinline__ DecodePlace(const DecodeRun& run, int32_t n) {
        const int32_t token = run.begin + n;
        const int32_t block = run.page_size.quotient(token);
        page = __ldg(run.pages + block);
        slot = token - block * run.page_size.divisor;
    }

    __device__ __forceinline__ int64_t offset(const DecodeRows& rows) const {
        return page * rows.page_stride + slot * rows.stride;
    }
};

// Keeps the weights of the tile from token n on, `count` of them; lanes hold keys and heads as in
// DecodeAccumulator::weigh.
template <bool kPrecise, int kSteps, int kWidth>
__device__ __forceinline__ void keep_decode_weights(const float (&weights)[kSteps][4], int32_t n,
                                                    int count,
                                                    const DecodeAccumulator<kWidth>& held,
                                                    const DecodeRun& run) {
    using Weight = std::conditional_t<kPrecise, float, half_t>;
    const int lane = threadIdx.x % kWarpThreads;
    const int g = lane / 4;
    const int head = lane % 4 * 2;
    if (run.weights == nullptr || head >= run.tile_heads) return;
    const int64_t heads = run.weight_heads;
    Weight* to = static_cast<Weight*>(run.weights) + (n + g) * heads + head;
    LIGHTVLM_UNROLL
    for (int step = 0; step < kSteps; ++step) {
        LIGHTVLM_UNROLL
        for (int upper = 0; upper < 2; ++upper, to += 8 * heads) {
            if (step * 16 + upper * 8 + g >= count) continue;
            const float first = weights[step][2 * upper];
            const float second = weights[step][2 * upper + 1];
            if constexpr (kPrecise) {
                *reinterpret_cast<float2*>(to) = make_float2(first, second);
            } else {
                *reinterpret_cast<uint32_t*>(to) = ptx::convert_pair<half_t>(first, second);
            }
        }
    }
    if (g == 0) {
        *reinterpret_cast<float2*>(run.weight_maxima + n / kDecodeStep * heads + head) =
            make_float2(held.highest[0], held.highest[1]);
    }
}

}  // namespace lightvlm
