// merge_pairs: bipartite matching within windows, each matched token into its partner. See
// lightvlm_ext/ops/merge_pairs.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/cuda_types.h"
#include "common/dispatch.h"
#include "common/error_word.h"
#include "common/host_device.h"

namespace lightvlm {

// Sizes and strides in elements; every last dimension is contiguous.
struct MergePairsParams {
    int64_t rows = 0;
    int64_t tokens = 0;
    int64_t slots = 0;
    int64_t width = 0;
    int64_t metric_width = 0;
    DType dtype = DType::kFloat32;
    DType metric_dtype = DType::kFloat32;
    bool right = false;  // rows stand flush right in their slots

    const void* x = nullptr;       // [rows, tokens, width]
    const void* metric = nullptr;  // [rows, tokens, metric_width]
    int64_t x_row_stride = 0;
    int64_t x_token_stride = 0;
    int64_t metric_row_stride = 0;
    int64_t metric_token_stride = 0;

    const int32_t* window = nullptr;        // [rows, tokens]: id; -1 no part, below: padding
    const uint8_t* source = nullptr;        // [rows, tokens] bool, or null: even positions
    const uint8_t* is_protected = nullptr;  // [rows, tokens] bool, or null: nobody
    const float* weight = nullptr;          // [rows, tokens], or null: 1
    int64_t window_stride = 0;
    int64_t source_stride = 0;
    int64_t protected_stride = 0;
    int64_t weight_stride = 0;

    // Pairs of a window: each_count or each_ratio where given, by row or by window id; otherwise
    // ratio where it is not negative; otherwise merge.
    const int32_t* each_count = nullptr;  // [rows] or [rows, windows]
    const float* each_ratio = nullptr;
    int64_t each_stride = 0;
    int64_t windows = -1;  // columns; negative: one for the windows of a row
    int64_t merge = 0;
    double ratio = -1.0;
    double eps = 0.0;  // the least that a sum of weights is divided by

    void* out = nullptr;           // [rows, slots, width], contiguous, as all below
    int32_t* index = nullptr;      // [rows, slots]
    int32_t* count = nullptr;      // [rows]
    int32_t* inverse = nullptr;    // [rows, tokens]
    int32_t* target = nullptr;     // [rows, tokens]
    float* out_weight = nullptr;   // [rows, slots]
    int64_t* workspace = nullptr;  // merge_pairs_workspace_words(); unused on the CPU
    int32_t* error = nullptr;      // device error word

    // Slot of the output in which entry j of a row with `count` entries stands.
    constexpr int64_t slot_of(int64_t entry, int64_t row_count) const {
        return right ? slots - row_count + entry : entry;
    }
};

// How many pairs a window wants, or which error its numbers are.
struct PairBudget {
    int64_t pairs = 0;
    int32_t error = 0;
    double value = 0.0;
};

// members: tokens of the window that are not protected.
LIGHTVLM_HOST_DEVICE PairBudget pair_budget(const MergePairsParams& params, int64_t row, int32_t id,
                                            int64_t members) {
    PairBudget budget;
    const bool by_window = params.windows >= 0;
    if (by_window && id >= params.windows) {
        budget.error = kErrorWindowRange;
        budget.value = static_cast<double>(id);
        return budget;
    }
    const int64_t at = row * params.each_stride + (by_window ? id : 0);
    if (params.each_ratio != nullptr) {
        const float ratio = params.each_ratio[at];
        if (!(ratio >= 0.0f && ratio <= 1.0f)) {
            budget.error = kErrorMerge;
            budget.value = static_cast<double>(ratio);
            return budget;
        }
        budget.pairs = static_cast<int64_t>(ratio * static_cast<float>(members));
    } else if (params.each_count != nullptr) {
        budget.pairs = params.each_count[at];
        if (budget.pairs < 0) {
            budget.error = kErrorMerge;
            budget.value = static_cast<double>(budget.pairs);
            budget.pairs = 0;
            return budget;
        }
    } else if (params.ratio >= 0.0) {
        budget.pairs = static_cast<int64_t>(params.ratio * static_cast<double>(members));
    } else {
        budget.pairs = params.merge;
    }
    if (params.source == nullptr && budget.pairs > members / 2) budget.pairs = members / 2;
    return budget;
}

// What the kernels need besides, in words of 64 bits: the layout is in merge_pairs.cuh. Of a token:
constexpr int64_t pairs_token_words(int64_t tokens) { return 3 * tokens + (5 * tokens + 1) / 2; }

constexpr int64_t merge_pairs_workspace_words(int64_t rows, int64_t tokens, int64_t slots) {
    return pairs_token_words(rows * tokens) + rows * slots;
}

Status merge_pairs_cpu(const MergePairsParams& params);

#if LIGHTVLM_HAS_DEVICE
cudaError_t launch_merge_pairs_cuda(const MergePairsParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
