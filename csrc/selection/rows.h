// What select and select_diverse have in common: rows of scores, who may be chosen, how many, and
// where the selection goes.
#pragma once

#include <cstdint>

namespace lightvlm {

// Sizes and strides in elements; every last dimension is contiguous. Absent tensors are null.
struct SelectionRows {
    int64_t rows = 0;
    int64_t tokens = 0;
    int64_t capacity = 0;

    const float* scores = nullptr;     // [rows, tokens]
    const bool* forced = nullptr;      // [rows, tokens]
    const bool* candidates = nullptr;  // [rows, tokens]
    const int32_t* segment = nullptr;  // [rows, tokens], negative: no candidate
    int64_t scores_stride = 0;
    int64_t forced_stride = 0;
    int64_t candidates_stride = 0;
    int64_t segment_stride = 0;

    // The budget: keep, one for each row or for each of its segments; where it is null, keep_each.
    const int32_t* keep = nullptr;  // [rows, keep_columns]
    int64_t keep_stride = 0;
    int64_t keep_columns = 0;
    bool keep_per_segment = false;  // the column is the segment's id; else there is one column
    int64_t keep_each = 0;

    int32_t* index = nullptr;    // [rows, capacity]
    int32_t* count = nullptr;    // [rows]
    int32_t* inverse = nullptr;  // [rows, tokens]
    int32_t* error = nullptr;    // device error word
};

}  // namespace lightvlm
