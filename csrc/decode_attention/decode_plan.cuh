// Who works on what in decode_attention, and where the workspace holds what.
//
// The valid tokens of a batch row are cut into spans of 64, counted from where a segment's begin.
// A span has a weight, about what its bytes and codes cost. The spans of all segments, in order,
// are shared evenly by weight among the warps of the row's splits. How many splits there are
// follows from the valid tokens, up to what the launch has: lens are read on the device only.
#pragma once

#include "common/device_error.cuh"
#include "common/divisor.h"
#include "common/launch.h"
#include "decode_attention/decode_attention.h"

namespace lightvlm {

constexpr int kDecodeSpan = 64;
constexpr int kDecodeSplitSpans = 8;  // a split has 512 tokens at least
constexpr int64_t kDecodeMostBlocks = 512;
constexpr int64_t kDecodeFinals = 2 * kDecodeHeadTile + 2;
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
    Divisor page_size;      // paged segments only
};

struct DecodeArguments {
    DecodeAttentionParams params;
    DecodeSegmentPlan plan[kDecodeMaxSegments];
    // 32 bit here, so that the kernel has no 64-bit division, which is a call.
    int32_t group;
    int32_t head_tiles;
    int32_t splits;       // of a unit, at most
    int32_t stage_bytes;  // of the ring of a warp
    bool paged;           // whether any segment is
    // Of each unit and split, heads first: out [kDecodeHeadTile, head_dim], then maximum and sum.
    float* parts;
    // Of each batch row, key head, slot and head (rounded up to even): the weight, half_t or float,
    // and for each kDecodeStep slots the maximum that it is relative to.
    void* weights;
    float* weight_maxima;
    // Of each unit, kDecodeFinals numbers: the maximum of each head, 1 / sum of each, and as the
    // bits of one more which segments have valid tokens. The last keeps what follows aligned.
    float* finals;
    int64_t slots;
};

LIGHTVLM_HOST_DEVICE int64_t decode_part_floats(int64_t head_dim) {
    return kDecodeHeadTile * (head_dim + 2);
}

LIGHTVLM_HOST_DEVICE int64_t decode_even(int64_t heads) { return (heads + 1) / 2 * 2; }

// At most 8: the spans of all segments have less than 2^29, so that weights are 32 bit.
constexpr uint32_t decode_span_weight(KVFormat format) {
    switch (format) {
        case KVFormat::kPacked2:
            return 2;
        case KVFormat::kPacked4:
            return 3;
        case KVFormat::kPacked8:
            return 5;
        default:
            return 8;
    }
}
static_assert(kDecodeMaxSegments * (INT32_MAX / kDecodeSpan + 1) * 8 <= UINT32_MAX);

// A batch row's valid tokens of each segment, in the block's shared memory.
struct DecodeRow {
    int32_t begin[kDecodeMaxSegments];
    int32_t tokens[kDecodeMaxSegments];
};

// By thread `segment`. Bad lens count as no token.
__device__ __forceinline__ void read_decode_row(const DecodeAttentionParams& params, int64_t b,
                                                int segment, DecodeRow* row) {
    const KVSegmentParams& from = params.segment[segment];
    const int64_t begin = from.begin(b);
    const int64_t end = from.end(b);
    const bool valid = 0 <= begin && begin <= end && end <= from.tokens;
    if (!valid) report_device_error(params.error, kErrorLens);
    row->begin[segment] = static_cast<int32_t>(valid ? begin : 0);
    row->tokens[segment] = static_cast<int32_t>(valid ? end - begin : 0);
}

// By all threads of the block, with barriers: a row has no token in a segment where the page of a
// valid token is none.
__device__ __forceinline__ void check_decode_pages(const DecodeArguments& arguments, int64_t b,
                                                   DecodeRow* row) {
    const DecodeAttentionParams& params = arguments.params;
    for (int s = 0; s < params.segments; ++s) {
        const KVSegmentParams& segment = params.segment[s];
        if (!segment.paged() || row->tokens[s] == 0) continue;
        const Divisor& page_size = arguments.plan[s].page_size;
        const int32_t* table = segment.block_table + b * segment.block_table_stride;
        const int32_t last = page_size.quotient(row->begin[s] + row->tokens[s] - 1);
        int bad = 0;
        for (int32_t block = page_size.quotient(row->begin[s]) + static_cast<int32_t>(threadIdx.x);
             block <= last; block += static_cast<int32_t>(blockDim.x)) {
            bad |= static_cast<uint32_t>(table[block]) >= static_cast<uint32_t>(segment.pages);
        }
        if (__syncthreads_or(bad) == 0 || threadIdx.x != 0) continue;
        report_device_error(params.error, kErrorPageRange);
        row->tokens[s] = 0;
    }
    __syncthreads();
}

// A bit for each segment in which the row has valid tokens.
__device__ __forceinline__ uint32_t decode_segments(const DecodeAttentionParams& params,
                                                    const DecodeRow& row) {
    uint32_t bits = 0;
    for (int s = 0; s < params.segments; ++s) bits |= (row.tokens[s] > 0 ? 1u : 0u) << s;
    return bits;
}

__device__ __forceinline__ uint32_t decode_spans(int32_t tokens) {
    return (static_cast<uint32_t>(tokens) + kDecodeSpan - 1) / kDecodeSpan;
}

// The weight of a row's spans, and its splits.
struct DecodeWork {
    uint32_t weight = 0;
    int32_t splits = 1;

    __device__ DecodeWork(const DecodeArguments& arguments, const DecodeRow& row) {
        uint32_t spans = 0;
        for (int s = 0; s < arguments.params.segments; ++s) {
            const uint32_t of_segment = decode_spans(row.tokens[s]);
            spans += of_segment;
            weight += of_segment * decode_span_weight(arguments.params.segment[s].format);
        }
        const auto wanted =
            static_cast<int32_t>((spans + kDecodeSplitSpans - 1) / kDecodeSplitSpans);
        splits = min(max(wanted, 1), arguments.splits);
    }
};

// Spans of one segment that begin in a worker's share of the row's weight.
struct DecodeShare {
    uint32_t low;
    uint32_t high;

    __device__ DecodeShare(const DecodeWork& work, uint32_t worker, uint32_t workers) {
        const uint32_t share = (work.weight + workers - 1) / workers;
        low = static_cast<uint32_t>(min(uint64_t{share} * worker, uint64_t{work.weight}));
        high = static_cast<uint32_t>(min(uint64_t{low} + share, uint64_t{work.weight}));
    }

    // before: the weight of the segments before it. The first token of the first span from `at` on.
    __device__ __forceinline__ static int64_t first_token(uint32_t at, uint32_t before,
                                                          uint32_t span_weight) {
        const uint32_t spans = at <= before ? 0 : (at - before + span_weight - 1) / span_weight;
        return int64_t{spans} * kDecodeSpan;
    }
};

}  // namespace lightvlm
