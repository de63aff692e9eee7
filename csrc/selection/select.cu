// Instantiations and launch of select.cuh.
#include "selection/select.cuh"

namespace lightvlm {

namespace {

template <int kThreads>
cudaError_t launch_select(const SelectParams& params, cudaStream_t stream) {
    return launch("select", select_kernel<kThreads>, make_grid(params.rows.rows), dim3(kThreads),
                  sizeof(SelectShared<kThreads>), stream, params);
}

}  // namespace

cudaError_t launch_select_cuda(const SelectParams& params, cudaStream_t stream) {
    // Short rows are bound by barriers, which are cheaper among few warps.
    if (params.rows.tokens <= 1024) return launch_select<128>(params, stream);
    return launch_select<1024>(params, stream);
}

}  // namespace lightvlm
