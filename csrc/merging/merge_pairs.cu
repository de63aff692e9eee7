// Instantiations and launches of merge_pairs.cuh.
#include "merging/merge_pairs.cuh"

#include "merging/merge_launch.cuh"
#include "merging/merge_window.cuh"

namespace lightvlm {

namespace {

MergeRowsParams rows_of(const MergePairsParams& params) {
    const PairsWorkspace workspace(params);
    MergeRowsParams rows;
    rows.rows = params.rows;
    rows.tokens = params.tokens;
    rows.slots = params.slots;
    rows.width = params.width;
    rows.right = params.right;
    rows.eps = params.eps;
    rows.x = params.x;
    rows.x_row_stride = params.x_row_stride;
    rows.x_token_stride = params.x_token_stride;
    rows.weight = params.weight;
    rows.weight_stride = params.weight_stride;
    rows.count = params.count;
    rows.count_stride = 1;
    rows.kept = params.index;
    rows.span = workspace.span;
    rows.order = workspace.order;
    rows.out = params.out;
    rows.out_weight = params.out_weight;
    rows.index_tail = params.index;
    return rows;
}

template <typename T>
cudaError_t launch_matching(const MergePairsParams& params, cudaStream_t stream) {
    constexpr int kVector = kPieceBytes / sizeof(T);
    const bool pieces = in_pieces<T>(params.metric, params.metric_width, params.metric_row_stride,
                                     params.metric_token_stride);
    const int64_t tokens = params.rows * params.tokens;
    const dim3 block(kPairsThreads);
    const dim3 warp_each = make_grid(params.rows * row_blocks(params.tokens));
    cudaError_t status =
        launch("merge_pairs_prepare",
               pieces ? merge_pairs_prepare_kernel<T, kVector> : merge_pairs_prepare_kernel<T, 1>,
               warp_each, block, 0, stream, params);
    if (status != cudaSuccess) return status;
    bool small_done = false;
    if constexpr (!std::is_same_v<T, float>) {
        if (pieces) {
            small_done = true;
            status = launch("merge_window", merge_window_kernel<T>, make_grid(tokens),
                            dim3(kWindowThreads), sizeof(WindowShared), stream, params);
            if (status != cudaSuccess) return status;
        }
    }
    // No window is large where no row is.
    if (!small_done || params.tokens > kWindowSources + 1) {
        status = launch_similarity<T>(MergePairsProblem(params, !small_done), params.rows,
                                      params.tokens, params.tokens, pieces, stream);
        if (status != cudaSuccess) return status;
    }
    return launch("merge_pairs_choose", merge_pairs_choose_kernel, warp_each, block, 0, stream,
                  params);
}

}  // namespace

cudaError_t launch_merge_pairs_cuda(const MergePairsParams& params, cudaStream_t stream) {
    cudaError_t status = dispatch_dtype(params.metric_dtype, [&](auto tag) {
        return launch_matching<typename decltype(tag)::type>(params, stream);
    });
    if (status != cudaSuccess) return status;
    status = launch("merge_pairs_arrange", merge_pairs_arrange_kernel,
                    make_grid(params.rows * row_blocks(params.tokens + 1)), dim3(kPairsThreads), 0,
                    stream, params);
    if (status != cudaSuccess) return status;
    return launch_rows_of(params.dtype, rows_of(params), stream);
}

}  // namespace lightvlm
