// Instantiations and launches of importance.cuh and importance_tensor.cuh.
#include "importance/importance.cuh"

#include <type_traits>

#include "importance/importance_tensor.cuh"

namespace lightvlm {

namespace {

static_assert(sizeof(ImportanceArguments) <= 4096, "kernel parameters are limited to 4 KiB");

int64_t blocks_of(int64_t elements, int64_t each) { return (elements + each - 1) / each; }

cudaError_t launch_plan(const ImportanceArguments& arguments, cudaStream_t stream) {
    return launch("importance_plan", importance_plan_kernel, make_grid(arguments.params.batch),
                  dim3(kImportancePlanThreads), sizeof(ImportancePlanShared), stream, arguments);
}

cudaError_t launch_heads(const ImportanceArguments& arguments, cudaStream_t stream) {
    const ImportanceParams& params = arguments.params;
    const int64_t each =
        params.tokens + (params.axis == ScoreAxis::kQuery ? params.window : int64_t{0});
    return launch("importance_heads", importance_heads_kernel,
                  make_grid(blocks_of(params.batch * each, kImportancePlanThreads)),
                  dim3(kImportancePlanThreads), 0, stream, arguments);
}

// Maximum and sum of exponentials of every probe: lse(first) computes those of as many parts of
// each slot as there is room for; the parts take turns.
template <typename Lse>
cudaError_t launch_own_softmax(const ImportanceArguments& arguments, cudaStream_t stream,
                               const Lse& lse) {
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t parts = blocks_of(params.probes(), kImportancePart);
    const int64_t blocks = params.batch * params.slots() * work.parts;
    if (blocks == 0) return cudaSuccess;
    for (int64_t first = 0; first < parts; first += work.parts) {
        cudaError_t error = lse(first);
        if (error != cudaSuccess) return error;
        if (work.highest == nullptr) continue;
        error = launch("importance_merge", importance_merge_kernel, make_grid(blocks),
                       dim3(kImportancePart), 0, stream, arguments, first);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

cudaError_t launch_on_cuda_cores(const ImportanceArguments& arguments, cudaStream_t stream) {
    using Product = ImportanceProduct<float>;
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const dim3 threads(Product::kThreads);
    constexpr size_t kShared = sizeof(typename Product::Shared);
    cudaError_t error = cudaSuccess;
    if (params.row_pos != nullptr) error = launch_plan(arguments, stream);
    if (error != cudaSuccess) return error;
    if (params.lse == nullptr) {
        const int64_t blocks =
            params.batch * params.slots() * work.parts * (kImportancePart / kImportanceTile);
        error = launch_own_softmax(arguments, stream, [&](int64_t first) {
            return launch("importance_lse", importance_lse_kernel<float>,
                          make_grid(blocks, work.splits), threads, kShared, stream, arguments,
                          first);
        });
        if (error != cudaSuccess) return error;
    }
    const int64_t tiles = blocks_of(params.targets(), kImportanceTile);
    error = launch("importance_fold", importance_fold_kernel<float>,
                   make_grid(params.batch * params.key_heads * tiles), threads, kShared, stream,
                   arguments);
    if (error != cudaSuccess) return error;
    return launch_heads(arguments, stream);
}

// Whether every vector begins at a multiple of 16 bytes and ends at one.
bool is_even(const ImportanceParams& params) {
    const auto address =
        reinterpret_cast<uintptr_t>(params.query) | reinterpret_cast<uintptr_t>(params.key);
    const int64_t strides = params.query_batch_stride | params.query_row_stride |
                            params.query_head_stride | params.key_batch_stride |
                            params.key_token_stride | params.key_head_stride;
    return address % 16 == 0 && (strides | params.width) % 8 == 0;
}

template <typename T, int kWidth>
cudaError_t launch_on_tensor_cores(const ImportanceArguments& arguments, cudaStream_t stream) {
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const dim3 threads(kTensorThreads);
    constexpr size_t kShared = sizeof(TensorKernelShared<T, kWidth>);
    static_assert(kShared <= 99 * 1024, "compute capability 8.6 has no more");
    const bool even = is_even(params);
    const bool planned = params.row_pos != nullptr &&
                         (params.axis == ScoreAxis::kQuery || params.window > kListedRows);
    const bool direct = importance_folds_heads_at_once(params);
    const bool all_heads = direct && params.heads != HeadsOp::kNone;
    cudaError_t error = cudaSuccess;
    if (planned) error = launch_plan(arguments, stream);
    if (error != cudaSuccess) return error;
    if (params.lse == nullptr) {
        error = launch_own_softmax(arguments, stream, [&](int64_t first) {
            return launch("importance_lse", importance_tensor_lse_kernel<T, kWidth>,
                          make_grid(params.batch * params.slots() * work.parts, work.splits),
                          threads, kShared, stream, arguments, first, even, planned);
        });
        if (error != cudaSuccess) return error;
    }
    const int64_t tiles = blocks_of(params.targets(), kStationary);
    error = launch("importance_fold", importance_tensor_fold_kernel<T, kWidth>,
                   make_grid(params.batch * (all_heads ? 1 : params.key_heads) * tiles), threads,
                   kShared, stream, arguments, even, planned, all_heads, direct);
    if (error != cudaSuccess || direct) return error;
    return launch_heads(arguments, stream);
}

}  // namespace

cudaError_t launch_importance_cuda(const ImportanceParams& params, cudaStream_t stream) {
    if (params.batch == 0) return cudaSuccess;
    const ImportanceArguments arguments{params, divide_workspace(params)};
    return dispatch_dtype(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (std::is_same_v<T, float>) {
            return launch_on_cuda_cores(arguments, stream);
        } else {
            if (params.width <= 64) return launch_on_tensor_cores<T, 64>(arguments, stream);
            if (params.width <= 96) return launch_on_tensor_cores<T, 96>(arguments, stream);
            if (params.width <= 128) return launch_on_tensor_cores<T, 128>(arguments, stream);
            return launch_on_tensor_cores<T, kImportanceMaxWidth>(arguments, stream);
        }
    });
}

}  // namespace lightvlm
