// Instantiations and launches of merge_tokens.cuh.
#include "merging/merge_tokens.cuh"

#include "merging/merge_launch.cuh"

namespace lightvlm {

namespace {

template <typename T>
cudaError_t launch_prepare(const MergeTokensParams& params, bool pieces, cudaStream_t stream) {
    constexpr int kVector = kPieceBytes / sizeof(T);
    const int64_t blocks = 1 + ceil_div(params.tokens, kPrepareWarps);
    return launch("merge_prepare",
                  pieces ? merge_prepare_kernel<T, kVector> : merge_prepare_kernel<T, 1>,
                  make_grid(params.rows * blocks), dim3(kPrepareThreads), sizeof(PrepareShared),
                  stream, params, static_cast<uint32_t>(blocks));
}

MergeRowsParams rows_of(const MergeTokensParams& params) {
    const MergeWorkspace workspace(params);
    MergeRowsParams rows;
    rows.rows = params.rows;
    rows.tokens = params.tokens;
    rows.slots = params.slots;
    rows.width = params.width;
    rows.right = params.right;
    rows.x = params.x;
    rows.x_row_stride = params.x_row_stride;
    rows.x_token_stride = params.x_token_stride;
    rows.weight = params.weight;
    rows.weight_stride = params.weight_stride;
    rows.count = params.count;
    rows.count_stride = params.count_stride;
    rows.kept = workspace.kept;
    rows.span = workspace.span;
    rows.order = workspace.order;
    rows.out = params.out;
    rows.target = params.target;
    return rows;
}

}  // namespace

cudaError_t launch_merge_tokens_cuda(const MergeTokensParams& params, cudaStream_t stream) {
    cudaError_t status = dispatch_dtype(params.metric_dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool pieces = in_pieces<T>(params.metric, params.metric_width,
                                         params.metric_row_stride, params.metric_token_stride);
        const cudaError_t prepared = launch_prepare<T>(params, pieces, stream);
        if (prepared != cudaSuccess) return prepared;
        return launch_similarity<T>(MergeTokensProblem(params), params.rows, params.tokens,
                                    params.slots, pieces, stream);
    });
    if (status != cudaSuccess) return status;
    const int64_t warps = params.rows * (params.slots + params.tokens);
    status =
        launch("merge_arrange", merge_arrange_kernel, make_grid(ceil_div(warps, kArrangeWarps)),
               dim3(kArrangeThreads), 0, stream, params);
    if (status != cudaSuccess) return status;
    return launch_rows_of(params.dtype, rows_of(params), stream);
}

}  // namespace lightvlm
