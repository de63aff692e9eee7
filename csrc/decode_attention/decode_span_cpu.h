// The unit of work of the CPU twin: a span, up to kSpanTokens tokens of one segment, batch row and
// key/value head that share channel parameters, against up to kHeadTile query heads of the group.
//
//   scores   s[h][n] = unit * <q[h], k[n]>, in units of log2 (unit = scale * log2 e)
//   softmax  p[h][n] = 2^(s - m[h]), m[h] the span's maximum, l[h] the sum of p
//   values   o[h][d] = sum over n of p[h][n] * v[n][d]
//
// Here is what the steps share. Scores and values: decode_float_cpu.h for every format and
// processor, decode_packed_cpu.h and decode_bf16_cpu.h where they are faster.
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

// Keys or values of a span: rows at a stride, or in pages. Those are looked up by groups: the first
// token is the `first`-th of groups[0], each later group begins with its first row.
struct SpanRows {
    const char* data;  // the first token's, where not in pages
    int64_t stride;    // in bytes
    const char* const* groups = nullptr;
    int first = 0;

    LIGHTVLM_INLINE const char* operator[](int n) const {
        if (groups == nullptr) return data + n * stride;
        const int row = first + n;
        return groups[row / kGroup] + row % kGroup * stride;
    }

    static constexpr int kGroup = static_cast<int>(kDecodePageGroup);
};

struct Span {
    KVFormat format;
    int bits;  // of a code; packed formats only
    int tokens;
    int heads;
    int64_t head_dim;
    int64_t channels;  // head_dim rounded up to kPackedChannelMultiple
    float unit;

    SpanRows key;
    SpanRows value;
    SpanRows next_key;  // of the tokens that come next

    // Packed formats only.
    const float* key_scale;
    const float* key_zero;
    const float* value_channel;
    const uint16_t* value_token;
    int64_t value_token_stride;  // in numbers
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
class RowsAhead {
  public:
    LIGHTVLM_INLINE RowsAhead(const SpanRows& rows, int64_t row_bytes)
        : row_(rows[0]), stride_(rows.stride), row_bytes_(row_bytes), groups_(rows.groups) {
        if (groups_ != nullptr) {
            left_ = SpanRows::kGroup - rows.first;
        } else if (stride_ == row_bytes_) {
            row_bytes_ = INT64_MAX;
        }
    }

    LIGHTVLM_INLINE void step() {
        __builtin_prefetch(row_ + at_, 0, 2);
        at_ += 64;
        const bool ends = at_ >= row_bytes_;
        row_ += ends ? stride_ : 0;
        at_ = ends ? 0 : at_;
        left_ -= ends ? 1 : 0;
        if (left_ == 0) {
            row_ = *++groups_;
            left_ = SpanRows::kGroup;
        }
    }

  private:
    const char* row_;
    int64_t stride_;
    int64_t row_bytes_;
    const char* const* groups_;
    int64_t left_ = INT64_MAX;  // rows of the group
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
