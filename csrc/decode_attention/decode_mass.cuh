// The second launch of decode_attention: each valid token's probability, mean over its group's
// heads, is added to the mass buffers. The first launch has left every token's weights relative to
// a maximum that its tile shares, and now the whole row's maximum and sum are known.
//
// Owner     One thread a token of a key head: a private read and write, no atomics.
// Bound     Bytes of the weights and of mass, mostly in L2.
#pragma once

#include "common/launch.h"
#include "decode_attention/decode_plan.cuh"
#include "decode_attention/decode_state.cuh"

namespace lightvlm {

constexpr int kDecodeMassThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kDecodeMassThreads)
    decode_mass_kernel(const __grid_constant__ DecodeArguments arguments) {
    const DecodeAttentionParams& params = arguments.params;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t key_row = index / arguments.slots;  // over batch rows and key heads
    if (key_row >= params.batch * params.key_heads) return;
    const int64_t slot = index - key_row * arguments.slots;
    const int64_t b = key_row / params.key_heads;
    int s = -1;
    for (int i = 0; i < params.segments; ++i) {
        const int64_t first = arguments.plan[i].first_slot;
        if (params.segment[i].mass != nullptr && first <= slot &&
            slot < first + params.segment[i].tokens) {
            s = i;
        }
    }
    if (s < 0) return;
    const KVSegmentParams& segment = params.segment[s];
    const DecodeSegmentPlan& plan = arguments.plan[s];
    const float* finals = arguments.finals + key_row * params.head_tiles() * kDecodeFinals;
    // Where lens or pages are bad, the first launch has found no valid token.
    if ((__float_as_uint(finals[2 * kDecodeHeadTile]) >> s & 1) == 0) return;
    const int64_t token = segment.begin(b) + slot - plan.first_slot;
    if (token >= segment.end(b)) return;

    const int64_t group = params.group();
    const int64_t heads = decode_even(group);
    const T* weights = static_cast<const T*>(arguments.weights) + index * heads;
    const int64_t tile = (slot - plan.first_slot) / plan.tile * plan.tile + plan.first_slot;
    const float* maxima =
        arguments.weight_maxima + (key_row * arguments.slots + tile) / kDecodeStep * heads;
    float sum = 0.0f;
    for (int64_t head = 0; head < group; ++head) {
        const float* of_tile = finals + head / kDecodeHeadTile * kDecodeFinals;
        const float highest = of_tile[head % kDecodeHeadTile];
        const float inverse = of_tile[kDecodeHeadTile + head % kDecodeHeadTile];
        sum += to_float(weights[head]) * exp2f(maxima[head] - decode_base(highest)) * inverse;
    }
    segment.mass[b * segment.mass_batch_stride +
                 (key_row - b * params.key_heads) * segment.mass_head_stride + token] +=
        sum / static_cast<float>(group);
}

}  // namespace lightvlm
