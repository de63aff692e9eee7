// decode_attention: checks, parameters, registration.
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/registration.h"
#include "decode_attention/decode_attention.h"

namespace lightvlm {

namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

std::string field(int64_t segment, const char* name) {
    return "segments[" + std::to_string(segment) + "]." + name;
}

KVFormat dense_format(DType dtype) {
    switch (dtype) {
        case DType::kFloat16:
            return KVFormat::kFloat16;
        case DType::kBFloat16:
            return KVFormat::kBFloat16;
        case DType::kFloat32:
        default:
            return KVFormat::kFloat32;
    }
}

KVFormat packed_format(int64_t bits, int64_t segment) {
    switch (bits) {
        case 8:
            return KVFormat::kPacked8;
        case 4:
            return KVFormat::kPacked4;
        case 2:
            return KVFormat::kPacked2;
        default:
            fail(field(segment, "bits"), ": got ", bits,
                 ", must be 8, 4, 2, or 0 where not packed");
    }
}

void set_query(const Tensor& query, const Tensor& out, const Tensor& lse,
               DecodeAttentionParams* params) {
    params->dtype = floating_dtype(query, "query");
    check_shape(query, "query", {-1, 1, -1, -1});
    check_last_contiguous(query, "query");
    params->batch = query.size(0);
    params->query_heads = query.size(2);
    params->head_dim = query.size(3);
    check(packed_head_dim(params->head_dim), "query: has head width ", params->head_dim,
          ", must be one of 32, 64, 80, 96, 128, 192, 256");
    params->query = query.const_data_ptr();
    params->query_batch_stride = query.stride(0);
    params->query_head_stride = query.stride(2);

    check_dtype(out, "out", query.scalar_type());
    check_shape(out, "out", {params->batch, 1, params->query_heads, params->head_dim});
    check_dtype(lse, "lse", ScalarType::Float);
    check_shape(lse, "lse", {params->batch, params->query_heads, 1});
    for (const Tensor* one : {&out, &lse}) {
        check_device(*one, "out, lse", query);
        check_contiguous(*one, "out, lse");
    }
    params->out = out.mutable_data_ptr();
    params->lse = lse.mutable_data_ptr<float>();
}

const int32_t* positions(const std::optional<Tensor>& tensor, int64_t segment, const char* of,
                         const Tensor& query) {
    if (!tensor.has_value()) return nullptr;
    const std::string name = field(segment, of);
    check_dtype(*tensor, name.c_str(), ScalarType::Int);
    check_shape(*tensor, name.c_str(), {query.size(0)});
    check_device(*tensor, name.c_str(), query);
    check_contiguous(*tensor, name.c_str());
    return tensor->const_data_ptr<int32_t>();
}

// The table of a paged segment, whose tokens it decides.
void set_block_table(const Tensor& table, const Tensor& key, int64_t number, const Tensor& query,
                     KVSegmentParams* segment) {
    const std::string name = field(number, "block_table");
    check_dtype(table, name.c_str(), ScalarType::Int);
    check_shape(table, name.c_str(), {query.size(0), -1});
    check_device(table, name.c_str(), query);
    check_last_contiguous(table, name.c_str());
    const int64_t size = key.size(1);
    check(size >= kDecodePageStep && size <= kDecodeMaxPageSize && size % kDecodePageStep == 0,
          field(number, "key"), ": has page_size ", size, ", must be a multiple of ",
          kDecodePageStep, " from ", kDecodePageStep, " to ", kDecodeMaxPageSize);
    check(key.size(0) <= kMaxInt32, field(number, "key"), ": has ", key.size(0), " pages, at most ",
          kMaxInt32);
    segment->block_table = table.const_data_ptr<int32_t>();
    segment->block_table_stride = table.stride(0);
    segment->page_size = static_cast<int32_t>(size);
    segment->pages = static_cast<int32_t>(key.size(0));
    segment->tokens = table.size(1) * size;
}

// A tensor that a packed segment must have.
const Tensor& packed_field(const std::optional<Tensor>& tensor, const std::string& name,
                           std::initializer_list<int64_t> sizes, ScalarType dtype,
                           const Tensor& query) {
    check(tensor.has_value(), name, ": must be given for a packed segment");
    check_dtype(*tensor, name.c_str(), dtype);
    check_shape(*tensor, name.c_str(), sizes);
    check_device(*tensor, name.c_str(), query);
    return *tensor;
}

// What keys and values have in common; token_dim and head_dim are where tokens and heads are.
void check_rows(const Tensor& tensor, const std::string& name, const Tensor& query,
                std::initializer_list<int64_t> sizes, ScalarType dtype) {
    check_dtype(tensor, name.c_str(), dtype);
    check_shape(tensor, name.c_str(), sizes);
    check_device(tensor, name.c_str(), query);
    check_last_contiguous(tensor, name.c_str());
}

void set_rows(const Tensor& key, const Tensor& value, int64_t token_dim, int64_t head_dim,
              KVSegmentParams* segment) {
    segment->key = key.const_data_ptr();
    segment->value = value.const_data_ptr();
    segment->key_batch_stride = key.stride(0);
    segment->key_token_stride = key.stride(token_dim);
    segment->key_head_stride = key.stride(head_dim);
    segment->value_batch_stride = value.stride(0);
    segment->value_token_stride = value.stride(token_dim);
    segment->value_head_stride = value.stride(head_dim);
}

void check_sizes(int64_t tokens, int64_t heads, int64_t number, DecodeAttentionParams* params) {
    if (number == 0) params->key_heads = heads;
    if (tokens <= kMaxInt32 && heads == params->key_heads) return;  // spares making the names
    check(tokens <= kMaxInt32, field(number, "key"), ": has ", tokens, " tokens, at most ",
          kMaxInt32);
    check(heads == params->key_heads, field(number, "key"), ": has ", heads, " heads, must have ",
          params->key_heads, " as segments[0]");
}

void check_listed(size_t entries, size_t segments, const char* name) {
    check(entries == segments, name, ": has ", entries, " entries, must have one for each of ",
          segments, " segments");
}

void set_mass(const Tensors& mass, const std::vector<int64_t>& mass_segment, const Tensor& query,
              DecodeAttentionParams* params) {
    check(mass.size() == mass_segment.size(), "mass: has ", mass.size(), " buffers, mass_segment ",
          mass_segment.size());
    for (size_t i = 0; i < mass.size(); ++i) {
        const int64_t of = mass_segment[i];
        check(of >= 0 && of < params->segments, "mass_segment: got ", of, ", must be in [0, ",
              params->segments, ")");
        KVSegmentParams& segment = params->segment[of];
        const std::string name = "mass[" + std::to_string(of) + "]";
        check(segment.mass == nullptr, name, ": is given twice");
        check_rows(mass[i], name, query, {params->batch, params->key_heads, segment.tokens},
                   ScalarType::Float);
        segment.mass = mass[i].mutable_data_ptr<float>();
        segment.mass_batch_stride = mass[i].stride(0);
        segment.mass_head_stride = mass[i].stride(1);
        // An empty buffer has no address; the segment has no token either.
    }
}

#if LIGHTVLM_HAS_DEVICE
void set_workspace(const std::optional<Tensor>& workspace, const std::optional<Tensor>& ticket,
                   const Tensor& query, DecodeAttentionParams* params) {
    const int64_t bytes = decode_attention_cuda_workspace(*params);
    check(workspace.has_value() && ticket.has_value(),
          "workspace, ticket: must be given, with at least ", bytes, " bytes and ", params->units(),
          " zeros");
    check_dtype(*workspace, "workspace", ScalarType::Int);
    check_dtype(*ticket, "ticket", ScalarType::Int);
    for (const Tensor* one : {&*workspace, &*ticket}) {
        check_device(*one, "workspace, ticket", query);
        check_contiguous(*one, "workspace, ticket");
    }
    params->workspace_bytes = workspace->numel() * int64_t{sizeof(int32_t)};
    check(params->workspace_bytes >= bytes, "workspace: has ", params->workspace_bytes,
          " bytes, must have at least ", bytes);
    check(ticket->numel() >= params->units(), "ticket: has ", ticket->numel(),
          " elements, must have at least ", params->units());
    params->workspace = workspace->mutable_data_ptr();
    params->ticket = ticket->mutable_data_ptr<int32_t>();
}
#endif

// Scratch of the CPU twin, in whole cache lines.
class Scratch {
  public:
    explicit Scratch(int64_t bytes)
        : data_(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})) {}
    ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* data() const { return data_; }

  private:
    void* data_;
};

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

void set_dense(const Tensor& query, const Tensor& key, const Tensor& value,
               const std::optional<Tensor>& leftpad, const std::optional<Tensor>& block_table,
               int64_t number, DecodeAttentionParams* params) {
    KVSegmentParams& segment = params->segment[number];
    segment.format = dense_format(params->dtype);
    const int64_t rows = block_table.has_value() ? -1 : params->batch;
    check_rows(key, field(number, "key"), query, {rows, -1, -1, params->head_dim},
               query.scalar_type());
    segment.tokens = key.size(1);
    if (block_table.has_value()) set_block_table(*block_table, key, number, query, &segment);
    check_sizes(segment.tokens, key.size(2), number, params);
    check_rows(value, field(number, "value"), query,
               {key.size(0), key.size(1), params->key_heads, params->head_dim},
               query.scalar_type());
    set_rows(key, value, 1, 2, &segment);
    segment.leftpad = positions(leftpad, number, "leftpad", query);
}

void set_packed(const Tensor& query, const Tensor& key, const Tensor& value,
                const PackedFields& fields, int64_t number, DecodeAttentionParams* params) {
    KVSegmentParams& segment = params->segment[number];
    segment.format = packed_format(fields.bits[number], number);
    const int64_t row = packed_row_bytes(params->head_dim, packed_bits(segment.format));
    check_rows(key, field(number, "key"), query, {params->batch, -1, -1, row}, ScalarType::Byte);
    segment.tokens = key.size(2);
    check_sizes(segment.tokens, key.size(1), number, params);
    check_rows(value, field(number, "value"), query,
               {params->batch, params->key_heads, key.size(2), row}, ScalarType::Byte);
    set_rows(key, value, 2, 1, &segment);

    segment.block = fields.block[number];
    check(segment.block >= 1 &&
              (segment.block >= segment.tokens || segment.block % kPackedBlockMultiple == 0),
          field(number, "block"), ": got ", segment.block, ", must be a multiple of ",
          kPackedBlockMultiple, ", or at least the tokens, ", segment.tokens);
    segment.blocks = (segment.tokens + segment.block - 1) / segment.block;
    const auto of_channel = [&](const OptionalTensors& tensors, const char* name) {
        const std::string full = field(number, name);
        const Tensor& tensor =
            packed_field(entry(tensors, number), full,
                         {params->batch, params->key_heads, segment.blocks, params->head_dim},
                         ScalarType::Float, query);
        check_contiguous(tensor, full.c_str());
        return tensor.const_data_ptr<float>();
    };
    segment.key_scale = of_channel(fields.key_scale, "key_scale");
    segment.key_zero = of_channel(fields.key_zero, "key_zero");
    segment.value_channel = of_channel(fields.value_channel, "value_channel");
    const std::string token_name = field(number, "value_token");
    const Tensor& token = packed_field(entry(fields.value_token, number), token_name,
                                       {params->batch, params->key_heads, segment.tokens, 2},
                                       ScalarType::Half, query);
    check_last_contiguous(token, token_name.c_str());
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
            check(!table.has_value(), field(s, "block_table"), ": must be absent where packed");
            check(!pad.has_value(), field(s, "leftpad"), ": must be absent where packed");
            set_packed(query, key[s], value[s], fields, s, &params);
        }
    }
    check(params.key_heads >= 1 && params.query_heads >= 1 &&
              params.query_heads % params.key_heads == 0,
          "query: has ", params.query_heads,
          " heads, must be a positive multiple of the segments' heads, ", params.key_heads);
    set_mass(mass, mass_segment, query, &params);
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
