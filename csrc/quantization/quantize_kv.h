// quantize_kv: keys and values into 8, 4 or 2 bits. See lightvlm_ext/ops/quantize_kv.py for what it
// computes, packed_kv.h for the layout.
#pragma once

#include <cstdint>

#include "common/cuda_types.h"
#include "common/dispatch.h"
#include "common/error_word.h"
#include "common/host_device.h"
#include "quantization/packed_kv.h"

namespace lightvlm {

constexpr int64_t kPackedMaxHeadDim = 256;

// Strides of a tensor whose last dimension is contiguous, in elements. `token` is that of blocks
// for channel parameters.
struct PackedStrides {
    int64_t batch = 0;
    int64_t head = 0;
    int64_t token = 0;

    LIGHTVLM_HOST_DEVICE int64_t at(int64_t b, int64_t h, int64_t n) const {
        return b * batch + h * head + n * token;
    }
};

struct QuantizeKvParams {
    int64_t batch = 0;
    int64_t tokens = 0;
    int64_t heads = 0;
    int64_t head_dim = 0;
    int bits = 8;
    int64_t block = 1;   // tokens that share channel parameters
    int64_t blocks = 0;  // ceil(tokens / block)

    DType dtype = DType::kFloat32;  // of key and value
    const void* key = nullptr;      // [batch, tokens, heads, head_dim]
    const void* value = nullptr;
    PackedStrides key_strides;
    PackedStrides value_strides;
    const int32_t* lens = nullptr;  // [batch], or null: all tokens are valid
    int64_t lens_stride = 0;

    uint8_t* key_codes = nullptr;  // [batch, heads, tokens, row_bytes]
    uint8_t* value_codes = nullptr;
    float* key_scale = nullptr;  // [batch, heads, blocks, head_dim]
    float* key_zero = nullptr;
    float* value_channel = nullptr;
    half_t* value_token = nullptr;  // [batch, heads, tokens, (scale, zero)]
    PackedStrides key_codes_strides;
    PackedStrides value_codes_strides;
    PackedStrides key_scale_strides;
    PackedStrides key_zero_strides;
    PackedStrides value_channel_strides;
    PackedStrides value_token_strides;

    // CUDA only: extremes of the parts of a block, [batch, heads, blocks, parts, 3, head_dim]. One
    // part needs none.
    float* workspace = nullptr;
    int64_t parts = 1;
    int32_t* error = nullptr;  // the device error word

    LIGHTVLM_HOST_DEVICE float levels() const { return static_cast<float>((1 << bits) - 1); }
};

// Where the first entry that is not finite stands; the position of a Status counts (key or value,
// token, head, channel) in this order.
struct QuantizePosition {
    bool is_value;
    int64_t token;
    int64_t head;
    int64_t channel;
};
inline QuantizePosition quantize_position(const QuantizeKvParams& params, int64_t position) {
    const int64_t token = position / (params.heads * params.head_dim);
    return {token >= params.tokens, token % params.tokens,
            position / params.head_dim % params.heads, position % params.head_dim};
}

Status quantize_kv_cpu(const QuantizeKvParams& params);

#if LIGHTVLM_HAS_DEVICE
cudaError_t launch_quantize_kv_cuda(const QuantizeKvParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
