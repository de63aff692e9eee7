// importance: checks, parameters, registration.
#include "importance/importance.h"

#include <limits>
#include <optional>
#include <string>

#include "common/checks.h"
#include "common/registration.h"

namespace lightvlm {

namespace {

RowsOp rows_op(const std::string& name) {
    if (name == "sum") return RowsOp::kSum;
    if (name == "mean") return RowsOp::kMean;
    if (name == "max") return RowsOp::kMax;
    fail("rows: got '", name, "', must be 'sum', 'mean' or 'max'");
}

HeadsOp heads_op(const std::string& name) {
    if (name == "sum") return HeadsOp::kSum;
    if (name == "mean") return HeadsOp::kMean;
    if (name == "max") return HeadsOp::kMax;
    if (name == "none") return HeadsOp::kNone;
    fail("heads: got '", name, "', must be 'mean', 'sum', 'max' or 'none'");
}

ScoreAxis score_axis(const std::string& name) {
    if (name == "key") return ScoreAxis::kKey;
    if (name == "query") return ScoreAxis::kQuery;
    fail("axis: got '", name, "', must be 'key' or 'query'");
}

// An optional int32 input beside the query.
const int32_t* positions(const std::optional<Tensor>& tensor, const char* name,
                         std::initializer_list<int64_t> sizes, const Tensor& query) {
    if (!tensor.has_value()) return nullptr;
    check_dtype(*tensor, name, ScalarType::Int);
    check_shape(*tensor, name, sizes);
    check_device(*tensor, name, query);
    check_last_contiguous(*tensor, name);
    return tensor->const_data_ptr<int32_t>();
}

void set_vectors(const Tensor& query, const Tensor& key, ImportanceParams* params) {
    constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
    params->dtype = floating_dtype(query, "query");
    check_dtype(key, "key", query.scalar_type());
    check_shape(query, "query", {-1, -1, -1, -1});
    check_shape(key, "key", {query.size(0), -1, -1, query.size(3)});
    check_device(key, "key", query);
    check_last_contiguous(query, "query");
    check_last_contiguous(key, "key");
    params->batch = query.size(0);
    params->window = query.size(1);
    params->query_heads = query.size(2);
    params->width = query.size(3);
    params->tokens = key.size(1);
    params->key_heads = key.size(2);
    check(params->window <= kMaxInt32, "query: has ", params->window, " rows, at most ", kMaxInt32);
    check(params->tokens <= kMaxInt32, "key: has ", params->tokens, " tokens, at most ", kMaxInt32);
    check(params->width >= 1 && params->width <= kImportanceMaxWidth, "query: has head width ",
          params->width, ", must be 1 to ", kImportanceMaxWidth);
    check(params->key_heads >= 1 && params->query_heads >= 1 &&
              params->query_heads % params->key_heads == 0,
          "query: has ", params->query_heads,
          " heads, must be a positive multiple of key's heads, ", params->key_heads);
    params->query = query.const_data_ptr();
    params->query_batch_stride = query.stride(0);
    params->query_row_stride = query.stride(1);
    params->query_head_stride = query.stride(2);
    params->key = key.const_data_ptr();
    params->key_batch_stride = key.stride(0);
    params->key_token_stride = key.stride(1);
    params->key_head_stride = key.stride(2);
}

void set_outputs(const Tensor& query, const Tensor& score, const Tensor& visible,
                 const std::optional<Tensor>& workspace, bool needs_workspace,
                 ImportanceParams* params) {
    check_dtype(score, "score", ScalarType::Float);
    if (params->axis == ScoreAxis::kKey && params->heads == HeadsOp::kNone) {
        check_shape(score, "score", {params->batch, params->key_heads, params->tokens});
    } else {
        check_shape(score, "score", {params->batch, params->targets()});
    }
    check_dtype(visible, "visible", ScalarType::Int);
    check_shape(visible, "visible", {params->batch, params->tokens});
    for (const Tensor* out : {&score, &visible}) {
        check_device(*out, "score, visible", query);
        check_contiguous(*out, "score, visible");
    }
    params->score = score.mutable_data_ptr<float>();
    params->visible = visible.mutable_data_ptr<int32_t>();
    if (!needs_workspace) return;
    check(params->probes() <= std::numeric_limits<int32_t>::max(), "query: a key head's ",
          params->probes(), " probes, must be below 2**31");
    const int64_t words = importance_workspace_words(*params);
    check(workspace.has_value(), "workspace: must be given, with at least ", words, " int32");
    check_dtype(*workspace, "workspace", ScalarType::Int);
    check_device(*workspace, "workspace", query);
    check_contiguous(*workspace, "workspace");
    check(workspace->numel() >= words, "workspace: has ", workspace->numel(),
          " elements, must have at least ", words);
    params->workspace = workspace->mutable_data_ptr<int32_t>();
    params->workspace_words = workspace->numel();
}

template <Backend backend>
void importance_op(const Tensor& query,                   // [B, W, Hq, D] fp32, fp16 or bf16
                   const Tensor& key,                     // [B, N, Hkv, D], dtype of query
                   const std::optional<Tensor>& lse,      // [B, Hq, W] fp32
                   double scale, bool causal,             //
                   const std::optional<Tensor>& row_pos,  // [B, W] int32
                   const std::optional<Tensor>& lens,     // [B] int32
                   const std::optional<Tensor>& leftpad,  // [B] int32
                   std::string rows, std::string heads, std::string axis,
                   const Tensor& score,    // [B, N], [B, Hkv, N] or [B, W] fp32, out
                   const Tensor& visible,  // [B, N] int32, out
                   const std::optional<Tensor>& workspace,  // int32 words, CUDA only
                   const std::optional<Tensor>& error) {    // [1] int32, device error word
    ImportanceParams params;
    set_vectors(query, key, &params);
    params.scale = static_cast<float>(scale);
    params.causal = causal;
    params.rows = rows_op(rows);
    params.heads = heads_op(heads);
    params.axis = score_axis(axis);
    if (lse.has_value()) {
        check(params.axis == ScoreAxis::kKey, "lse: must be absent with axis 'query'");
        check_dtype(*lse, "lse", ScalarType::Float);
        check_shape(*lse, "lse", {params.batch, params.query_heads, params.window});
        check_device(*lse, "lse", query);
        check_last_contiguous(*lse, "lse");
        params.lse = lse->const_data_ptr<float>();
        params.lse_batch_stride = lse->stride(0);
        params.lse_head_stride = lse->stride(1);
    }
    params.row_pos = positions(row_pos, "row_pos", {params.batch, params.window}, query);
    if (row_pos.has_value()) params.row_pos_stride = row_pos->stride(0);
    params.lens = positions(lens, "lens", {params.batch}, query);
    params.leftpad = positions(leftpad, "leftpad", {params.batch}, query);
    set_outputs(query, score, visible, workspace, backend == Backend::kCuda, &params);
    params.error = error_word_pointer(error, query);

    LIGHTVLM_RUN(importance, backend, query, params);
}

}  // namespace

LIGHTVLM_REGISTER(importance, importance_op)

}  // namespace lightvlm
