// select: the highest-scoring tokens of each row, as ascending indices. See
// lightvlm_ext/ops/select.py.
#pragma once

#include "common/cuda_types.h"
#include "common/error_word.h"
#include "selection/rows.h"

namespace lightvlm {

struct SelectParams {
    SelectionRows rows;
    double mass = 0.0;  // where it is above 0, it is the budget in the place of keep
};

Status select_cpu(const SelectParams& params);

#if LIGHTVLM_HAS_DEVICE
cudaError_t launch_select_cuda(const SelectParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
