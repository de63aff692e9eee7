// merge_pairs: checks, parameters, registration.
#include "merging/merge_pairs.h"

#include <limits>
#include <optional>

#include "common/checks.h"
#include "common/registration.h"

namespace lightvlm {

namespace {

// A (rows, tokens) input.
template <typename T>
const T* token_input(const Tensor& tensor, const char* name, ScalarType dtype, const Tensor& x,
                     int64_t* stride) {
    check_dtype(tensor, name, dtype);
    check_shape(tensor, name, {x.size(0), x.size(1)});
    check_device(tensor, name, x);
    check_last_contiguous(tensor, name);
    *stride = tensor.stride(0);
    return static_cast<const T*>(tensor.const_data_ptr());
}

// A contiguous output.
template <typename T>
T* output(const Tensor& tensor, const char* name, ScalarType dtype,
          std::initializer_list<int64_t> shape, const Tensor& x) {
    check_dtype(tensor, name, dtype);
    check_shape(tensor, name, shape);
    check_device(tensor, name, x);
    check_contiguous(tensor, name);
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// Pairs by row (one dimension) or by window (two).
void take_budgets(const std::optional<Tensor>& each, const Tensor& x, MergePairsParams* params) {
    if (!each.has_value()) return;
    check_device(*each, "each", x);
    check_last_contiguous(*each, "each");
    if (each->dim() == 2) {
        check_shape(*each, "each", {params->rows, -1});
        params->windows = each->size(1);
    } else {
        check_shape(*each, "each", {params->rows});
    }
    params->each_stride = each->stride(0);
    if (each->scalar_type() == ScalarType::Float) {
        params->each_ratio = each->const_data_ptr<float>();
    } else {
        check_dtype(*each, "each", ScalarType::Int);
        params->each_count = each->const_data_ptr<int32_t>();
    }
}

template <Backend backend>
void merge_pairs_op(const Tensor& x,                            // [R, N, C]
                    const Tensor& metric,                       // [R, N, Cm]
                    const Tensor& window,                       // [R, N] int32
                    const std::optional<Tensor>& source,        // [R, N] bool
                    const std::optional<Tensor>& is_protected,  // [R, N] bool
                    const std::optional<Tensor>& weight,        // [R, N] fp32
                    const std::optional<Tensor>& each,          // [R] or [R, G], int32 or fp32
                    int64_t merge, double ratio, double eps,    //
                    bool right,                                 // rows flush right
                    const Tensor& out,                          // [R, M, C], out
                    const Tensor& index,                        // [R, M] int32, out
                    const Tensor& count,                        // [R] int32, out
                    const Tensor& inverse,                      // [R, N] int32, out
                    const Tensor& target,                       // [R, N] int32, out
                    const Tensor& out_weight,                   // [R, M] fp32, out
                    const std::optional<Tensor>& workspace,     // int64, where kernels run
                    const std::optional<Tensor>& error) {       // [1] int32, device error word
    constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
    MergePairsParams params;
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
    check(index.dim() == 2, "index: has ", index.dim(), " dimensions, must have 2");
    params.slots = index.size(1);
    check(params.rows <= kMaxInt32 && params.tokens <= kMaxInt32 && params.slots <= kMaxInt32 &&
              params.width <= kMaxInt32 && params.metric_width <= kMaxInt32,
          "x, metric, index: no dimension may exceed ", kMaxInt32);
    check(merge >= 0, "merge: got ", merge, ", must be >= 0");
    check(ratio <= 1.0, "ratio: got ", ratio, ", must be at most 1");
    check(eps >= 0.0, "eps: got ", eps, ", must be >= 0");
    params.merge = merge;
    params.ratio = ratio;
    params.eps = eps;
    params.right = right;

    params.x = x.const_data_ptr();
    params.metric = metric.const_data_ptr();
    params.x_row_stride = x.stride(0);
    params.x_token_stride = x.stride(1);
    params.metric_row_stride = metric.stride(0);
    params.metric_token_stride = metric.stride(1);
    params.window =
        token_input<int32_t>(window, "window", ScalarType::Int, x, &params.window_stride);
    if (source.has_value()) {
        params.source =
            token_input<uint8_t>(*source, "source", ScalarType::Bool, x, &params.source_stride);
    }
    if (is_protected.has_value()) {
        params.is_protected = token_input<uint8_t>(*is_protected, "protected", ScalarType::Bool, x,
                                                   &params.protected_stride);
    }
    if (weight.has_value()) {
        params.weight =
            token_input<float>(*weight, "weight", ScalarType::Float, x, &params.weight_stride);
    }
    take_budgets(each, x, &params);

    const int64_t rows = params.rows;
    params.out = output<void>(out, "out", x.scalar_type(), {rows, params.slots, params.width}, x);
    params.index = output<int32_t>(index, "index", ScalarType::Int, {rows, params.slots}, x);
    params.count = output<int32_t>(count, "count", ScalarType::Int, {rows}, x);
    params.inverse = output<int32_t>(inverse, "inverse", ScalarType::Int, {rows, params.tokens}, x);
    params.target = output<int32_t>(target, "target", ScalarType::Int, {rows, params.tokens}, x);
    params.out_weight =
        output<float>(out_weight, "out_weight", ScalarType::Float, {rows, params.slots}, x);
    if constexpr (backend == Backend::kCuda) {
        const int64_t words = merge_pairs_workspace_words(rows, params.tokens, params.slots);
        check(workspace.has_value() && workspace->numel() >= words, "workspace: needs ", words,
              " int64");
        check_dtype(*workspace, "workspace", ScalarType::Long);
        check_device(*workspace, "workspace", x);
        check_contiguous(*workspace, "workspace");
        params.workspace = workspace->mutable_data_ptr<int64_t>();
        check(reinterpret_cast<uintptr_t>(params.workspace) % 16 == 0,
              "workspace: must be aligned to 16 bytes");
    }
    params.error = error_word_pointer(error, x);
    LIGHTVLM_RUN(merge_pairs, backend, x, params);
}

}  // namespace

LIGHTVLM_REGISTER(merge_pairs, merge_pairs_op)

}  // namespace lightvlm
