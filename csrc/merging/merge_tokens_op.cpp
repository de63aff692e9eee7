// merge_tokens: checks, parameters, registration.
#include "merging/merge_tokens.h"

#include <limits>
#include <optional>

#include "common/checks.h"
#include "common/registration.h"

namespace lightvlm {

namespace {

// A (rows, tokens) or (rows, slots) input.
template <typename T>
const T* row_input(const Tensor& tensor, const char* name, ScalarType dtype, int64_t rows,
                   int64_t columns, const Tensor& x, int64_t* stride) {
    check_dtype(tensor, name, dtype);
    check_shape(tensor, name, {rows, columns});
    check_device(tensor, name, x);
    check_last_contiguous(tensor, name);
    *stride = tensor.stride(0);
    return tensor.const_data_ptr<T>();
}

template <Backend backend>
void merge_tokens_op(const Tensor& x,                         // [R, N, C]
                     const Tensor& metric,                    // [R, N, Cm]
                     const Tensor& index,                     // [R, M] int32
                     const Tensor& count,                     // [R] int32
                     const Tensor& weight,                    // [R, N] fp32
                     const Tensor& group,                     // [R, N] int32
                     bool right,                              // rows flush right
                     const Tensor& out,                       // [R, M, C], out
                     const std::optional<Tensor>& target,     // [R, N] int32, out
                     const std::optional<Tensor>& workspace,  // int64, where kernels run
                     const std::optional<Tensor>& error) {    // [1] int32, device error word
    constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
    MergeTokensParams params;
    params.dtype = floating_dtype(x, "x");
    params.metric_dtype = floating_dtype(metric, "metric");
    check_shape(x, "x", {-1, -1, -1});
    check_last_contiguous(x, "x");
    params.rows = x.size(0);
    params.tokens = x.size(1);
    params.width = x.size(2);
    check_shape(metric, "metric", {params.rows, params.tokens, -1});
    check_device(metric, "metric", x);
    check_last_contiguous(metric, "metric");
    params.metric_width = metric.size(2);
    check_shape(index, "index", {params.rows, -1});
    params.slots = index.size(1);
    check(params.rows <= kMaxInt32 && params.tokens <= kMaxInt32 && params.slots <= kMaxInt32 &&
              params.width <= kMaxInt32 && params.metric_width <= kMaxInt32,
          "x, metric, index: no dimension may exceed ", kMaxInt32);

    params.x = x.const_data_ptr();
    params.metric = metric.const_data_ptr();
    params.x_row_stride = x.stride(0);
    params.x_token_stride = x.stride(1);
    params.metric_row_stride = metric.stride(0);
    params.metric_token_stride = metric.stride(1);
    params.index = row_input<int32_t>(index, "index", ScalarType::Int, params.rows, params.slots, x,
                                      &params.index_stride);
    check_dtype(count, "count", ScalarType::Int);
    check_shape(count, "count", {params.rows});
    check_device(count, "count", x);
    params.count = count.const_data_ptr<int32_t>();
    params.count_stride = count.stride(0);
    params.weight = row_input<float>(weight, "weight", ScalarType::Float, params.rows,
                                     params.tokens, x, &params.weight_stride);
    params.group = row_input<int32_t>(group, "group", ScalarType::Int, params.rows, params.tokens,
                                      x, &params.group_stride);
    params.right = right;

    check_dtype(out, "out", x.scalar_type());
    check_shape(out, "out", {params.rows, params.slots, params.width});
    check_device(out, "out", x);
    check_contiguous(out, "out");
    params.out = out.mutable_data_ptr();
    if (target.has_value()) {
        check_dtype(*target, "target", ScalarType::Int);
        check_shape(*target, "target", {params.rows, params.tokens});
        check_device(*target, "target", x);
        check_contiguous(*target, "target");
        params.target = target->mutable_data_ptr<int32_t>();
    }
    if constexpr (backend == Backend::kCuda) {
        const int64_t words = merge_workspace_words(params.rows, params.tokens, params.slots);
        check(workspace.has_value() && workspace->numel() >= words, "workspace: needs ", words,
              " int64");
        check_dtype(*workspace, "workspace", ScalarType::Long);
        check_device(*workspace, "workspace", x);
        check_contiguous(*workspace, "workspace");
        params.workspace = workspace->mutable_data_ptr<int64_t>();
    }
    params.error = error_word_pointer(error, x);
    LIGHTVLM_RUN(merge_tokens, backend, x, params);
}

}  // namespace

LIGHTVLM_REGISTER(merge_tokens, merge_tokens_op)

}  // namespace lightvlm
