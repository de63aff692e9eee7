// The unit of work of the CPU twin: a span, up to kSpanTokens tokens of one segment, batch row and
// key/value head that share channel parameters, against up to kHeadTile query heads of the group.
//
//   scores   s[h][n] = unit * <q[h], k[n]>, in units of log2 (unit = scale * log2 e)
//   softmax  p[h][n] = 2^(s - m[h]), m[h] the span's maximum, l[h] the sum of p
//   values   o[h][d] = sum over n of p[h][n] * v[n][d]
//
// Here is what the steps share. Scores and values: decode_float_cpu.h for every format and
// processor, decode_packed_cpu.h, decode_bf16_cpu.h and decode_dense_cpu.h where they are faster.
#pragma once

#include <cstdint>
#include <limits>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "decode_attention/decode_attention.h"

namespace lightvlm::decode_detail {

constexpr int kHeadTile = 8;
// So many products of a 16-bit weight and an 8-bit code fit the sums of 32 bits.
constexpr int kSpanTokens = 256;
constexpr int kMaxChannels = 256;
// Numbers between the scores of two heads. They are written up to 31 tokens past the span.
constexpr int kScorePitch = kSpanTokens + 32;

// Rows of tokens at a stride, in bytes.
struct StridedRows {
    const char* data;
    int64_t stride;

    LIGHTVLM_INLINE const char* operator[](int n) const { return data + n * stride; }
};

// Rows in pages, each with an address of its own.
struct ListedRows {
    const char* const* row;

    LIGHTVLM_INLINE const char* operator[](int n) const { return row[n]; }
};

template <typename Rows>
struct SpanRows {
    Rows key;
    Rows value;
    Rows next_key;  // of the tokens that come next, as many; they are fetched, not read
};

struct Span {
    KVFormat format;
    int bits;  // of a code; packed formats only
    int tokens;
    int heads;
    int64_t head_dim;
    int64_t channels;  // head_dim rounded up to kPackedChannelMultiple
    float unit;

    bool in_pages;  // dense formats only; says which of the two there is
    SpanRows<StridedRows> strided;
    SpanRows<ListedRows> listed;

    // Packed formats only.
    const float* key_scale;
    const float* key_zero;
    const float* value_channel;
    const uint16_t* value_token;
    int64_t value_token_stride;  // in numbers

    LIGHTVLM_INLINE const char* key_row(int n) const {
        return in_pages ? listed.key[n] : strided.key[n];
    }
    LIGHTVLM_INLINE const char* value_row(int n) const {
        return in_pages ? listed.value[n] : strided.value[n];
    }
};

// What one thread needs. Rows of heads: scores[h * kScorePitch + n], out[h * kMaxChannels + d].
struct alignas(64) SpanScratch {
    float query[kHeadTile * kMaxChannels];  // not scaled; 0 past head_dim
    float scores[kHeadTile * kScorePitch];  // where the weights need not stay
    float out[kHeadTile * kMaxChannels];
    float highest[kHeadTile];
    float sum[kHeadTile];
    // What the query in work has been folded for: it stays until the block of channels changes.
    const float* folded = nullptr;
    // Bytes that scores and values use as they like.
    alignas(64) unsigned char work[kSpanTokens * kMaxChannels * 2 + kHeadTile * kSpanTokens * 8];
};

// Fetches a line of rows at each step, so that memory works while sums are made: scores fetch the
// span's values, values the keys that come next. Addresses may lie outside the tensor.
template <typename Rows>
class RowsAhead;

template <>
class RowsAhead<StridedRows> {
  public:
    LIGHTVLM_INLINE RowsAhead(const StridedRows& rows, int64_t row_bytes)
        : row_(rows.data),
          stride_(rows.stride),
          row_bytes_(stride_ == row_bytes ? INT64_MAX : row_bytes) {}

    LIGHTVLM_INLINE void step() {
        __builtin_prefetch(row_ + at_, 0, 2);
        at_ += 64;
        const bool ends = at_ >= row_bytes_;
        row_ += ends ? stride_ : 0;
        at_ = ends ? 0 : at_;
    }

  private:
    const char* row_;
    int64_t stride_;
    int64_t row_bytes_;
    int64_t at_ = 0;
};

// Lists go on for kRowsPast entries after the span's last: who fetches must not take more lines
// than the rows of a span, and of those that fill up its last vectors, have.
constexpr int kRowsPast = 32;

template <>
class RowsAhead<ListedRows> {
  public:
    LIGHTVLM_INLINE RowsAhead(const ListedRows& rows, int64_t row_bytes)
        : row_(rows.row), row_bytes_(row_bytes) {}

    LIGHTVLM_INLINE void step() {
        __builtin_prefetch(*row_ + at_, 0, 2);
        at_ += 64;
        const bool ends = at_ >= row_bytes_;
        row_ += ends ? 1 : 0;
        at_ = ends ? 0 : at_;
    }

  private:
    const char* const* row_;
    int64_t row_bytes_;
    int64_t at_ = 0;
};

// The sum of 16 numbers, in halves; they are overwritten.
LIGHTVLM_INLINE float fold_lanes(float* sum) {
    for (int half = 8; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
    }
    return sum[0];
}

}  // namespace lightvlm::decode_detail
