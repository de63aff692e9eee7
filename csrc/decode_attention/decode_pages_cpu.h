// Where the tokens of a span in pages lie: an address for each row, a look at the table for each
// page.
#pragma once

#include <algorithm>
#include <cstdint>

#include "decode_attention/decode_attention.h"
#include "decode_attention/decode_span_cpu.h"

namespace lightvlm::decode_detail {

// The first block of row b with a page outside [0, pages) that the valid tokens [begin, end) need;
// -1 if there is none.
inline int64_t bad_block(const KVSegmentParams& segment, int64_t b, int64_t begin, int64_t end) {
    if (begin >= end) return -1;
    const int32_t* table = segment.block_table + b * segment.block_table_stride;
    for (int64_t i = begin / segment.page_size; i <= (end - 1) / segment.page_size; ++i) {
        if (table[i] < 0 || table[i] >= segment.pages) return i;
    }
    return -1;
}

// The spans of one batch row and key/value head, from first to last.
class SpanPages {
  public:
    // row_end: where the row's valid tokens end.   size: bytes of an element.
    SpanPages(const KVSegmentParams& segment, int64_t b, int64_t kv, int64_t row_end, int64_t size)
        : page_size_(segment.page_size),
          table_(segment.block_table + b * segment.block_table_stride),
          row_end_(row_end),
          key_{static_cast<const char*>(segment.key) + kv * segment.key_head_stride * size,
               segment.key_batch_stride * size, segment.key_token_stride * size},
          value_{static_cast<const char*>(segment.value) + kv * segment.value_head_stride * size,
                 segment.value_batch_stride * size, segment.value_token_stride * size} {}

    // Tokens [begin, end) become the span's; its rows hold until the next call.
    void set(int64_t begin, int64_t end, Span* span) {
        if (begin == next_begin_) {
            std::swap(key_rows_, next_rows_);
        } else {
            list(key_, begin, end, key_rows_);
        }
        list(value_, begin, end, value_rows_);
        const int64_t next_end = std::min(end + kSpanTokens, row_end_);
        next_begin_ = next_end > end ? end : -1;
        if (next_end > end) list(key_, end, next_end, next_rows_);
        // After the last span there is nothing to fetch: what has just been read will do.
        const char* const* next = next_end > end ? next_rows_ : key_rows_;
        span->listed = {{key_rows_}, {value_rows_}, {next}};
    }

  private:
    static constexpr int kRows = kSpanTokens + kRowsPast;

    struct Pages {
        const char* data;
        int64_t page_stride;
        int64_t token_stride;
    };

    void list(const Pages& pages, int64_t begin, int64_t end, const char** rows) const {
        const char** to = rows;
        int64_t block = begin / page_size_;
        int64_t slot = begin - block * page_size_;
        for (int64_t left = end - begin; left > 0; ++block, slot = 0) {
            const int64_t count = std::min(left, page_size_ - slot);
            const char* row =
                pages.data + table_[block] * pages.page_stride + slot * pages.token_stride;
            for (int64_t i = 0; i < count; ++i) to[i] = row + i * pages.token_stride;
            to += count;
            left -= count;
        }
        std::fill(to, rows + kRows, to[-1]);
    }

    int64_t page_size_;
    const int32_t* table_;
    int64_t row_end_;
    int64_t next_begin_ = -1;  // of what next_rows_ holds
    Pages key_;
    Pages value_;
    const char* rows_[3][kRows];
    const char** key_rows_ = rows_[0];
    const char** value_rows_ = rows_[1];
    const char** next_rows_ = rows_[2];
};

}  // namespace lightvlm::decode_detail
