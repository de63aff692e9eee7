// The tensors of a packed segment, checked and described, for the ops that take them one by one.
#pragma once

#include <limits>

#include "common/checks.h"
#include "quantization/packed_kv.h"
#include "quantization/quantize_kv.h"

namespace lightvlm {

struct PackedTensors {
    const Tensor& key_codes;
    const Tensor& value_codes;
    const Tensor& key_scale;
    const Tensor& key_zero;
    const Tensor& value_channel;
    const Tensor& value_token;
};

// Strides of (batch, heads, rows, ...), or of (batch, rows, heads, ...) with head_dim_index 2.
inline PackedStrides packed_strides(const Tensor& tensor, int64_t head_index = 1) {
    return {tensor.stride(0), tensor.stride(head_index), tensor.stride(3 - head_index)};
}

inline void check_packed_sizes(int64_t head_dim, int64_t bits, int64_t block, int64_t tokens) {
    check(packed_head_dim(head_dim), "key: has head width ", head_dim,
          ", must be one of 32, 64, 80, 96, 128, 192, 256");
    check(bits == 8 || bits == 4 || bits == 2, "bits: got ", bits, ", must be 8, 4 or 2");
    check(block >= 1 && (block >= tokens || block % kPackedBlockMultiple == 0), "block: got ",
          block, ", must be a multiple of ", kPackedBlockMultiple, ", or at least the ", tokens,
          " tokens");
    check(tokens <= std::numeric_limits<int32_t>::max(), "key: has ", tokens,
          " tokens, must have at most ", std::numeric_limits<int32_t>::max());
}

// Shapes, dtypes, devices and contiguous rows, for (batch, heads, tokens).
inline void check_packed_tensors(const PackedTensors& packed, int64_t batch, int64_t heads,
                                 int64_t tokens, int64_t head_dim, int64_t bits, int64_t block,
                                 const Tensor& other) {
    const int64_t row = packed_row_bytes(head_dim, static_cast<int>(bits));
    const int64_t blocks = tokens / block + (tokens % block != 0);
    const auto check_one = [&](const Tensor& tensor, const char* name, ScalarType dtype,
                               int64_t rows, int64_t width) {
        check_dtype(tensor, name, dtype);
        check_shape(tensor, name, {batch, heads, rows, width});
        check_device(tensor, name, other);
        check_last_contiguous(tensor, name);
    };
    check_one(packed.key_codes, "key_codes", ScalarType::Byte, tokens, row);
    check_one(packed.value_codes, "value_codes", ScalarType::Byte, tokens, row);
    check_one(packed.key_scale, "key_scale", ScalarType::Float, blocks, head_dim);
    check_one(packed.key_zero, "key_zero", ScalarType::Float, blocks, head_dim);
    check_one(packed.value_channel, "value_channel", ScalarType::Float, blocks, head_dim);
    check_one(packed.value_token, "value_token", ScalarType::Half, tokens, 2);
}

inline void check_lens(const std::optional<Tensor>& lens, int64_t batch, const Tensor& other) {
    if (!lens.has_value()) return;
    check_dtype(*lens, "lens", ScalarType::Int);
    check_shape(*lens, "lens", {batch});
    check_device(*lens, "lens", other);
}

// What quantize_kv and dequantize_kv have in common: (batch, tokens, heads, head_dim) keys and
// values, the packed tensors that fit them, and lens. Checks all of it and fills the sizes.
template <typename Params>
void set_packed_sizes(const Tensor& key, const Tensor& value, const PackedTensors& packed,
                      const std::optional<Tensor>& lens, int64_t bits, int64_t block,
                      Params* params) {
    params->dtype = floating_dtype(key, "key");
    check_dtype(value, "value", key.scalar_type());
    check_shape(key, "key", {-1, -1, -1, -1});
    params->batch = key.size(0);
    params->tokens = key.size(1);
    params->heads = key.size(2);
    params->head_dim = key.size(3);
    check_shape(value, "value", {params->batch, params->tokens, params->heads, params->head_dim});
    check_device(value, "value", key);
    check_last_contiguous(key, "key");
    check_last_contiguous(value, "value");
    check_packed_sizes(params->head_dim, bits, block, params->tokens);
    check_packed_tensors(packed, params->batch, params->heads, params->tokens, params->head_dim,
                         bits, block, key);
    check_lens(lens, params->batch, key);
    params->bits = static_cast<int>(bits);
    params->block = block;
    if (lens.has_value()) {
        params->lens = lens->const_data_ptr<int32_t>();
        params->lens_stride = lens->stride(0);
    }
}

}  // namespace lightvlm
