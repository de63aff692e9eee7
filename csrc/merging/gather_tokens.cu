// Launch of gather_tokens.cuh.
#include "merging/gather_tokens.cuh"

namespace lightvlm {

static_assert(sizeof(GatherTokensParams) <= 4096, "kernel parameters are limited to 4 KiB");

cudaError_t launch_gather_tokens_cuda(const GatherTokensParams& params, cudaStream_t stream) {
    const int64_t blocks = (params.rows * params.slots + kGatherWarps - 1) / kGatherWarps;
    return launch("gather_tokens", gather_tokens_kernel, make_grid(blocks, params.tensor_count),
                  dim3(kGatherWarps * kWarpThreads), 0, stream, params);
}

}  // namespace lightvlm
