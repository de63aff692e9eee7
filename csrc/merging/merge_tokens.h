// merge_tokens: each dropped token into the most similar kept one. See
// lightvlm_ext/ops/merge_tokens.py.
#pragma once

#include <cstdint>

#include "common/cuda_types.h"
#include "common/dispatch.h"
#include "common/error_word.h"

namespace lightvlm {

// Sizes and strides in elements; every last dimension is contiguous.
struct MergeTokensParams {
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

    const int32_t* index = nullptr;  // [rows, slots]
    const int32_t* count = nullptr;  // [rows]
    const float* weight = nullptr;   // [rows, tokens]
    const int32_t* group = nullptr;  // [rows, tokens], negative: takes no part
    int64_t index_stride = 0;
    int64_t count_stride = 0;
    int64_t weight_stride = 0;
    int64_t group_stride = 0;

    void* out = nullptr;           // [rows, slots, width], contiguous
    int32_t* target = nullptr;     // [rows, tokens], contiguous, or null: the entry of index that
                                   // each token went to, -1 where it vanished
    int64_t* workspace = nullptr;  // merge_workspace_words(); unused on the CPU
    int32_t* error = nullptr;      // device error word

    // Slot of the output in which entry j of a row with `count` entries stands.
    constexpr int64_t slot_of(int64_t entry, int64_t row_count) const {
        return right ? slots - row_count + entry : entry;
    }
};

// What the kernels need besides, in words of 64 bits: the layout is in merge_prepare.cuh.
constexpr int64_t merge_workspace_words(int64_t rows, int64_t tokens, int64_t slots) {
    return rows * (3 * tokens + slots + (slots + 2) / 2);
}

Status merge_tokens_cpu(const MergeTokensParams& params);

#if LIGHTVLM_HAS_DEVICE
cudaError_t launch_merge_tokens_cuda(const MergeTokensParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
