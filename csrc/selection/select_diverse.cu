// Instantiations and launch of select_diverse.cuh.
#include "selection/select_diverse.cuh"

namespace lightvlm {

namespace {

template <int kThreads>
cudaError_t launch_select_diverse(const SelectDiverseParams& params, cudaStream_t stream) {
    return dispatch_dtype(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return launch("select_diverse", select_diverse_kernel<kThreads, T>,
                      make_grid(params.rows.rows), dim3(kThreads),
                      sizeof(SelectDiverseShared<kThreads>), stream, params);
    });
}

}  // namespace

cudaError_t launch_select_diverse_cuda(const SelectDiverseParams& params, cudaStream_t stream) {
    // Few features are bound by barriers, which are cheaper among few warps.
    constexpr int64_t kFewFeatures = 1 << 14;
    if (params.rows.tokens * params.channels <= kFewFeatures) {
        return launch_select_diverse<128>(params, stream);
    }
    return launch_select_diverse<1024>(params, stream);
}

}  // namespace lightvlm
