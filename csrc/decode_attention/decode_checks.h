// What the ops that attend to a dense segment have in common: checks, parameters, workspace.
#pragma once

#include <algorithm>
#include <limits>
#include <new>
#include <optional>
#include <ostream>

#include "common/checks.h"
#include "decode_attention/decode_attention.h"

namespace lightvlm {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// The name of a segment's field in messages: segments[0].key, or key where there is no list of
// them.
struct Field {
    int64_t segment;
    const char* name;
};

// The number of an op's only segment.
constexpr int64_t kNoList = -1;

inline std::ostream& operator<<(std::ostream& out, const Field& field) {
    if (field.segment >= 0) out << "segments[" << field.segment << "].";
    return out << field.name;
}

inline KVFormat dense_format(DType dtype) {
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

inline void set_query(const Tensor& query, const Tensor& out, const Tensor& lse,
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

inline const int32_t* positions(const std::optional<Tensor>& tensor, int64_t segment,
                                const char* of, const Tensor& query) {
    if (!tensor.has_value()) return nullptr;
    const Field name{segment, of};
    check_dtype(*tensor, name, ScalarType::Int);
    check_shape(*tensor, name, {query.size(0)});
    check_device(*tensor, name, query);
    check_contiguous(*tensor, name);
    return tensor->const_data_ptr<int32_t>();
}

// What keys and values have in common; token_dim and head_dim are where tokens and heads are.
template <typename Name>
void check_rows(const Tensor& tensor, const Name& name, const Tensor& query,
                std::initializer_list<int64_t> sizes, ScalarType dtype) {
    check_dtype(tensor, name, dtype);
    check_shape(tensor, name, sizes);
    check_device(tensor, name, query);
    check_last_contiguous(tensor, name);
}

inline void set_rows(const Tensor& key, const Tensor& value, int64_t token_dim, int64_t head_dim,
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

// The table of a paged segment, whose tokens it decides.
inline void set_block_table(const Tensor& table, const Tensor& key, int64_t number,
                            const Tensor& query, KVSegmentParams* segment) {
    const Field name{number, "block_table"};
    check_dtype(table, name, ScalarType::Int);
    check_shape(table, name, {query.size(0), -1});
    check_device(table, name, query);
    check_last_contiguous(table, name);
    const int64_t size = key.size(1);
    check(size >= kDecodePageStep && size <= kDecodeMaxPageSize && size % kDecodePageStep == 0,
          Field{number, "key"}, ": has page_size ", size, ", must be a multiple of ",
          kDecodePageStep, " from ", kDecodePageStep, " to ", kDecodeMaxPageSize);
    check(key.size(0) <= kMaxInt32, Field{number, "key"}, ": has ", key.size(0), " pages, at most ",
          kMaxInt32);
    segment->block_table = table.const_data_ptr<int32_t>();
    segment->block_table_stride = table.stride(0);
    segment->page_size = static_cast<int32_t>(size);
    segment->pages = static_cast<int32_t>(key.size(0));
    segment->tokens = table.size(1) * size;
}

inline void check_sizes(int64_t tokens, int64_t heads, int64_t number,
                        DecodeAttentionParams* params) {
    if (number <= 0) params->key_heads = heads;
    if (tokens <= kMaxInt32 && heads == params->key_heads) return;  // spares making the names
    check(tokens <= kMaxInt32, Field{number, "key"}, ": has ", tokens, " tokens, at most ",
          kMaxInt32);
    check(heads == params->key_heads, Field{number, "key"}, ": has ", heads, " heads, must have ",
          params->key_heads, " as segments[0]");
}

inline void set_dense(const Tensor& query, const Tensor& key, const Tensor& value,
                      const std::optional<Tensor>& leftpad,
                      const std::optional<Tensor>& block_table, int64_t number,
                      DecodeAttentionParams* params) {
    KVSegmentParams& segment = params->segment[std::max<int64_t>(number, 0)];
    segment.format = dense_format(params->dtype);
    const int64_t rows = block_table.has_value() ? -1 : params->batch;
    check_rows(key, Field{number, "key"}, query, {rows, -1, -1, params->head_dim},
               query.scalar_type());
    segment.tokens = key.size(1);
    if (block_table.has_value()) set_block_table(*block_table, key, number, query, &segment);
    check_sizes(segment.tokens, key.size(2), number, params);
    check_rows(value, Field{number, "value"}, query,
               {key.size(0), key.size(1), params->key_heads, params->head_dim},
               query.scalar_type());
    set_rows(key, value, 1, 2, &segment);
    segment.leftpad = positions(leftpad, number, "leftpad", query);
}

// After the segment's tokens and heads are known.
template <typename Name>
void set_mass(const Tensor& mass, const Name& name, const Tensor& query, int64_t number,
              DecodeAttentionParams* params) {
    KVSegmentParams& segment = params->segment[number];
    check_rows(mass, name, query, {params->batch, params->key_heads, segment.tokens},
               ScalarType::Float);
    // An empty buffer has no address; the segment has no token either.
    segment.mass = mass.mutable_data_ptr<float>();
    segment.mass_batch_stride = mass.stride(0);
    segment.mass_head_stride = mass.stride(1);
}

inline void check_heads(const DecodeAttentionParams& params) {
    check(params.key_heads >= 1 && params.query_heads >= 1 &&
              params.query_heads % params.key_heads == 0,
          "query: has ", params.query_heads,
          " heads, must be a positive multiple of the key heads, ", params.key_heads);
}

#if LIGHTVLM_HAS_DEVICE
inline void set_workspace(const std::optional<Tensor>& workspace,
                          const std::optional<Tensor>& ticket, const Tensor& query,
                          DecodeAttentionParams* params) {
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

}  // namespace lightvlm
