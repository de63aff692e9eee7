// append_attend: checks, parameters, registration.
#include "decode_attention/append_attend.h"

#include <optional>

#include "common/checks.h"
#include "common/registration.h"
#include "decode_attention/decode_attention.h"
#include "decode_attention/decode_checks.h"

namespace lightvlm {

namespace {

AppendedRows appended_rows(const Tensor& to, const Tensor& from) {
    const auto item = static_cast<int64_t>(to.element_size());
    AppendedRows rows;
    rows.to = static_cast<char*>(to.mutable_data_ptr());
    rows.from = static_cast<const char*>(from.const_data_ptr());
    rows.to_batch = to.stride(0) * item;
    rows.to_token = to.stride(1) * item;
    rows.to_head = to.stride(2) * item;
    rows.from_batch = from.stride(0) * item;
    rows.from_token = from.stride(1) * item;
    rows.from_head = from.stride(2) * item;
    return rows;
}

// The widest access to a head of a row that addresses and strides allow.
int32_t widest_access(const AppendParams& append) {
    auto all = static_cast<uintptr_t>(append.row_bytes);
    for (const AppendedRows& rows : append.rows) {
        all |= reinterpret_cast<uintptr_t>(rows.to) | reinterpret_cast<uintptr_t>(rows.from);
        for (const int64_t stride : {rows.to_batch, rows.to_token, rows.to_head, rows.from_batch,
                                     rows.from_token, rows.from_head}) {
            all |= static_cast<uintptr_t>(stride);
        }
    }
    int32_t widest = 16;
    while (all % static_cast<uintptr_t>(widest) != 0) widest /= 2;
    return widest;
}

// Two tokens written to one place would overwrite each other.
void check_writable(const Tensor& cache, const char* name) {
    for (int64_t d = 0; d < cache.dim(); ++d) {
        check(cache.stride(d) != 0 || cache.size(d) <= 1, name,
              ": shares memory with itself, must be disjoint to be written");
    }
}

void set_append(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& new_key,
                const Tensor& new_value, bool has_lens, AppendAttendParams* params) {
    DecodeAttentionParams& attend = params->attend;
    KVSegmentParams& segment = attend.segment[0];
    check_rows(new_key, "new_key", query, {attend.batch, -1, attend.key_heads, attend.head_dim},
               query.scalar_type());
    const int64_t added = new_key.size(1);
    check_rows(new_value, "new_value", query,
               {attend.batch, added, attend.key_heads, attend.head_dim}, query.scalar_type());
    if (added == 0) return;
    check(has_lens || added <= segment.tokens, "new_key: has ", added,
          " tokens, without lens at most ", segment.tokens, ", all that there is room for");
    check_writable(key, "key");
    check_writable(value, "value");
    segment.added = added;
    AppendParams& append = params->append;
    append.batch = attend.batch;
    append.added = added;
    append.heads = attend.key_heads;
    append.capacity = segment.tokens;
    append.row_bytes = attend.head_dim * static_cast<int64_t>(key.element_size());
    append.rows[0] = appended_rows(key, new_key);
    append.rows[1] = appended_rows(value, new_value);
    // To be written, a lazy clone moves.
    segment.key = append.rows[0].to;
    segment.value = append.rows[1].to;
    append.access_bytes = widest_access(append);
    append.lens = segment.lens;
    if (segment.paged()) {
        append.block_table = segment.block_table;
        append.block_table_stride = segment.block_table_stride;
        append.page_size = Divisor(segment.page_size);
        append.pages = segment.pages;
    }
    append.error = attend.error;
}

template <Backend backend>
void append_attend_op(
    const Tensor& query,  // [B, 1, Hq, D] fp32, fp16 or bf16, as keys and values
    const Tensor& key,    // [B, N, Hkv, D], or with a block table [P, page_size, Hkv, D]; written
    const Tensor& value,
    const std::optional<Tensor>& new_key,  // [B, T, Hkv, D], or both absent
    const std::optional<Tensor>& new_value,
    const std::optional<Tensor>& lens,         // [B] int32, before new tokens; absent: N - T
    const std::optional<Tensor>& leftpad,      // [B] int32
    const std::optional<Tensor>& block_table,  // [B, max_blocks] int32
    double scale,                              //
    const Tensor& out,                         // [B, 1, Hq, D], out
    const Tensor& lse,                         // [B, Hq, 1] fp32, out
    const std::optional<Tensor>& mass,         // [B, Hkv, N] fp32, added to
    [[maybe_unused]] const std::optional<Tensor>& workspace,  // int32 words, CUDA only
    [[maybe_unused]] const std::optional<Tensor>& ticket,     // int32 zeros, CUDA only
    const std::optional<Tensor>& error) {                     // [1] int32, device error word
    AppendAttendParams params;
    DecodeAttentionParams& attend = params.attend;
    set_query(query, out, lse, &attend);
    attend.scale = static_cast<float>(scale);
    attend.segments = 1;
    attend.segment[0].lens = positions(lens, kNoList, "lens", query);
    set_dense(query, key, value, leftpad, block_table, kNoList, &attend);
    check_heads(attend);
    attend.error = error_word_pointer(error, query);
    check(new_key.has_value() == new_value.has_value(),
          "new_key, new_value: both must be given, or none");
    if (new_key.has_value())
        set_append(query, key, value, *new_key, *new_value, lens.has_value(), &params);
    if (mass.has_value()) set_mass(*mass, "mass", query, 0, &attend);
    if (attend.batch == 0) return;

    if constexpr (backend == Backend::kCpu) {
        attend.workspace_bytes = decode_attention_cpu_workspace(attend);
        const Scratch scratch(attend.workspace_bytes);
        attend.workspace = scratch.data();
        LIGHTVLM_RUN(append_attend, backend, query, params);
    } else {
#if LIGHTVLM_HAS_DEVICE
        set_workspace(workspace, ticket, query, &attend);
#endif
        LIGHTVLM_RUN(append_attend, backend, query, params);
    }
}

}  // namespace

LIGHTVLM_REGISTER(append_attend, append_attend_op)

}  // namespace lightvlm
