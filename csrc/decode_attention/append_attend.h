// append_attend: a decoding step on one dense cache. New keys and values are written behind the old
// ones, then one query token a batch row attends to all of them. See
// lightvlm_ext/ops/append_attend.py.
#pragma once

#include <cstdint>

#include "common/cuda_types.h"
#include "common/divisor.h"
#include "common/error_word.h"
#include "common/host_device.h"
#include "decode_attention/decode_attention.h"

namespace lightvlm {

// Keys or values. Strides are in bytes; a token's head is contiguous.
struct AppendedRows {
    char* to = nullptr;          // [batch, capacity, heads, head_dim], or pages of it
    const char* from = nullptr;  // [batch, added, heads, head_dim]
    int64_t to_batch = 0;        // from page to page where paged
    int64_t to_token = 0;
    int64_t to_head = 0;
    int64_t from_batch = 0;
    int64_t from_token = 0;
    int64_t from_head = 0;

    LIGHTVLM_HOST_DEVICE const char* source(int64_t b, int64_t token, int64_t head) const {
        return from + b * from_batch + token * from_token + head * from_head;
    }
    // row: of the batch, or a page.
    LIGHTVLM_HOST_DEVICE char* target(int64_t row, int64_t slot, int64_t head) const {
        return to + row * to_batch + slot * to_token + head * to_head;
    }
};

struct AppendParams {
    int64_t batch = 0;
    int64_t added = 0;  // tokens of each row; none: nothing is written, and the rest is not set
    int64_t heads = 0;
    int64_t capacity = 0;  // tokens of a row
    int64_t row_bytes = 0;
    int32_t access_bytes = 1;  // the widest access that all addresses and strides allow
    AppendedRows rows[2];      // keys, values

    // [batch]: row b's new tokens are lens[b], lens[b] + 1, ...; null: the last of its capacity.
    const int32_t* lens = nullptr;
    const int32_t* block_table = nullptr;  // as in KVSegmentParams; null: not paged
    int64_t block_table_stride = 0;
    Divisor page_size;
    int32_t pages = 0;

    int32_t* error = nullptr;  // the device error word

    // Row b's first new token; not checked.
    LIGHTVLM_HOST_DEVICE int64_t first(int64_t b) const {
        return lens != nullptr ? lens[b] : capacity - added;
    }
};

struct AppendAttendParams {
    AppendParams append;
    DecodeAttentionParams attend;  // one dense segment, whose `added` are the new tokens
};

Status append_attend_cpu(const AppendAttendParams& params);

#if LIGHTVLM_HAS_DEVICE
cudaError_t launch_append_attend_cuda(const AppendAttendParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
