// gather_tokens: kept rows of several tensors, moved together. See
// lightvlm_ext/ops/gather_tokens.py.
#pragma once

#include <cstdint>

#include "common/cuda_types.h"
#include "common/error_word.h"

namespace lightvlm {

constexpr int kGatherMaxTensors = 16;
constexpr int kGatherMaxOuter = 6;

// One tensor, moved as bytes: all strides and widths are in bytes. A token's data is a
// contiguous piece of inner_bytes, repeated over up to kGatherMaxOuter strided dimensions, the
// innermost of them last. The target is contiguous.
struct GatherTensor {
    const char* source = nullptr;
    char* target = nullptr;
    int64_t row_stride = 0;
    int64_t token_stride = 0;
    int64_t inner_bytes = 0;
    int64_t token_bytes = 0;  // inner_bytes times all outer sizes
    int32_t outer_dims = 0;
    // Widest access, in bytes, that the alignment of all the above allows: 16, 8, 4, 2 or 1.
    int32_t access_bytes = 1;
    int64_t outer_size[kGatherMaxOuter] = {};
    int64_t outer_stride[kGatherMaxOuter] = {};
};

struct GatherTokensParams {
    int64_t rows = 0;
    int64_t tokens = 0;
    int64_t slots = 0;
    bool right = false;              // rows stand flush right in their slots
    const int32_t* index = nullptr;  // [rows, slots]
    const int32_t* count = nullptr;  // [rows]
    int64_t index_stride = 0;        // in elements

    int32_t tensor_count = 0;
    GatherTensor tensors[kGatherMaxTensors];

    int32_t* error = nullptr;  // device error word
};

Status gather_tokens_cpu(const GatherTokensParams& params);

#if LIGHTVLM_HAS_DEVICE
cudaError_t launch_gather_tokens_cuda(const GatherTokensParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
