// decode_attention: one query token a batch row over a cache in segments, in one launch, and one
// more where mass is wanted.
//
// Formula   out = softmax(scale * q K^T) V over the valid tokens of all segments; scales of packed
//           ones are folded (decode_tile.cuh).
// Owner     A unit is a batch row's key head and 8 query heads of its group. Its tokens are shared
//           among splits (blocks) and their warps by decode_plan.cuh. A warp walks its tokens tile
//           by tile on its own: S^T = K Q^T (keys are the M of mma.m16n8k16), an online softmax in
//           registers, movmatrix, O^T += V^T P^T (channels are the M). No barrier in that loop.
//           Warps are merged in shared memory, splits by the block that arrives last
//           (decode_merge.cuh), all in order: same input, same bits.
// Shared    query 4 KiB, a partial result a warp (8 x width x 4 bytes each), and a ring of two
//           tiles a warp: width 128 has 21 KiB and 38 KiB for 4 bits, 74 KiB for 16 (95 KiB is the
//           most of all). Four warps, two from width 192 on.
// Bound     Bytes of the cache; at 2 bits the unpacking of codes.
#pragma once

#include "common/block.cuh"
#include "common/launch.h"
#include "decode_attention/decode_float32.cuh"
#include "decode_attention/decode_format.cuh"
#include "decode_attention/decode_merge.cuh"
#include "decode_attention/decode_plan.cuh"
#include "decode_attention/decode_run.cuh"
#include "decode_attention/decode_state.cuh"
#include "decode_attention/decode_tile.cuh"

namespace lightvlm {

constexpr int decode_warps(int width) { return width <= 128 ? 4 : 2; }

// Blocks of a multiprocessor that registers have to suffice for: 168 for each thread, or 255 where
// an accumulator and a query in two halves need more. Nothing spills.
constexpr int decode_blocks(int width, bool precise) {
    return width > 128 ? 4 : width == 128 && precise ? 2 : 3;
}

template <int kWidth>
struct alignas(16) DecodeShared {
    DecodeRow row;
    int last;
    DecodeRun run[decode_warps(kWidth)];
    alignas(16) float query[kDecodeHeadTile][kWidth + 4];
    DecodePartial<kWidth> partial[decode_warps(kWidth)];
    // Behind it: the rings of the warps, and once these are empty a DecodeMerge.
};

// The launch's dynamic shared memory.
template <int kWidth>
constexpr int64_t decode_shared_bytes(int64_t stage_bytes) {
    const int64_t rings = decode_warps(kWidth) * kDecodeStages * stage_bytes;
    const int64_t merge = sizeof(DecodeMerge);
    return static_cast<int64_t>(sizeof(DecodeShared<kWidth>)) + (rings > merge ? rings : merge);
}

template <int kWidth>
__device__ __forceinline__ void load_decode_query(const DecodeAttentionParams& params, int64_t b,
                                                  int64_t first_head, int heads,
                                                  DecodeShared<kWidth>* shared) {
    const int64_t from = b * params.query_batch_stride + first_head * params.query_head_stride;
    for (int i = threadIdx.x; i < kDecodeHeadTile * kWidth; i += blockDim.x) {
        const int head = i / kWidth;
        const int channel = i % kWidth;
        float value = 0.0f;
        if (head < heads && channel < params.head_dim) {
            const int64_t at = from + head * params.query_head_stride + channel;
            switch (params.dtype) {
                case DType::kFloat16:
                    value = to_float(static_cast<const half_t*>(params.query)[at]);
                    break;
                case DType::kBFloat16:
                    value = to_float(static_cast<const bfloat16_t*>(params.query)[at]);
                    break;
                case DType::kFloat32:
                default:
                    value = static_cast<const float*>(params.query)[at];
            }
        }
        shared->query[head][channel] = value;
    }
}

// One run of one warp, in the segment's format. kPrecise: the query is fp32; products of codes are
// then made of two halves each.
template <int kWidth, bool kPrecise>
__device__ __forceinline__ void attend_run(const DecodeArguments& arguments, KVFormat kv_format,
                                           unsigned char* ring, bool fresh,
                                           DecodeShared<kWidth>* shared) {
    const int warp = threadIdx.x / kWarpThreads;
    const DecodeRun& run = shared->run[warp];
    DecodePartial<kWidth>* partial = &shared->partial[warp];
    const float* query = shared->query[threadIdx.x % kWarpThreads / 4];
    const auto head_dim = static_cast<int>(arguments.params.head_dim);
    const float scale = arguments.params.scale * kDecodeLog2E;
    const auto attend = [&](auto format) {
        DecodeTiles<decltype(format), kPrecise> tiles(run, ring, arguments.stage_bytes);
        tiles.attend(query, head_dim, scale, fresh, partial);
    };
    switch (kv_format) {
        case KVFormat::kPacked8:
            return attend(DecodeFormat<KVFormat::kPacked8, kWidth>{});
        case KVFormat::kPacked4:
            return attend(DecodeFormat<KVFormat::kPacked4, kWidth>{});
        case KVFormat::kPacked2:
            return attend(DecodeFormat<KVFormat::kPacked2, kWidth>{});
        default:
            break;
    }
    // Dense segments have the query's dtype.
    if constexpr (kPrecise) {
        attend_float32<kWidth>(run, shared->query[0], kWidth + 4, head_dim, scale, fresh, partial);
    } else if (kv_format == KVFormat::kFloat16) {
        attend(DecodeFormat<KVFormat::kFloat16, kWidth>{});
    } else {
        attend(DecodeFormat<KVFormat::kBFloat16, kWidth>{});
    }
}

template <int kWidth, bool kPrecise>
__global__ void __launch_bounds__(decode_warps(kWidth) * kWarpThreads,
                                  decode_blocks(kWidth, kPrecise))
    decode_attention_kernel(const __grid_constant__ DecodeArguments arguments) {
    constexpr int kWarps = decode_warps(kWidth);
    auto& shared = *shared_memory<DecodeShared<kWidth>>();
    auto* rings = reinterpret_cast<unsigned char*>(&shared + 1);
    const DecodeAttentionParams& params = arguments.params;
    const auto key_heads = static_cast<int32_t>(params.key_heads);
    const auto block = static_cast<int32_t>(blockIdx.x);
    const int head_tile = block % arguments.head_tiles;
    const int32_t key_split = block / arguments.head_tiles;
    const int32_t key_row = key_split / arguments.splits;  // over batch rows and key heads
    const int split = key_split - key_row * arguments.splits;
    const int32_t b = key_row / key_heads;

    if (threadIdx.x < params.segments) read_decode_row(params, b, threadIdx.x, &shared.row);
    __syncthreads();
    if (arguments.paged) check_decode_pages(arguments, b, &shared.row);
    const DecodeWork work(arguments, shared.row);
    if (split >= work.splits) return;

    DecodeUnit unit;
    unit.index = int64_t{key_row} * arguments.head_tiles + head_tile;
    unit.first_head = int64_t{key_row} * arguments.group + head_tile * kDecodeHeadTile;
    unit.heads = min(arguments.group - head_tile * static_cast<int>(kDecodeHeadTile),
                     static_cast<int>(kDecodeHeadTile));
    unit.segments = decode_segments(params, shared.row);
    load_decode_query(params, b, unit.first_head - b * params.query_heads, unit.heads, &shared);
    __syncthreads();

    const int warp = threadIdx.x / kWarpThreads;
    const DecodeShare share(work, split * kWarps + warp, work.splits * kWarps);
    bool fresh = true;
    uint32_t before = 0;
    for (int s = 0; s < params.segments; ++s) {
        const KVFormat format = params.segment[s].format;
        const uint32_t weight = decode_span_weight(format);
        const int32_t tokens = shared.row.tokens[s];
        const int64_t first = DecodeShare::first_token(share.low, before, weight);
        const int64_t end =
            min(DecodeShare::first_token(share.high, before, weight), int64_t{tokens});
        before += decode_spans(tokens) * weight;
        if (first >= end) continue;
        __syncwarp();  // the run before has been read
        if (threadIdx.x % kWarpThreads == 0) {
            set_decode_run<kPrecise>(arguments, s, b, key_row - b * key_heads, head_tile,
                                     shared.row.begin[s], static_cast<int32_t>(first),
                                     static_cast<int32_t>(end), &shared.run[warp]);
        }
        __syncwarp();
        attend_run<kWidth, kPrecise>(arguments, format,
                                     rings + warp * kDecodeStages * arguments.stage_bytes, fresh,
                                     &shared);
        fresh = false;
    }
    if (fresh && threadIdx.x % kWarpThreads < kDecodeHeadTile) {
        shared.partial[warp].highest[threadIdx.x % kWarpThreads] = -CUDART_INF_F;
        shared.partial[warp].sum[threadIdx.x % kWarpThreads] = 0.0f;
    }
    __syncthreads();

    auto& merge = *reinterpret_cast<DecodeMerge*>(rings);
    const auto warp_out = [&shared](int of_warp, int head, int channel) {
        return shared.partial[of_warp].out[head][channel];
    };
    weigh_parts(
        kWarps, [&shared](int of_warp, int head) { return shared.partial[of_warp].highest[head]; },
        [&shared](int of_warp, int head) { return shared.partial[of_warp].sum[head]; }, &merge);
    if (work.splits == 1) {
        finish_unit(arguments, unit, kWarps, merge, warp_out);
        return;
    }
    keep_split(arguments, unit, split, kWarps, merge, warp_out);
    if (!is_last_split(arguments, unit, work.splits, &shared.last)) return;

    const int64_t part_floats = decode_part_floats(params.head_dim);
    const float* parts = arguments.parts + unit.index * arguments.splits * part_floats;
    const auto of_part = [&](int part, int64_t at) {
        return __ldcg(parts + part * part_floats + at);
    };
    weigh_parts(
        work.splits,
        [&](int part, int head) { return of_part(part, kDecodeHeadTile * params.head_dim + head); },
        [&](int part, int head) {
            return of_part(part, kDecodeHeadTile * (params.head_dim + 1) + head);
        },
        &merge);
    finish_unit(arguments, unit, work.splits, merge, [&](int part, int head, int channel) {
        return of_part(part, head * params.head_dim + channel);
    });
}

}  // namespace lightvlm
