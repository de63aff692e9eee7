// How decode_attention's partial results become one: those of a block's warps in shared memory,
// those of a row's splits in the workspace, by the block that arrives last. Always in order.
#pragma once

#include "common/block.cuh"
#include "common/launch.h"
#include "decode_attention/decode_plan.cuh"
#include "decode_attention/decode_state.cuh"

namespace lightvlm {

// A unit's heads: those of its tile that there are, and where they are in the output.
struct DecodeUnit {
    int64_t index;
    int64_t first_head;  // over batch rows and query heads
    int heads;
    uint32_t segments;  // a bit for each in which there are valid tokens
};

// Of up to kDecodeMostBlocks parts: what each counts in the result.
struct DecodeMerge {
    float weight[kDecodeMostBlocks][kDecodeHeadTile];
    float highest[kDecodeHeadTile];
    float sum[kDecodeHeadTile];
};

// weight[i][head], highest[head] and sum[head] of `parts` parts, whose maximum and sum are
// given by functions (part, head) -> float. A warp a head at a time; a barrier afterwards.
template <typename Highest, typename Sum>
__device__ __forceinline__ void weigh_parts(int parts, Highest&& highest_of, Sum&& sum_of,
                                            DecodeMerge* merge) {
    const int lane = threadIdx.x % kWarpThreads;
    const auto warps = static_cast<int>(blockDim.x / kWarpThreads);
    for (int head = threadIdx.x / kWarpThreads; head < kDecodeHeadTile; head += warps) {
        float most = -CUDART_INF_F;
        for (int i = lane; i < parts; i += kWarpThreads) most = fmaxf(most, highest_of(i, head));
        for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) {
            most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, lanes));
        }
        float sum = 0.0f;
        for (int i = lane; i < parts; i += kWarpThreads) {
            const float weight = exp2f(highest_of(i, head) - decode_base(most));
            merge->weight[i][head] = weight;
            sum += sum_of(i, head) * weight;
        }
        for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) {
            sum += __shfl_xor_sync(kFullWarp, sum, lanes);
        }
        if (lane == 0) {
            merge->highest[head] = most;
            merge->sum[head] = sum;
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void store_decode_out(const DecodeAttentionParams& params, int64_t at,
                                                 float value) {
    switch (params.dtype) {
        case DType::kFloat16:
            static_cast<half_t*>(params.out)[at] = from_float<half_t>(value);
            break;
        case DType::kBFloat16:
            static_cast<bfloat16_t*>(params.out)[at] = from_float<bfloat16_t>(value);
            break;
        case DType::kFloat32:
        default:
            static_cast<float*>(params.out)[at] = value;
    }
}

// Writes out, lse and what mass needs. part_out: a function (part, head, channel) -> float; a part
// of weight 0 is not asked.
template <typename PartOut>
__device__ __forceinline__ void finish_unit(const DecodeArguments& arguments,
                                            const DecodeUnit& unit, int parts,
                                            const DecodeMerge& merge, PartOut&& part_out) {
    const DecodeAttentionParams& params = arguments.params;
    const auto width = static_cast<int>(params.head_dim);
    for (int i = threadIdx.x; i < unit.heads * width; i += blockDim.x) {
        const int head = i / width;
        const int channel = i - head * width;
        float value = 0.0f;
        for (int part = 0; part < parts; ++part) {
            const float weight = merge.weight[part][head];
            if (weight != 0.0f) value += weight * part_out(part, head, channel);
        }
        const float sum = merge.sum[head];
        store_decode_out(params, unit.first_head * width + i, sum == 0.0f ? 0.0f : value / sum);
    }
    if (arguments.finals != nullptr && threadIdx.x == 0) {
        arguments.finals[unit.index * kDecodeFinals + 2 * kDecodeHeadTile] =
            __uint_as_float(unit.segments);
    }
    const int head = threadIdx.x;
    if (head >= unit.heads) return;
    const float sum = merge.sum[head];
    const float highest = merge.highest[head];
    params.lse[unit.first_head + head] =
        (decode_base(highest) - kDecodeWeightExponent + log2f(sum)) * kDecodeLn2;
    if (arguments.finals != nullptr) {
        float* finals = arguments.finals + unit.index * kDecodeFinals;
        finals[head] = highest;
        finals[kDecodeHeadTile + head] = sum == 0.0f ? 0.0f : 1.0f / sum;
    }
}

// Hands this block's merged warps to the workspace. part_out as above.
template <typename PartOut>
__device__ __forceinline__ void keep_split(const DecodeArguments& arguments, const DecodeUnit& unit,
                                           int split, int parts, const DecodeMerge& merge,
                                           PartOut&& part_out) {
    const auto width = static_cast<int>(arguments.params.head_dim);
    float* to = arguments.parts + (unit.index * arguments.splits + split) *
                                      decode_part_floats(arguments.params.head_dim);
    for (int i = threadIdx.x; i < unit.heads * width; i += blockDim.x) {
        const int head = i / width;
        float value = 0.0f;
        for (int part = 0; part < parts; ++part) {
            const float weight = merge.weight[part][head];
            if (weight != 0.0f) value += weight * part_out(part, head, i - head * width);
        }
        __stcg(to + i, value);
    }
    const int head = threadIdx.x;
    if (head >= kDecodeHeadTile) return;
    __stcg(to + kDecodeHeadTile * width + head, merge.highest[head]);
    __stcg(to + kDecodeHeadTile * (width + 1) + head, merge.sum[head]);
}

// Whether all of the unit's splits have been kept; the ticket is zero again then.
__device__ __forceinline__ bool is_last_split(const DecodeArguments& arguments,
                                              const DecodeUnit& unit, int splits, int* scratch) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int32_t* ticket = arguments.params.ticket + unit.index;
        const bool last = atomicAdd(ticket, 1) == splits - 1;
        if (last) *ticket = 0;
        *scratch = last ? 1 : 0;
    }
    __syncthreads();
    const bool last = *scratch != 0;
    if (last) __threadfence();
    return last;
}

}  // namespace lightvlm
