// decode_attention: checks, parameters, registration.
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/registration.h"
#include "decode_attention/decode_attention.h"
#include "decode_attention/decode_checks.h"

namespace lightvlm {

namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

KVFormat packed_format(int64_t bits, int64_t segment) {
    switch (bits) {
        case 8:
            return KVFormat::kPacked8;
        case 4:
            return KVFormat::kPacked4;
        case 2:
            return KVFormat::kPacked2;
        default:
            fail(Field{segment, "bits"}, ": got ", bits,
                 ", must be 8, 4, 2, or 0 where not packed");
    }
}

// A tensor that a packed segment must have.
const Tensor& packed_field(const std::optional<Tensor>& tensor, const Field& name,
                           std::initializer_list<int64_t> sizes, ScalarType dtype,
                           const Tensor& query) {
    check(tensor.has_value(), name, ": must be given for a packed segment");
    check_dtype(*tensor, name, dtype);
    check_shape(*tensor, name, sizes);
    check_device(*tensor, name, query);
    return *tensor;
}

void check_listed(size_t entries, size_t segments, const char* name) {
    check(entries == segments, name, ": has ", entries, " entries, must have one for each of ",
          segments, " segments");
}

void set_masses(const Tensors& mass, const std::vector<int64_t>& mass_segment, const Tensor& query,
                DecodeAttentionParams* params) {
    check(mass.size() == mass_segment.size(), "mass: has ", mass.size(), " buffers, mass_segment ",
          mass_segment.size());
    for (size_t i = 0; i < mass.size(); ++i) {
        const int64_t of = mass_segment[i];
        check(of >= 0 && of < params->segments, "mass_segment: got ", of, ", must be in [0, ",
              params->segments, ")");
        const std::string name = "mass[" + std::to_string(of) + "]";
        check(params->segment[of].mass == nullptr, name, ": is given twice");
        set_mass(mass[i], name, query, of, params);
    }
}

// A list with an entry for each segment, or an empty one, which stands for entries that are all
// absent: reading a list costs as much as some ten keys.
void check_optional(const OptionalTensors& list, size_t segments, const char* name) {
    if (!list.empty()) check_listed(list.size(), segments, name);
}

const std::optional<Tensor>& entry(const OptionalTensors& list, int64_t segment) {
    static const std::optional<Tensor> absent;
    return list.empty() ? absent : list[segment];
}

// The fields of packed segments that dense ones do not have.
struct PackedFields {
    const std::vector<int64_t>& bits;
    const std::vector<int64_t>& block;
    const OptionalTensors& key_scale;
    const OptionalTensors& key_zero;
    const OptionalTensors& value_channel;
    const OptionalTensors& value_token;
};

void set_packed(const Tensor& query, const Tensor& key, const Tensor& value,
                const PackedFields& fields, int64_t number, DecodeAttentionParams* params) {
    KVSegmentParams& segment = params->segment[number];
    segment.format = packed_format(fields.bits[number], number);
    const int64_t row = packed_row_bytes(params->head_dim, packed_bits(segment.format));
    check_rows(key, Field{number, "key"}, query, {params->batch, -1, -1, row}, ScalarType::Byte);
    segment.tokens = key.size(2);
    check_sizes(segment.tokens, key.size(1), number, params);
    check_rows(value, Field{number, "value"}, query,
               {params->batch, params->key_heads, key.size(2), row}, ScalarType::Byte);
    set_rows(key, value, 2, 1, &segment);

    segment.block = fields.block[number];
    check(segment.block >= 1 &&
              (segment.block >= segment.tokens || segment.block % kPackedBlockMultiple == 0),
          Field{number, "block"}, ": got ", segment.block, ", must be a multiple of ",
          kPackedBlockMultiple, ", or at least the tokens, ", segment.tokens);
    segment.blocks = (segment.tokens + segment.block - 1) / segment.block;
    const auto of_channel = [&](const OptionalTensors& tensors, const char* name) {
        const Field full{number, name};
        const Tensor& tensor =
            packed_field(entry(tensors, number), full,
                         {params->batch, params->key_heads, segment.blocks, params->head_dim},
                         ScalarType::Float, query);
        check_contiguous(tensor, full);
        return tensor.const_data_ptr<float>();
    };
    segment.key_scale = of_channel(fields.key_scale, "key_scale");
    segment.key_zero = of_channel(fields.key_zero, "key_zero");
    segment.value_channel = of_channel(fields.value_channel, "value_channel");
    const Field token_name{number, "value_token"};
    const Tensor& token = packed_field(entry(fields.value_token, number), token_name,
                                       {params->batch, params->key_heads, segment.tokens, 2},
                                       ScalarType::Half, query);
    check_last_contiguous(token, token_name);
    segment.value_token = static_cast<const uint16_t*>(token.const_data_ptr());
    segment.value_token_batch_stride = token.stride(0);
    segment.value_token_head_stride = token.stride(1);
    segment.value_token_token_stride = token.stride(2);
}

template <Backend backend>
void decode_attention_op(
    const Tensor& query,                 // [B, 1, Hq, D] fp32, fp16 or bf16
    const Tensors& key,                  // dense: [B, N, Hkv, D], dtype of query;
    const Tensors& value,                // packed: [B, Hkv, N, row_bytes] uint8
    const std::vector<int64_t>& bits,    // 0: dense
    const std::vector<int64_t>& block,   // tokens that share channel parameters
    const OptionalTensors& lens,         // [B] int32
    const OptionalTensors& leftpad,      // [B] int32, dense only
    const OptionalTensors& block_table,  // [B, max_blocks] int32: dense key and value are pages
    const OptionalTensors& key_scale,    // [B, Hkv, T, D] fp32, packed only, as the next three
    const OptionalTensors& key_zero,     //
    const OptionalTensors& value_channel,
    const OptionalTensors& value_token,                       // [B, Hkv, N, 2] fp16
    double scale,                                             //
    const Tensors& mass,                                      // [B, Hkv, N] fp32, added to
    const std::vector<int64_t>& mass_segment,                 // of which segment each is
    const Tensor& out,                                        // [B, 1, Hq, D], out
    const Tensor& lse,                                        // [B, Hq, 1] fp32, out
    [[maybe_unused]] const std::optional<Tensor>& workspace,  // int32 words, CUDA only
    [[maybe_unused]] const std::optional<Tensor>& ticket,     // int32 zeros, CUDA only
    const std::optional<Tensor>& error) {                     // [1] int32, device error word
    DecodeAttentionParams params;
    set_query(query, out, lse, &params);
    params.scale = static_cast<float>(scale);
    const size_t segments = key.size();
    check(segments <= kDecodeMaxSegments, "segments: got ", segments, ", must be at most ",
          kDecodeMaxSegments);
    params.segments = static_cast<int64_t>(segments);
    params.key_heads = params.query_heads;
    check_listed(value.size(), segments, "value");
    check_listed(bits.size(), segments, "bits");
    check_listed(block.size(), segments, "block");
    check_optional(lens, segments, "lens");
    check_optional(leftpad, segments, "leftpad");
    check_optional(block_table, segments, "block_table");
    check_optional(key_scale, segments, "key_scale");
    check_optional(key_zero, segments, "key_zero");
    check_optional(value_channel, segments, "value_channel");
    check_optional(value_token, segments, "value_token");
    const PackedFields fields{bits, block, key_scale, key_zero, value_channel, value_token};
    for (int64_t s = 0; s < params.segments; ++s) {
        params.segment[s].lens = positions(entry(lens, s), s, "lens", query);
        const auto& pad = entry(leftpad, s);
        const auto& table = entry(block_table, s);
        if (bits[s] == 0) {
            set_dense(query, key[s], value[s], pad, table, s, &params);
        } else {
            check(!table.has_value(), Field{s, "block_table"}, ": must be absent where packed");
            check(!pad.has_value(), Field{s, "leftpad"}, ": must be absent where packed");
            set_packed(query, key[s], value[s], fields, s, &params);
        }
    }
    check_heads(params);
    set_masses(mass, mass_segment, query, &params);
    params.error = error_word_pointer(error, query);
    if (params.batch == 0) return;

    if constexpr (backend == Backend::kCpu) {
        params.workspace_bytes = decode_attention_cpu_workspace(params);
        const Scratch scratch(params.workspace_bytes);
        params.workspace = scratch.data();
        LIGHTVLM_RUN(decode_attention, backend, query, params);
    } else {
#if LIGHTVLM_HAS_DEVICE
        set_workspace(workspace, ticket, query, &params);
#endif
        LIGHTVLM_RUN(decode_attention, backend, query, params);
    }
}

}  // namespace

LIGHTVLM_REGISTER(decode_attention, decode_attention_op)

}  // namespace lightvlm
