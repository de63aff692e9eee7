// dequantize_kv: checks, parameters, registration.
#include "quantization/dequantize_kv.h"

#include <optional>

#include "common/checks.h"
#include "common/registration.h"
#include "quantization/packed_tensors.h"

namespace lightvlm {

namespace {

template <Backend backend>
void dequantize_kv_op(const Tensor& key_codes,               // [B, Hkv, N, row bytes]
                      const Tensor& value_codes,             // [B, Hkv, N, row bytes]
                      const Tensor& key_scale,               // [B, Hkv, T, D]
                      const Tensor& key_zero,                // [B, Hkv, T, D]
                      const Tensor& value_channel,           // [B, Hkv, T, D]
                      const Tensor& value_token,             // [B, Hkv, N, 2]
                      const std::optional<Tensor>& lens,     // [B] int32
                      int64_t bits,                          // 8, 4 or 2
                      int64_t block,                         // tokens that share channel parameters
                      const Tensor& key,                     // [B, N, Hkv, D], out
                      const Tensor& value,                   // [B, N, Hkv, D], out
                      const std::optional<Tensor>& error) {  // [1] int32, device error word
    DequantizeKvParams params;
    set_packed_sizes(key, value,
                     {key_codes, value_codes, key_scale, key_zero, value_channel, value_token},
                     lens, bits, block, &params);
    params.key_codes = key_codes.const_data_ptr<uint8_t>();
    params.value_codes = value_codes.const_data_ptr<uint8_t>();
    params.key_scale = key_scale.const_data_ptr<float>();
    params.key_zero = key_zero.const_data_ptr<float>();
    params.value_channel = value_channel.const_data_ptr<float>();
    params.value_token = static_cast<const half_t*>(value_token.const_data_ptr());
    params.key_codes_strides = packed_strides(key_codes);
    params.value_codes_strides = packed_strides(value_codes);
    params.key_scale_strides = packed_strides(key_scale);
    params.key_zero_strides = packed_strides(key_zero);
    params.value_channel_strides = packed_strides(value_channel);
    params.value_token_strides = packed_strides(value_token);
    params.key = key.mutable_data_ptr();
    params.value = value.mutable_data_ptr();
    params.key_strides = packed_strides(key, 2);
    params.value_strides = packed_strides(value, 2);
    params.error = error_word_pointer(error, key);
    if (key.numel() == 0) return;
    LIGHTVLM_RUN(dequantize_kv, backend, key, params);
}

}  // namespace

LIGHTVLM_REGISTER(dequantize_kv, dequantize_kv_op)

}  // namespace lightvlm
