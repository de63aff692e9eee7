// select: checks, parameters, registration.
#include "selection/select.h"

#include <limits>
#include <optional>

#include "common/checks.h"
#include "common/registration.h"
#include "selection/score_order.h"

namespace lightvlm {

namespace {

// An optional (rows, tokens) input beside the scores.
template <typename T>
const T* row_input(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype,
                   const Tensor& scores, int64_t* stride) {
    if (!tensor.has_value()) return nullptr;
    check_dtype(*tensor, name, dtype);
    check_shape(*tensor, name, {scores.size(0), scores.size(1)});
    check_device(*tensor, name, scores);
    check_last_contiguous(*tensor, name);
    *stride = tensor->stride(0);
    return tensor->const_data_ptr<T>();
}

template <typename T>
T* output(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
          const Tensor& scores) {
    check_dtype(tensor, name, ScalarType::Int);
    check_shape(tensor, name, sizes);
    check_device(tensor, name, scores);
    check_contiguous(tensor, name);
    return tensor.mutable_data_ptr<T>();
}

template <Backend backend>
void select_op(const Tensor& scores,                     // [R, N] fp32
               const std::optional<Tensor>& forced,      // [R, N] bool
               const std::optional<Tensor>& candidates,  // [R, N] bool
               const std::optional<Tensor>& segment,     // [R, N] int32
               const std::optional<Tensor>& keep,        // [R] or [R, G] int32
               int64_t keep_each,                        // where keep is absent and mass is 0
               double mass,                              // 0: none
               const Tensor& index,                      // [R, M] int32, out
               const Tensor& count,                      // [R] int32, out
               const Tensor& inverse,                    // [R, N] int32, out
               const std::optional<Tensor>& error) {     // [1] int32, device error word
    constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
    check_dtype(scores, "scores", ScalarType::Float);
    check_shape(scores, "scores", {-1, -1});
    check_last_contiguous(scores, "scores");

    SelectParams params;
    params.rows = scores.size(0);
    params.tokens = scores.size(1);
    check(params.rows <= kMaxInt32, "scores: has ", params.rows, " rows, at most ", kMaxInt32);
    check(params.tokens <= kMaxInt32, "scores: has ", params.tokens, " tokens, at most ",
          kMaxInt32);
    params.scores = scores.const_data_ptr<float>();
    params.scores_stride = scores.stride(0);
    params.forced =
        row_input<bool>(forced, "forced", ScalarType::Bool, scores, &params.forced_stride);
    params.candidates = row_input<bool>(candidates, "candidates", ScalarType::Bool, scores,
                                        &params.candidates_stride);
    params.segment =
        row_input<int32_t>(segment, "segment", ScalarType::Int, scores, &params.segment_stride);

    check(mass >= 0.0 && mass <= 1.0, "mass: got ", mass, ", must be in (0, 1]");
    check(mass == 0.0 || !keep.has_value(), "keep, mass: give exactly one");
    check(mass == 0.0 || params.tokens <= kMassMaxTokens, "scores: has ", params.tokens,
          " tokens, with mass at most ", kMassMaxTokens);
    check(mass > 0.0 || keep.has_value() || keep_each >= 0, "keep: got ", keep_each,
          ", must be >= 0");
    params.mass = mass;
    params.keep_each = keep_each;
    if (keep.has_value()) {
        check_dtype(*keep, "keep", ScalarType::Int);
        check_device(*keep, "keep", scores);
        params.keep_per_segment = keep->dim() == 2;
        if (params.keep_per_segment) {
            check(segment.has_value(), "keep: (R, G) needs segment");
            check_shape(*keep, "keep", {params.rows, -1});
            check_last_contiguous(*keep, "keep");
            params.keep_columns = keep->size(1);
        } else {
            check_shape(*keep, "keep", {params.rows});
            params.keep_columns = 1;
        }
        params.keep = keep->const_data_ptr<int32_t>();
        params.keep_stride = keep->stride(0);
    }

    check(index.dim() == 2, "index: has shape ", shape_text(index), ", must be (R, M)");
    params.capacity = index.size(1);
    params.index = output<int32_t>(index, "index", {params.rows, params.capacity}, scores);
    params.count = output<int32_t>(count, "count", {params.rows}, scores);
    params.inverse = output<int32_t>(inverse, "inverse", {params.rows, params.tokens}, scores);
    params.error = error_word_pointer(error, scores);

    LIGHTVLM_RUN(select, backend, scores, params);
}

}  // namespace

LIGHTVLM_REGISTER(select, select_op)

}  // namespace lightvlm
