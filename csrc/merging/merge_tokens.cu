// Instantiations and launches of merge_tokens.cuh.
#include "merging/merge_tokens.cuh"

#include <type_traits>

#include "merging/merge_similarity.cuh"

namespace lightvlm {

namespace {

constexpr int64_t kPieceBytes = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows of `width` values at these strides are whole, aligned pieces of 16 bytes.
template <typename T>
bool in_pieces(const void* data, int64_t width, int64_t row_stride, int64_t token_stride) {
    const auto bytes = static_cast<uintptr_t>((width | row_stride | token_stride) * sizeof(T));
    return (reinterpret_cast<uintptr_t>(data) | bytes) % kPieceBytes == 0;
}

template <typename T>
cudaError_t launch_prepare(const MergeTokensParams& params, bool pieces, cudaStream_t stream) {
    constexpr int kVector = kPieceBytes / sizeof(T);
    const int64_t blocks = 1 + ceil_div(params.tokens, kPrepareWarps);
    return launch("merge_prepare",
                  pieces ? merge_prepare_kernel<T, kVector> : merge_prepare_kernel<T, 1>,
                  make_grid(params.rows * blocks), dim3(kPrepareThreads), sizeof(PrepareShared),
                  stream, params, blocks);
}

template <typename T>
cudaError_t launch_similarity(const MergeTokensParams& params, bool pieces, cudaStream_t stream) {
    const int64_t dropped_tiles = ceil_div(params.tokens, kSimilarityTile);
    const int64_t kept_tiles = ceil_div(params.slots, kSimilarityTile);
    const dim3 grid = make_grid(params.rows * dropped_tiles * kept_tiles);
    if constexpr (!std::is_same_v<T, float>) {
        if (pieces) {
            return launch("merge_similarity_tensor", merge_similarity_tensor_kernel<T>, grid,
                          dim3(kTensorThreads), sizeof(TensorShared), stream, params, dropped_tiles,
                          kept_tiles);
        }
    }
    return launch("merge_similarity", merge_similarity_kernel<T>, grid, dim3(kGeneralThreads),
                  sizeof(GeneralShared), stream, params, dropped_tiles, kept_tiles);
}

template <typename T>
cudaError_t launch_rows(const MergeTokensParams& params, cudaStream_t stream) {
    constexpr int kVector = kPieceBytes / sizeof(T);
    const bool pieces =
        in_pieces<T>(params.x, params.width, params.x_row_stride, params.x_token_stride) &&
        reinterpret_cast<uintptr_t>(params.out) % kPieceBytes == 0;
    // One block at least for each slot: it also writes where the tokens went.
    const int64_t values = kMergeThreads * (pieces ? kVector : 1);
    const int64_t chunks = params.width > 0 ? ceil_div(params.width, values) : 1;
    return launch("merge_rows", pieces ? merge_rows_kernel<T, kVector> : merge_rows_kernel<T, 1>,
                  make_grid(params.rows * params.slots * chunks), dim3(kMergeThreads),
                  sizeof(MergeShared), stream, params, chunks);
}

}  // namespace

cudaError_t launch_merge_tokens_cuda(const MergeTokensParams& params, cudaStream_t stream) {
    const cudaError_t status = dispatch_dtype(params.metric_dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool pieces = in_pieces<T>(params.metric, params.metric_width,
                                         params.metric_row_stride, params.metric_token_stride);
        const cudaError_t prepared = launch_prepare<T>(params, pieces, stream);
        if (prepared != cudaSuccess) return prepared;
        return launch_similarity<T>(params, pieces, stream);
    });
    if (status != cudaSuccess) return status;
    return dispatch_dtype(params.dtype, [&](auto tag) {
        return launch_rows<typename decltype(tag)::type>(params, stream);
    });
}

}  // namespace lightvlm
