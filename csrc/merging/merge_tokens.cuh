// merge_tokens: each dropped token into the most similar kept one, in four launches without a
// host in between.
//
//   1. merge_prepare.cuh      lists of kept and dropped tokens, lengths of the metric vectors
//   2. merge_similarity.cuh   best[d] for each dropped token d
//   3. here                   dropped tokens by the kept one they go to
//   4. merge_rows.cuh         the merged rows
//
// Owner     A warp owns one entry of index (where its list begins, how long it is), or one dropped
//           token (its place in the list).
// Shared    None.
// Bound     Latency: merge_arrange.cuh.
#pragma once

#include "merging/merge_prepare.cuh"
#include "merging/merge_similarity.cuh"

namespace lightvlm {

// Who is compared with whom.
struct MergeTokensProblem {
    SimilarityMetric metric;
    MergeTokensParams params;

    __host__ explicit MergeTokensProblem(const MergeTokensParams& merge)
        : metric{merge.metric, merge.metric_width, merge.metric_row_stride,
                 merge.metric_token_stride},
          params(merge) {}

    __device__ __forceinline__ unsigned long long* best(int64_t row) const {
        return MergeWorkspace(params).best + row * params.tokens;
    }
    __device__ __forceinline__ bool may_match(int64_t row, int64_t first_dropped,
                                              int64_t first_kept) const {
        return first_dropped < MergeWorkspace(params).dropped_count[row] &&
               first_kept < merge_count(params, row);
    }
    __device__ __forceinline__ SimilarityToken kept(int64_t row, int64_t position) const {
        if (position >= merge_count(params, row)) return {};
        return token(row, MergeWorkspace(params).kept[row * params.slots + position]);
    }
    __device__ __forceinline__ SimilarityToken dropped(int64_t row, int64_t position) const {
        const MergeWorkspace workspace(params);
        if (position >= workspace.dropped_count[row]) return {};
        return token(row, workspace.dropped[row * params.tokens + position]);
    }

  private:
    __device__ __forceinline__ SimilarityToken token(int64_t row, int32_t at) const {
        if (at < 0) return {};
        const MergeWorkspace workspace(params);
        const int64_t all = row * params.tokens + at;
        return {at, params.group[row * params.group_stride + at], workspace.scale[all],
                workspace.inverse[all]};
    }
};

constexpr int kArrangeThreads = 256;
constexpr int kArrangeWarps = kArrangeThreads / kWarpThreads;

__global__ void __launch_bounds__(kArrangeThreads)
    merge_arrange_kernel(const __grid_constant__ MergeTokensParams params) {
    const MergeWorkspace workspace(params);
    const int64_t warp =
        static_cast<int64_t>(blockIdx.x) * kArrangeWarps + threadIdx.x / kWarpThreads;
    const int64_t row = warp / (params.slots + params.tokens);
    if (row >= params.rows) return;
    const int64_t item = warp % (params.slots + params.tokens);
    const bool is_entry = item < params.slots;
    const int64_t dropped_count = workspace.dropped_count[row];
    const unsigned long long* best = workspace.best + row * params.tokens;
    // The low half of best is the complement of the kept token; 0, nothing near, gives none.
    const auto goes = [&](int64_t i) { return ~static_cast<uint32_t>(best[i]); };
    int64_t position = 0;
    uint32_t to = kGoesNowhere;
    if (is_entry) {
        if (item >= merge_count(params, row)) return;
        to = static_cast<uint32_t>(workspace.kept[row * params.slots + item]);
    } else {
        position = item - params.slots;
        if (position >= dropped_count) return;
        to = goes(position);
    }
    if (to == kGoesNowhere) return;
    const ArrivalRank rank = rank_arrivals(dropped_count, to, position, goes);
    if (threadIdx.x % kWarpThreads != 0) return;
    if (is_entry) {
        workspace.span[row * params.slots + item] = ListSpan{rank.less, rank.equal};
    } else {
        workspace.order[row * params.tokens + rank.less + rank.equal_before] =
            workspace.dropped[row * params.tokens + position];
    }
}

}  // namespace lightvlm
