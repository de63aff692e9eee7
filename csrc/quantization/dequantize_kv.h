// dequantize_kv: a packed segment back to keys and values. See lightvlm_ext/ops/dequantize_kv.py,
// packed_kv.h for the layout.
#pragma once

#include <cstdint>

#include "common/cuda_types.h"
#include "common/dispatch.h"
#include "common/error_word.h"
#include "quantization/packed_kv.h"
#include "quantization/quantize_kv.h"

namespace lightvlm {

struct DequantizeKvParams {
    int64_t batch = 0;
    int64_t tokens = 0;
    int64_t heads = 0;
    int64_t head_dim = 0;
    int bits = 8;
    int64_t block = 1;
    const int32_t* lens = nullptr;  // [batch], or null: all tokens are valid
    int64_t lens_stride = 0;

    const uint8_t* key_codes = nullptr;  // [batch, heads, tokens, row_bytes]
    const uint8_t* value_codes = nullptr;
    const float* key_scale = nullptr;  // [batch, heads, ceil(tokens / block), head_dim]
    const float* key_zero = nullptr;
    const float* value_channel = nullptr;
    const half_t* value_token = nullptr;  // [batch, heads, tokens, (scale, zero)]
    PackedStrides key_codes_strides;
    PackedStrides value_codes_strides;
    PackedStrides key_scale_strides;
    PackedStrides key_zero_strides;
    PackedStrides value_channel_strides;
    PackedStrides value_token_strides;

    DType dtype = DType::kFloat32;  // of key and value
    void* key = nullptr;            // [batch, tokens, heads, head_dim]
    void* value = nullptr;
    PackedStrides key_strides;
    PackedStrides value_strides;
    int32_t* error = nullptr;  // the device error word
};

Status dequantize_kv_cpu(const DequantizeKvParams& params);

#if LIGHTVLM_HAS_DEVICE
cudaError_t launch_dequantize_kv_cuda(const DequantizeKvParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
