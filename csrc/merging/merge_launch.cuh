// Launches that merge_tokens and merge_pairs share: similarity tiles, and the rows that are left.
#pragma once

#include <type_traits>

#include "common/dispatch.h"
#include "merging/merge_rows.cuh"
#include "merging/merge_similarity.cuh"

namespace lightvlm {

constexpr int64_t kPieceBytes = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows of `width` values at these strides are whole, aligned pieces of 16 bytes.
template <typename T>
bool in_pieces(const void* data, int64_t width, int64_t row_stride, int64_t token_stride) {
    const auto bytes = static_cast<uintptr_t>((width | row_stride | token_stride) * sizeof(T));
    return (reinterpret_cast<uintptr_t>(data) | bytes) % kPieceBytes == 0;
}

// pieces: as in_pieces() says of the metric.
template <typename T, typename Problem>
cudaError_t launch_similarity(const Problem& problem, int64_t rows, int64_t dropped, int64_t kept,
                              bool pieces, cudaStream_t stream) {
    const int64_t dropped_tiles = ceil_div(dropped, kSimilarityTile);
    const int64_t kept_tiles = ceil_div(kept, kSimilarityTile);
    const dim3 grid = make_grid(rows * dropped_tiles * kept_tiles);
    if constexpr (!std::is_same_v<T, float>) {
        if (pieces) {
            return launch("merge_similarity_tensor", merge_similarity_tensor_kernel<T, Problem>,
                          grid, dim3(kTensorThreads), sizeof(TensorShared), stream, problem,
                          static_cast<uint32_t>(dropped_tiles), static_cast<uint32_t>(kept_tiles));
        }
    }
    return launch("merge_similarity", merge_similarity_kernel<T, Problem>, grid,
                  dim3(kGeneralThreads), sizeof(GeneralShared), stream, problem,
                  static_cast<uint32_t>(dropped_tiles), static_cast<uint32_t>(kept_tiles));
}

template <typename T>
cudaError_t launch_rows(const MergeRowsParams& params, cudaStream_t stream) {
    constexpr int kVector = kPieceBytes / sizeof(T);
    const bool pieces =
        in_pieces<T>(params.x, params.width, params.x_row_stride, params.x_token_stride) &&
        reinterpret_cast<uintptr_t>(params.out) % kPieceBytes == 0;
    // One block at least for each slot: it also writes where the tokens went.
    MergeRowsGrid grid{};
    const int64_t values = kRowsThreads * (pieces ? kVector : 1);
    const int64_t chunks = params.width > 0 ? ceil_div(params.width, values) : 1;
    const int64_t hubs = pieces ? params.tokens / (kHubArrivals + 1) : 0;
    const int64_t hub_chunks = ceil_div(params.width * static_cast<int64_t>(sizeof(T)), kHubBytes);
    const int64_t blocks = hubs * hub_chunks + params.slots * chunks;
    // What does not fit 32 bits does not fit the grid: launch() refuses it.
    grid.hubs = static_cast<uint32_t>(hubs);
    grid.hub_chunks = static_cast<uint32_t>(hub_chunks);
    grid.chunks = static_cast<uint32_t>(chunks);
    grid.hub_blocks = static_cast<uint32_t>(params.rows * hubs * hub_chunks);
    return launch("merge_rows", pieces ? merge_rows_kernel<T, kVector> : merge_rows_kernel<T, 1>,
                  make_grid(params.slots > 0 ? params.rows * blocks : 0), dim3(kRowsThreads),
                  sizeof(RowsShared), stream, params, grid);
}

inline cudaError_t launch_rows_of(DType dtype, const MergeRowsParams& params, cudaStream_t stream) {
    return dispatch_dtype(
        dtype, [&](auto tag) { return launch_rows<typename decltype(tag)::type>(params, stream); });
}

}  // namespace lightvlm
