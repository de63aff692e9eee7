// Instantiations and launches of importance.cuh.
#include "importance/importance.cuh"

namespace lightvlm {

namespace {

static_assert(sizeof(ImportanceArguments) <= 4096, "kernel parameters are limited to 4 KiB");

int64_t blocks_of(int64_t elements, int64_t each) { return (elements + each - 1) / each; }

// Maximum and sum of exponentials of every probe. The parts of the splits may have room for some
// probe tiles only: then these take turns.
template <typename T>
cudaError_t launch_own_softmax(const ImportanceArguments& arguments, cudaStream_t stream) {
    using Product = ImportanceProduct<T>;
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t tiles = blocks_of(params.probes(), kImportanceTile);
    const int64_t blocks = params.batch * params.slots() * work.part_tiles;
    if (blocks == 0) return cudaSuccess;
    for (int64_t first = 0; first < tiles; first += work.part_tiles) {
        cudaError_t error = launch("importance_lse", importance_lse_kernel<T>,
                                   make_grid(blocks, work.splits), dim3(Product::kThreads),
                                   sizeof(typename Product::Shared), stream, arguments, first);
        if (error != cudaSuccess) return error;
        error = launch("importance_merge", importance_merge_kernel, make_grid(blocks),
                       dim3(kImportanceTile), 0, stream, arguments, first);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

template <typename T>
cudaError_t launch_importance(const ImportanceArguments& arguments, cudaStream_t stream) {
    using Product = ImportanceProduct<T>;
    const ImportanceParams& params = arguments.params;
    const dim3 threads(kImportancePlanThreads);
    cudaError_t error = launch("importance_plan", importance_plan_kernel, make_grid(params.batch),
                               threads, sizeof(ImportancePlanShared), stream, arguments);
    if (error != cudaSuccess) return error;
    error = launch("importance_visible", importance_visible_kernel,
                   make_grid(blocks_of(params.batch * params.tokens, kImportancePlanThreads)),
                   threads, 0, stream, arguments);
    if (error != cudaSuccess) return error;
    if (params.lse == nullptr) {
        error = launch_own_softmax<T>(arguments, stream);
        if (error != cudaSuccess) return error;
    }
    error = launch(
        "importance_fold", importance_fold_kernel<T>,
        make_grid(params.batch * params.key_heads * blocks_of(params.targets(), kImportanceTile)),
        dim3(Product::kThreads), sizeof(typename Product::Shared), stream, arguments);
    if (error != cudaSuccess) return error;
    return launch("importance_heads", importance_heads_kernel,
                  make_grid(blocks_of(params.batch * params.targets(), kImportancePlanThreads)),
                  threads, 0, stream, arguments);
}

}  // namespace

cudaError_t launch_importance_cuda(const ImportanceParams& params, cudaStream_t stream) {
    if (params.batch == 0) return cudaSuccess;
    const ImportanceArguments arguments{params, divide_workspace(params)};
    return dispatch_dtype(params.dtype, [&](auto tag) {
        return launch_importance<typename decltype(tag)::type>(arguments, stream);
    });
}

}  // namespace lightvlm
