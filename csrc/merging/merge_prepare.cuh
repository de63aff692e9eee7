// merge_tokens, first launch: who is kept, who is dropped, and how long the metric vectors are.
//
// Owner     For each row of the batch, block 0 makes the lists; each warp of the others measures
// one
//           token. Both depend on nothing but the inputs.
// Kept      kept[j] = index[j], or -1 where it is bad: out of range, or not above all before it.
// Dropped   Tokens of a group that are not kept, ascending, by rank over tiles of the block.
// Shared    Two words a warp.
// Bound     Bytes: the metric is read once (twice where a vector has to be scaled).
#pragma once

#include "common/block.cuh"
#include "common/device_error.cuh"
#include "common/float16.cuh"
#include "common/launch.h"
#include "merging/merge_arrange.cuh"
#include "merging/merge_measure.cuh"
#include "merging/merge_tokens.h"

namespace lightvlm {

constexpr int kPrepareThreads = 1024;
constexpr int kPrepareWarps = kPrepareThreads / kWarpThreads;

// The parts of the workspace.
struct MergeWorkspace {
    // [rows, tokens], by position in dropped: score_key(cosine) << 32 | ~kept token; 0: none yet.
    unsigned long long* best;
    ListSpan* span;          // [rows, slots]: the list of kept[j] in order
    int32_t* dropped;        // [rows, tokens]
    int32_t* order;          // [rows, tokens]: dropped tokens by the kept one they go to
    float* scale;            // [rows, tokens], metric_scale()
    float* inverse;          // [rows, tokens], inverse_length()
    int32_t* kept;           // [rows, slots]
    int32_t* dropped_count;  // [rows]

    __host__ __device__ explicit MergeWorkspace(const MergeTokensParams& params) {
        const int64_t all = params.rows * params.tokens;
        best = reinterpret_cast<unsigned long long*>(params.workspace);
        span = reinterpret_cast<ListSpan*>(best + all);
        dropped = reinterpret_cast<int32_t*>(span + params.rows * params.slots);
        order = dropped + all;
        scale = reinterpret_cast<float*>(order + all);
        inverse = scale + all;
        kept = reinterpret_cast<int32_t*>(inverse + all);
        dropped_count = kept + params.rows * params.slots;
    }
};

// Entries of index that the row has; a bad count is none.
__device__ __forceinline__ int32_t merge_count(const MergeTokensParams& params, int64_t row) {
    const int32_t count = params.count[row * params.count_stride];
    return count < 0 || count > params.slots ? 0 : count;
}

struct PrepareShared {
    uint32_t ranks[kPrepareWarps];
    int32_t maxima[kPrepareWarps];
};

// The highest value of the threads before this one, or `before`; total gets that of the block.
__device__ __forceinline__ int32_t exclusive_max(int32_t value, int32_t before, int32_t* scratch,
                                                 int32_t* total) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    int32_t inclusive = value;
    for (int step = 1; step < kWarpThreads; step *= 2) {
        const int32_t other = __shfl_up_sync(kFullWarp, inclusive, step);
        if (lane >= step) inclusive = max(inclusive, other);
    }
    const int32_t previous = __shfl_up_sync(kFullWarp, inclusive, 1);
    if (lane == kWarpThreads - 1) scratch[warp] = inclusive;
    __syncthreads();
    int32_t highest = before;
    int32_t result = before;
    for (int w = 0; w < kPrepareWarps; ++w) {
        if (w == warp) result = highest;
        highest = max(highest, scratch[w]);
    }
    __syncthreads();
    *total = highest;
    return lane == 0 ? result : max(result, previous);
}

__device__ inline void list_tokens(const MergeTokensParams& params, int64_t row,
                                   PrepareShared& shared) {
    const MergeWorkspace workspace(params);
    const int64_t tokens = params.tokens;
    const int32_t* index = params.index + row * params.index_stride;
    const int32_t* group = params.group + row * params.group_stride;
    const float* weight = params.weight + row * params.weight_stride;
    int32_t* kept = workspace.kept + row * params.slots;
    int32_t* dropped = workspace.dropped + row * tokens;
    int32_t* target = params.target != nullptr ? params.target + row * tokens : nullptr;
    const int32_t count = merge_count(params, row);
    if (threadIdx.x == 0 && count != params.count[row * params.count_stride]) {
        report_device_error(params.error, kErrorCount);
    }

    constexpr int32_t kDropped = 0;
    constexpr int32_t kKept = 1;
    for (int64_t t = threadIdx.x; t < tokens; t += kPrepareThreads) {
        dropped[t] = kDropped;  // what becomes of it, until the list is made
        workspace.best[row * tokens + t] = 0;
        if (target != nullptr) target[t] = -1;
        if (!is_weight(weight[t])) report_device_error(params.error, kErrorWeight);
    }
    __syncthreads();
    int32_t highest = -1;
    for (int64_t tile = 0; tile < count; tile += kPrepareThreads) {
        const int64_t j = tile + threadIdx.x;
        int32_t token = -1;
        if (j < count) {
            token = index[j];
            if (token < 0 || token >= tokens) {
                report_device_error(params.error, kErrorIndexRange);
                token = -1;
            }
        }
        const int32_t before = exclusive_max(token, highest, shared.maxima, &highest);
        if (token >= 0 && token <= before) {
            report_device_error(params.error, kErrorIndexOrder);
            token = -1;
        }
        if (j < count) kept[j] = token;
        if (token >= 0) {
            dropped[token] = kKept;
            if (target != nullptr) target[token] = static_cast<int32_t>(j);
        }
    }
    __syncthreads();
    int32_t listed = 0;
    for (int64_t tile = 0; tile < tokens; tile += kPrepareThreads) {
        const int64_t t = tile + threadIdx.x;
        const bool drops = t < tokens && dropped[t] == kDropped && group[t] >= 0;
        uint32_t here;
        const uint32_t rank = block_rank<kPrepareThreads>(drops, shared.ranks, &here);
        // Never beyond this tile, whose marks have been read.
        if (drops) dropped[listed + rank] = static_cast<int32_t>(t);
        listed += static_cast<int32_t>(here);
    }
    if (threadIdx.x == 0) workspace.dropped_count[row] = listed;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kPrepareThreads)
    merge_prepare_kernel(const __grid_constant__ MergeTokensParams params,
                         uint32_t blocks_per_row) {
    const int64_t row = blockIdx.x / blocks_per_row;
    const uint32_t block = blockIdx.x % blocks_per_row;
    if (block == 0) {
        list_tokens(params, row, *shared_memory<PrepareShared>());
        return;
    }
    const int64_t token =
        static_cast<int64_t>(block - 1) * kPrepareWarps + threadIdx.x / kWarpThreads;
    if (token >= params.tokens) return;
    const T* vector = static_cast<const T*>(params.metric) + row * params.metric_row_stride +
                      token * params.metric_token_stride;
    const VectorMeasure measure = measure_vector<kVector>(vector, params.metric_width);
    if (threadIdx.x % kWarpThreads != 0) return;
    const MergeWorkspace workspace(params);
    workspace.scale[row * params.tokens + token] = measure.scale;
    workspace.inverse[row * params.tokens + token] = measure.inverse;
}

}  // namespace lightvlm
