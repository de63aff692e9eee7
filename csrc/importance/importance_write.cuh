// The kernels of importance around the products: which rows count, joined splits, scores.
#pragma once

#include "common/block.cuh"
#include "common/device_error.cuh"
#include "common/launch.h"
#include "importance/importance_view.cuh"

namespace lightvlm {

constexpr int kImportancePlanThreads = 256;

// As torch's max: a NaN wins.
__device__ __forceinline__ float nan_maximum(float a, float b) { return a > b || a != a ? a : b; }

__device__ __forceinline__ float fold_pair(bool use_max, float a, float b) {
    return use_max ? nan_maximum(a, b) : a + b;
}

struct ImportancePlanShared {
    uint32_t scratch[kImportancePlanThreads / kWarpThreads];
};

// One block a batch row; only where there is a row_pos.
__global__ void __launch_bounds__(kImportancePlanThreads)
    importance_plan_kernel(const __grid_constant__ ImportanceArguments arguments) {
    auto& shared = *shared_memory<ImportancePlanShared>();
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t b = blockIdx.x;
    const ImportanceRows bounds(params, b);
    const int32_t used = list_importance_rows<kImportancePlanThreads>(
        params, b, bounds, shared.scratch, work.rows + b * params.window,
        work.positions + b * params.window);
    if (threadIdx.x == 0) work.used[b] = used;
}

// Parts [first, first + work.parts) of every slot, one thread a probe: joins the splits, in order.
__global__ void __launch_bounds__(kImportancePart)
    importance_merge_kernel(const __grid_constant__ ImportanceArguments arguments, int64_t first) {
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t slot_index = blockIdx.x / work.parts;
    const int64_t part = blockIdx.x - slot_index * work.parts;
    const int64_t b = slot_index / params.slots();
    ImportanceRows rows(params, b);
    rows.take_list(work, b);
    const bool by_key = params.axis == ScoreAxis::kKey;
    const int64_t probes = by_key ? params.group() * rows.used : rows.keys();
    const int64_t targets = by_key ? rows.keys() : rows.used;
    const int64_t probe = (first + part) * kImportancePart + threadIdx.x;
    if (probe >= probes) return;

    const int64_t splits = (targets + kImportanceSplit - 1) / kImportanceSplit;
    const int64_t at =
        (slot_index * work.parts + part) * work.splits * kImportancePart + threadIdx.x;
    float shift;
    float inverse;
    join_splits(work, at, static_cast<int32_t>(splits), &shift, &inverse);
    work.highest[slot_index * params.probes() + probe] = shift;
    work.inverse[slot_index * params.probes() + probe] = inverse;
}

// What a key's folded masses are divided by.
__device__ __forceinline__ float score_divisor(const ImportanceParams& params, int32_t visible) {
    const bool mean = params.rows == RowsOp::kMean && visible > 1;
    return params.head_divisor() * (mean ? static_cast<float>(visible) : 1.0f);
}

// One thread a key, and for axis "query" then one a probe row: folds the groups, divides, counts.
__global__ void __launch_bounds__(kImportancePlanThreads)
    importance_heads_kernel(const __grid_constant__ ImportanceArguments arguments) {
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const bool by_key = params.axis == ScoreAxis::kKey;
    const int64_t each = params.tokens + (by_key ? 0 : params.window);
    const int64_t element = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= params.batch * each) return;
    const int64_t b = element / each;
    const int64_t at = element - b * each;
    ImportanceRows rows(params, b);
    if (at == 0 && !rows.valid) report_device_error(params.error, kErrorLens);
    const float* groups = work.group_scores + b * params.key_heads * params.targets();
    if (at < params.tokens) {
        const int32_t visible = visible_rows(params, b, rows, at);
        params.visible[b * params.tokens + at] = visible;
        if (!by_key) return;
        const bool inside = at >= rows.begin && at < rows.end;
        const float divisor = score_divisor(params, visible);
        float score = 0.0f;
        for (int64_t head = 0; head < params.key_heads; ++head) {
            const float one = inside ? groups[head * params.tokens + at - rows.begin] : 0.0f;
            if (params.heads == HeadsOp::kNone) {
                params.score[(b * params.key_heads + head) * params.tokens + at] = one / divisor;
            } else {
                score = head == 0 ? one : fold_pair(params.max_over_heads(), score, one);
            }
        }
        if (params.heads != HeadsOp::kNone) params.score[b * params.tokens + at] = score / divisor;
        return;
    }
    // Row w gets its score where it counts: where it stands in the list, or after those before it.
    const auto w = static_cast<int32_t>(at - params.tokens);
    rows.take_list(work, b);
    int32_t u = w - (rows.window - rows.used);
    if (rows.rows != nullptr) {
        u = -1;
        int32_t low = 0;
        int32_t high = rows.used;
        while (low < high) {
            const int32_t middle = low + (high - low) / 2;
            if (rows.rows[middle] < w) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        if (low < rows.used && rows.rows[low] == w) u = low;
    }
    float score = 0.0f;
    for (int64_t head = 0; u >= 0 && head < params.key_heads; ++head) {
        score += groups[head * params.window + u];
    }
    params.score[b * params.window + w] = score;
}

}  // namespace lightvlm
