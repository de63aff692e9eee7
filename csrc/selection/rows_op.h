// Checks and fills SelectionRows from tensors.
#pragma once

#include <limits>
#include <optional>

#include "common/checks.h"
#include "selection/rows.h"

namespace lightvlm {

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

inline int32_t* row_output(const Tensor& tensor, const char* name,
                           std::initializer_list<int64_t> sizes, const Tensor& scores) {
    check_dtype(tensor, name, ScalarType::Int);
    check_shape(tensor, name, sizes);
    check_device(tensor, name, scores);
    check_contiguous(tensor, name);
    return tensor.mutable_data_ptr<int32_t>();
}

inline SelectionRows selection_rows(const Tensor& scores,                     // [R, N] fp32
                                    const std::optional<Tensor>& forced,      // [R, N] bool
                                    const std::optional<Tensor>& candidates,  // [R, N] bool
                                    const std::optional<Tensor>& segment,     // [R, N] int32
                                    const std::optional<Tensor>& keep,        // [R] or [R, G] int32
                                    int64_t keep_each,                     // where keep is absent
                                    const Tensor& index,                   // [R, M] int32, out
                                    const Tensor& count,                   // [R] int32, out
                                    const Tensor& inverse,                 // [R, N] int32, out
                                    const std::optional<Tensor>& error) {  // [1] int32
    constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
    check_dtype(scores, "scores", ScalarType::Float);
    check_shape(scores, "scores", {-1, -1});
    check_last_contiguous(scores, "scores");

    SelectionRows rows;
    rows.rows = scores.size(0);
    rows.tokens = scores.size(1);
    check(rows.rows <= kMaxInt32, "scores: has ", rows.rows, " rows, at most ", kMaxInt32);
    check(rows.tokens <= kMaxInt32, "scores: has ", rows.tokens, " tokens, at most ", kMaxInt32);
    rows.scores = scores.const_data_ptr<float>();
    rows.scores_stride = scores.stride(0);
    rows.forced = row_input<bool>(forced, "forced", ScalarType::Bool, scores, &rows.forced_stride);
    rows.candidates = row_input<bool>(candidates, "candidates", ScalarType::Bool, scores,
                                      &rows.candidates_stride);
    rows.segment =
        row_input<int32_t>(segment, "segment", ScalarType::Int, scores, &rows.segment_stride);

    check(keep.has_value() || keep_each >= 0, "keep: got ", keep_each, ", must be >= 0");
    rows.keep_each = keep_each;
    if (keep.has_value()) {
        check_dtype(*keep, "keep", ScalarType::Int);
        check_device(*keep, "keep", scores);
        rows.keep_per_segment = keep->dim() == 2;
        if (rows.keep_per_segment) {
            check(segment.has_value(), "keep: (R, G) needs segment");
            check_shape(*keep, "keep", {rows.rows, -1});
            check_last_contiguous(*keep, "keep");
            rows.keep_columns = keep->size(1);
        } else {
            check_shape(*keep, "keep", {rows.rows});
            rows.keep_columns = 1;
        }
        rows.keep = keep->const_data_ptr<int32_t>();
        rows.keep_stride = keep->stride(0);
    }

    if (index.dim() != 2) fail("index: has shape ", shape_text(index), ", must be (R, M)");
    rows.capacity = index.size(1);
    rows.index = row_output(index, "index", {rows.rows, rows.capacity}, scores);
    rows.count = row_output(count, "count", {rows.rows}, scores);
    rows.inverse = row_output(inverse, "inverse", {rows.rows, rows.tokens}, scores);
    rows.error = error_word_pointer(error, scores);
    return rows;
}

}  // namespace lightvlm
