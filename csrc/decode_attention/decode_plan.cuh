// Who works on what in decode_attention, and where the workspace holds what.
//
// The valid tokens of a batch row are cut into spans of 64, counted from where a segment's begin.
// A span has a weight, about what its bytes and codes cost. The spans of all segments, in order,
// are shared evenly by weight among the warps of the row's splits. How many splits there are
// follows from the valid tokens, up to what the launch has: lens are read on the device only.
#pragma once

#include "common/device_error.cuh"
#include "common/launch.h"
#include "decode_attention/decode_attention.h"

namespace lightvlm {

constexpr int kDecodeSpan = 64;
constexpr int kDecodeSplitSpans = 8;  // a split has 512 tokens at least
constexpr int64_t kDecodeMostBlocks = 512;
constexpr int64_t kDecodeStep = 16;  // keys of one mma, and what maxima of weights are kept by

// What the launcher knows of a segment besides its parameters. Units are the bytes of one access,
// as the addresses and strides allow.
struct DecodeSegmentPlan {
    int64_t first_slot;  // of its tokens' weights, where mass is wanted
    int32_t key_unit;
    int32_t value_unit;
    int32_t token_unit;
    int32_t element_bytes;  // of what strides count
    int32_t row_bytes;      // of a token's key, or value
    int32_t tile;           // keys whose weights share a maximum
};

struct DecodeArguments {
    DecodeAttentionParams params;
    DecodeSegmentPlan plan[kDecodeMaxSegments];
    int32_t splits;       // of a unit, at most
    int32_t stage_bytes;  // of the ring of a warp
    // Of each unit and split, heads first: out [kDecodeHeadTile, head_dim], then maximum and sum.
    float* parts;
    // Of each batch row, key head, slot and head (rounded up to even): the weight, half_t or float,
    // and for each kDecodeStep slots the maximum that it is relative to.
    void* weights;
    float* weight_maxima;
    // Of each unit: the maximum of each head, then 1 / sum.
    float* finals;
    int64_t slots;
};

LIGHTVLM_HOST_DEVICE int64_t decode_part_floats(int64_t head_dim) {
    return kDecodeHeadTile * (head_dim + 2);
}

LIGHTVLM_HOST_DEVICE int64_t decode_even(int64_t heads) { return (heads + 1) / 2 * 2; }

constexpr int decode_span_weight(KVFormat format) {
    switch (format) {
        case KVFormat::kPacked2:
            return 2;
        case KVFormat::kPacked4:
            return 3;
        case KVFormat::kPacked8:
            return 5;
        case KVFormat::kFloat16:
        case KVFormat::kBFloat16:
            return 8;
        case KVFormat::kFloat32:
        default:
            return 16;
    }
}

// A batch row's valid tokens of each segment, in the block's shared memory.
struct DecodeRow {
    int32_t begin[kDecodeMaxSegments];
    int32_t tokens[kDecodeMaxSegments];
};

// By thread `segment`. Bad lens count as no token.
__device__ __forceinline__ void read_decode_row(const DecodeAttentionParams& params, int64_t b,
                                                int segment, DecodeRow* row) {
    const KVSegmentParams& from = params.segment[segment];
    const int64_t begin = from.leftpad != nullptr ? from.leftpad[b] : 0;
    const int64_t end = from.lens != nullptr ? from.lens[b] : from.tokens;
    const bool valid = 0 <= begin && begin <= end && end <= from.tokens;
    if (!valid) report_device_error(params.error, kErrorLens);
    row->begin[segment] = static_cast<int32_t>(valid ? begin : 0);
    row->tokens[segment] = static_cast<int32_t>(valid ? end - begin : 0);
}

__device__ __forceinline__ int64_t decode_spans(int64_t tokens) {
    return (tokens + kDecodeSpan - 1) / kDecodeSpan;
}

// The row's spans and their weight, and from them its splits.
struct DecodeWork {
    int64_t weight = 0;
    int32_t splits = 1;

    __device__ DecodeWork(const DecodeArguments& arguments, const DecodeRow& row) {
        int64_t spans = 0;
        for (int s = 0; s < arguments.params.segments; ++s) {
            const int64_t of_segment = decode_spans(row.tokens[s]);
            spans += of_segment;
            weight += of_segment * decode_span_weight(arguments.params.segment[s].format);
        }
        const int64_t wanted = (spans + kDecodeSplitSpans - 1) / kDecodeSplitSpans;
        splits = static_cast<int32_t>(min(max(wanted, int64_t{1}), int64_t{arguments.splits}));
    }
};

}  // namespace lightvlm
