// quantize_kv: checks, parameters, registration.
#include "quantization/quantize_kv.h"

#include <optional>

#include "common/checks.h"
#include "common/registration.h"
#include "quantization/packed_tensors.h"

namespace lightvlm {

namespace {

// Says where an entry is not finite; other errors are raised by their row.
[[maybe_unused]] void raise_quantize_status(const Status& status, const QuantizeKvParams& params) {
    if (status.bit != kErrorNotFinite) return raise_status(status, "quantize_kv");
    const QuantizePosition at = quantize_position(params, status.position);
    fail(at.is_value ? "value" : "key", ": row ", status.row, ", token ", at.token, ", head ",
         at.head, ", channel ", at.channel, " is ", status.value, ", must be finite");
}

template <Backend backend>
void quantize_kv_op(const Tensor& key,                       // [B, N, Hkv, D]
                    const Tensor& value,                     // [B, N, Hkv, D]
                    const std::optional<Tensor>& lens,       // [B] int32
                    int64_t bits,                            // 8, 4 or 2
                    int64_t block,                           // tokens that share channel parameters
                    const Tensor& key_codes,                 // [B, Hkv, N, row bytes], out
                    const Tensor& value_codes,               // [B, Hkv, N, row bytes], out
                    const Tensor& key_scale,                 // [B, Hkv, T, D], out
                    const Tensor& key_zero,                  // [B, Hkv, T, D], out
                    const Tensor& value_channel,             // [B, Hkv, T, D], out
                    const Tensor& value_token,               // [B, Hkv, N, 2], out
                    const std::optional<Tensor>& workspace,  // [B, Hkv, T, parts, 3, D]
                    const std::optional<Tensor>& error) {    // [1] int32, device error word
    QuantizeKvParams params;
    set_packed_sizes(key, value,
                     {key_codes, value_codes, key_scale, key_zero, value_channel, value_token},
                     lens, bits, block, &params);
    params.blocks = key_scale.size(2);
    params.key = key.const_data_ptr();
    params.value = value.const_data_ptr();
    params.key_strides = packed_strides(key, 2);
    params.value_strides = packed_strides(value, 2);
    params.key_codes = key_codes.mutable_data_ptr<uint8_t>();
    params.value_codes = value_codes.mutable_data_ptr<uint8_t>();
    params.key_scale = key_scale.mutable_data_ptr<float>();
    params.key_zero = key_zero.mutable_data_ptr<float>();
    params.value_channel = value_channel.mutable_data_ptr<float>();
    params.value_token = static_cast<half_t*>(value_token.mutable_data_ptr());
    params.key_codes_strides = packed_strides(key_codes);
    params.value_codes_strides = packed_strides(value_codes);
    params.key_scale_strides = packed_strides(key_scale);
    params.key_zero_strides = packed_strides(key_zero);
    params.value_channel_strides = packed_strides(value_channel);
    params.value_token_strides = packed_strides(value_token);
    if (workspace.has_value()) {
        check_dtype(*workspace, "workspace", ScalarType::Float);
        check_shape(*workspace, "workspace",
                    {params.batch, params.heads, params.blocks, -1, 3, params.head_dim});
        check_device(*workspace, "workspace", key);
        check_contiguous(*workspace, "workspace");
        check(workspace->size(3) >= 1, "workspace: must have at least one part");
        params.parts = workspace->size(3);
        params.workspace = workspace->mutable_data_ptr<float>();
    }
    params.error = error_word_pointer(error, key);
    if (key.numel() == 0) return;
    if constexpr (backend == Backend::kCpu) {
        raise_quantize_status(quantize_kv_cpu(params), params);
    } else {
        LIGHTVLM_RUN(quantize_kv, backend, key, params);
    }
}

}  // namespace

LIGHTVLM_REGISTER(quantize_kv, quantize_kv_op)

}  // namespace lightvlm
