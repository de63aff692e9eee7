// Instantiations and launch of select_diverse.cuh.
#include "selection/select_diverse.cuh"

namespace lightvlm {

namespace {

template <int kPool, typename T>
cudaError_t launch_select_diverse(const SelectDiverseParams& params, cudaStream_t stream) {
    using Shared = SelectDiverseShared<kPool, kDiverseTerms<T>>;
    static_assert(sizeof(Shared) <= 99 * 1024, "shared memory of sm_86, sm_89 and sm_120");
    return launch("select_diverse", select_diverse_kernel<kPool, T>, make_grid(params.rows.rows),
                  dim3(4 * kPool), sizeof(Shared), stream, params);
}

}  // namespace

cudaError_t launch_select_diverse_cuda(const SelectDiverseParams& params, cudaStream_t stream) {
    return dispatch_dtype(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        // A pool of half the tokens would compare what is never chosen.
        constexpr int64_t kFewTokens = 256;
        if (params.rows.tokens <= kFewTokens) return launch_select_diverse<32, T>(params, stream);
        // Two terms of fp32 features take twice the room.
        return launch_select_diverse<128 / kDiverseTerms<T>, T>(params, stream);
    });
}

}  // namespace lightvlm
