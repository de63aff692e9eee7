// select_diverse: greedy selection by score and dissimilarity to what is already chosen. See
// lightvlm_ext/ops/select_diverse.py.
#pragma once

#include "common/cuda_types.h"
#include "common/dispatch.h"
#include "common/error_word.h"
#include "selection/rows.h"

namespace lightvlm {

// Words of the workspace that each token needs on a device: see DiverseState.
constexpr int64_t kDiverseWords = 6;

struct SelectDiverseParams {
    SelectionRows rows;
    DType dtype = DType::kFloat32;
    const void* features = nullptr;  // [rows, tokens, channels], of dtype
    int64_t features_row_stride = 0;
    int64_t features_token_stride = 0;
    int64_t channels = 0;
    float strength = 1.0f;
    int32_t* workspace = nullptr;  // [rows, kDiverseWords, tokens]; not used by the CPU twin
};

Status select_diverse_cpu(const SelectDiverseParams& params);

#if LIGHTVLM_HAS_DEVICE
cudaError_t launch_select_diverse_cuda(const SelectDiverseParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
