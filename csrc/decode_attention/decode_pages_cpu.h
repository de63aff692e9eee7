// Where the tokens of a span in pages lie: a look at the table for each page, addresses for each
// group of tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "decode_attention/decode_attention.h"
#include "decode_attention/decode_span_cpu.h"

namespace lightvlm::decode_detail {

// What the tables have outside [0, pages) for the valid tokens [begin, end) of row b: its block, or
// -1 if there is none.
inline int64_t bad_block(const KVSegmentParams& segment, int64_t b, int64_t begin, int64_t end) {
    if (begin >= end) return -1;
    const int32_t* table = segment.block_table + b * segment.block_table_stride;
    for (int64_t i = begin / segment.page_size; i <= (end - 1) / segment.page_size; ++i) {
        if (table[i] < 0 || table[i] >= segment.pages) return i;
    }
    return -1;
}

class SpanPages {
  public:
    // Of key/value head kv and batch row b, whose valid tokens end at row_end; size: bytes of an
    // element.
    SpanPages(const KVSegmentParams& segment, int64_t b, int64_t kv, int64_t row_end, int64_t size)
        : segment_(segment),
          table_(segment.block_table + b * segment.block_table_stride),
          row_end_(row_end),
          key_{static_cast<const char*>(segment.key) + kv * segment.key_head_stride * size,
               segment.key_batch_stride * size, segment.key_token_stride * size},
          value_{static_cast<const char*>(segment.value) + kv * segment.value_head_stride * size,
                 segment.value_batch_stride * size, segment.value_token_stride * size} {}

    // Tokens [begin, end) become the span's; its rows hold until the next call.
    void set(int64_t begin, int64_t end, Span* span) {
        span->key = find(key_, begin, end, key_groups_);
        span->value = find(value_, begin, end, value_groups_);
        const int64_t next = std::min(end + kSpanTokens, row_end_);
        // Nothing to fetch after the last: what has been read will do.
        span->next_key = next > end ? find(key_, end, next, next_groups_) : span->key;
    }

  private:
    static constexpr int kGroup = SpanRows::kGroup;
    // Of a span, and two for what RowsAhead fetches beyond it.
    static constexpr int kGroups = kSpanTokens / kGroup + 3;

    struct Pages {
        const char* data;
        int64_t page_stride;
        int64_t token_stride;
    };

    SpanRows find(const Pages& pages, int64_t begin, int64_t end, const char** groups) const {
        const int64_t first = begin / kGroup * kGroup;
        int64_t block = first / segment_.page_size;
        int64_t slot = first % segment_.page_size;
        int count = 0;
        for (int64_t n = first; n < end; n += kGroup) {
            groups[count++] =
                pages.data + table_[block] * pages.page_stride + slot * pages.token_stride;
            slot += kGroup;
            if (slot == segment_.page_size) {
                slot = 0;
                ++block;
            }
        }
        std::fill(groups + count, groups + kGroups, groups[count - 1]);
        return {nullptr, pages.token_stride, groups, static_cast<int>(begin - first)};
    }

    const KVSegmentParams& segment_;
    const int32_t* table_;
    int64_t row_end_;
    Pages key_;
    Pages value_;
    const char* key_groups_[kGroups];
    const char* value_groups_[kGroups];
    const char* next_groups_[kGroups];
};

}  // namespace lightvlm::decode_detail
