// The packed cache: keys and values of one segment at 8, 4 or 2 bits. No torch here; the Python
// side is lightvlm_ext/_kv.py, and docs/kernels/quantization.md has the bit layout in prose.
//
//   key[n, d]   = key_scale[n / block, d] * key_code[n, d] + key_zero[n / block, d]
//   value[n, d] = value_channel[n / block, d] * (value_token[n].scale * value_code[n, d]
//                                                + value_token[n].zero)
//
// for each batch row and key/value head. A token's codes are one row of packed_row_bytes() bytes,
// in the order of its channels: code d stands at bit d * bits of the row, from the lowest bit of
// the first byte up. A row is a plain run of bytes, so that dropping tokens stays a move of rows.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace lightvlm {

// Channels of a row, rounded up so that a quarter and an eighth of it are whole bytes at 2 bits;
// the codes past head_dim are 0. Of the supported widths only 80 is rounded, to 96.
constexpr int64_t kPackedChannelMultiple = 32;

// Tokens per block of channel parameters are a multiple of this, unless one block holds all tokens.
constexpr int64_t kPackedBlockMultiple = 64;

constexpr int64_t packed_channels(int64_t head_dim) {
    return (head_dim + kPackedChannelMultiple - 1) / kPackedChannelMultiple *
           kPackedChannelMultiple;
}

constexpr int64_t packed_row_bytes(int64_t head_dim, int bits) {
    return packed_channels(head_dim) * bits / 8;
}

constexpr bool packed_head_dim(int64_t head_dim) {
    return head_dim == 32 || head_dim == 64 || head_dim == 80 || head_dim == 96 ||
           head_dim == 128 || head_dim == 192 || head_dim == 256;
}

}  // namespace lightvlm
