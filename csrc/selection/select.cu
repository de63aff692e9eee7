// Instantiations and launch of select_short.cuh and select.cuh.
#include "common/dispatch.h"
#include "selection/select.cuh"
#include "selection/select_short.cuh"

namespace lightvlm {

namespace {

template <int kThreads, int kOwn>
cudaError_t launch_short(const SelectParams& params, cudaStream_t stream) {
    return dispatch_bool(params.mass > 0.0, [&](auto by_mass) {
        return launch("select", select_short_kernel<kThreads, kOwn, decltype(by_mass)::value>,
                      make_grid(params.rows.rows), dim3(kThreads),
                      sizeof(SelectShortShared<kThreads>), stream, params);
    });
}

}  // namespace

cudaError_t launch_select_cuda(const SelectParams& params, cudaStream_t stream) {
    // Short rows are bound by barriers, which are cheaper among few warps.
    if (params.rows.tokens <= 1024) return launch_short<128, 8>(params, stream);
    if (params.rows.tokens <= 4096) return launch_short<512, 8>(params, stream);
    if (params.rows.tokens <= 8192) return launch_short<512, 16>(params, stream);
    return launch("select", select_kernel<1024>, make_grid(params.rows.rows), dim3(1024),
                  sizeof(SelectShared<1024>), stream, params);
}

}  // namespace lightvlm
