// CPU twin of append_attend.cuh: memmove, then decode_attention's own twin.
#include "decode_attention/append_attend.h"

#include <cstring>

#include "decode_attention/decode_pages_cpu.h"

namespace lightvlm {

namespace {

void copy_token(const AppendParams& params, const AppendedRows& rows, int64_t b, int64_t token,
                int64_t row, int64_t slot) {
    const bool joined = rows.from_head == params.row_bytes && rows.to_head == params.row_bytes;
    const int64_t pieces = joined ? 1 : params.heads;
    const auto bytes = static_cast<size_t>(params.row_bytes * params.heads / pieces);
    for (int64_t head = 0; head < pieces; ++head) {
        std::memmove(rows.target(row, slot, head), rows.source(b, token, head), bytes);
    }
}

// Every place has been found to exist.
void append(const AppendParams& params) {
    for (int64_t b = 0; b < params.batch; ++b) {
        for (int64_t token = 0; token < params.added; ++token) {
            int64_t row = b;
            int64_t slot = params.first(b) + token;
            if (params.block_table != nullptr) {
                const int64_t block = slot / params.page_size.divisor;
                row = params.block_table[b * params.block_table_stride + block];
                slot -= block * params.page_size.divisor;
            }
            for (const AppendedRows& rows : params.rows) {
                copy_token(params, rows, b, token, row, slot);
            }
        }
    }
}

}  // namespace

Status append_attend_cpu(const AppendAttendParams& params) {
    const AppendParams& to = params.append;
    if (to.added > 0) {
        const Status status = check_decode_tokens(params.attend);
        if (!status.ok()) return status;
        // What leftpad hides is written all the same.
        const KVSegmentParams& segment = params.attend.segment[0];
        FirstError error;
        for (int64_t b = 0; b < to.batch && segment.paged(); ++b) {
            const int64_t block = decode_detail::bad_block(segment, b, to.first(b), segment.end(b));
            if (block < 0) continue;
            const int32_t page = segment.block_table[b * segment.block_table_stride + block];
            error.report(kErrorPageRange, b, block, page);
        }
        if (!error.status().ok()) return error.status();
        append(to);
    }
    return decode_attention_cpu(params.attend);
}

}  // namespace lightvlm
