// importance: what each target gets from the probes, without a matrix of them. Probes, targets and
// slots: importance.h.
//
// Formula   p[probe, target] = exp(scale * <probe, target> - lse[probe]) where the probe sees the
//           target; score[target] = fold of p over the probes of a head, then over heads.
// Launches  plan     one block a batch row: which probe rows count, in order
//           visible  one thread a key: how many of them see it
//           lse      (own softmax) one block for 64 probes x 512 targets: maximum and sum
//           merge    (own softmax) one thread a probe: joins the splits in order
//           fold     one block for 64 targets of a key head: recomputes p, folds it over the
//                    probes of all heads of its group; writes group_scores
//           heads    one thread a target: folds the groups, divides
// Order     Rows that do not count are dropped and targets counted from the first key on, so sums
//           run in an order that padding does not change; no atomics but on the error word.
// Shared    26 KiB (importance_product.cuh).
// Bound     FLOPs: 2 * W * N * Hq * D, twice for an own softmax. This product runs on the CUDA
//           cores; the vectors of a tile are read once for each tile of the other side.
#pragma once

#include "common/block.cuh"
#include "common/device_error.cuh"
#include "common/launch.h"
#include "importance/importance_product.cuh"
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

__global__ void __launch_bounds__(kImportancePlanThreads)
    importance_plan_kernel(const __grid_constant__ ImportanceArguments arguments) {
    auto& shared = *shared_memory<ImportancePlanShared>();
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t b = blockIdx.x;
    int64_t begin = params.leftpad != nullptr ? params.leftpad[b] : 0;
    int64_t end = params.lens != nullptr ? params.lens[b] : params.tokens;
    const bool valid = 0 <= begin && begin <= end && end <= params.tokens;
    if (!valid) {
        if (threadIdx.x == 0) report_device_error(params.error, kErrorLens);
        begin = end = 0;
    }
    int64_t used = 0;
    for (int64_t tile = 0; tile < params.window; tile += kImportancePlanThreads) {
        const int64_t w = tile + threadIdx.x;
        int64_t position = -1;
        if (valid && w < params.window) {
            position = params.row_pos != nullptr ? params.row_pos[b * params.row_pos_stride + w]
                                                 : end - params.window + w;
        }
        const bool counts = position >= begin;
        uint32_t counted;
        const int64_t at =
            used + block_rank<kImportancePlanThreads>(counts, shared.scratch, &counted);
        if (counts) {
            work.rows[b * params.window + at] = static_cast<int32_t>(w);
            work.positions[b * params.window + at] = static_cast<int32_t>(position);
        }
        used += counted;
        // Rows that do not count get 0; the others are written by the last kernel.
        if (params.axis == ScoreAxis::kQuery && w < params.window) {
            params.score[b * params.window + w] = 0.0f;
        }
    }
    if (threadIdx.x == 0) {
        work.used[b] = static_cast<int32_t>(used);
        work.begin[b] = static_cast<int32_t>(begin);
        work.end[b] = static_cast<int32_t>(end);
    }
}

__global__ void __launch_bounds__(kImportancePlanThreads)
    importance_visible_kernel(const __grid_constant__ ImportanceArguments arguments) {
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t element = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= params.batch * params.tokens) return;
    const int64_t b = element / params.tokens;
    const int64_t j = element - b * params.tokens;
    int32_t count = 0;
    if (j >= work.begin[b] && j < work.end[b]) {
        const int32_t used = work.used[b];
        const int32_t* positions = work.positions + b * params.window;
        for (int32_t u = 0; params.causal && u < used; ++u) count += positions[u] >= j ? 1 : 0;
        if (!params.causal) count = used;
    }
    params.visible[element] = count;
}

// Probe tiles [first_tile, first_tile + part_tiles) of every slot.
template <typename T>
__global__ void __launch_bounds__(ImportanceProduct<T>::kThreads)
    importance_lse_kernel(const __grid_constant__ ImportanceArguments arguments,
                          int64_t first_tile) {
    using Product = ImportanceProduct<T>;
    auto& shared = *shared_memory<typename Product::Shared>();
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t slot_index = blockIdx.x / work.part_tiles;  // over the batch
    const int64_t tile = blockIdx.x - slot_index * work.part_tiles;
    const int64_t split = blockIdx.y;
    const int64_t heads = params.query_heads / params.slots();
    const int64_t b = slot_index / params.slots();
    const ImportanceSlot<T> slot(arguments, b, (slot_index - b * params.slots()) * heads, heads);
    const int64_t first_probe = (first_tile + tile) * kImportanceTile;
    const int64_t first_target = split * kImportanceSplit;
    if (first_probe >= slot.probes || first_target >= slot.targets) return;
    const int64_t past = first_target + kImportanceSplit;
    const int64_t last_target = past < slot.targets ? past : slot.targets;

    int32_t limit[Product::kThreadProbes];
    float highest[Product::kThreadProbes];
    float sum[Product::kThreadProbes];
    for (int k = 0; k < Product::kThreadProbes; ++k) {
        limit[k] = slot.limit(first_probe + Product::probe(k));
        highest[k] = -CUDART_INF_F;
        sum[k] = 0.0f;
    }
    Product product;
    for (int64_t t = first_target; t < last_target; t += kImportanceTile) {
        product.multiply(slot, t, first_probe, shared);
        for (int i = 0; i < Product::kThreadTargets; ++i) {
            const int64_t target = t + Product::target(i);
            const int32_t threshold = slot.threshold(target);
            for (int k = 0; k < Product::kThreadProbes; ++k) {
                if (target >= last_target || limit[k] < threshold) continue;
                const float logit = product.value[i][k] * params.scale;
                // A logit of -inf adds nothing, and -inf - -inf would be NaN.
                if (logit == -CUDART_INF_F) continue;
                const float most = nan_maximum(logit, highest[k]);
                sum[k] = sum[k] * expf(highest[k] - most) + expf(logit - most);
                highest[k] = most;
            }
        }
    }
    float merged_highest;
    float merged_sum;
    Product::merge_targets(highest, sum, shared, &merged_highest, &merged_sum);
    if (threadIdx.x < kImportanceTile) {
        const int64_t part =
            ((slot_index * work.part_tiles + tile) * work.splits + split) * kImportanceTile +
            threadIdx.x;
        work.part_highest[part] = merged_highest;
        work.part_sum[part] = merged_sum;
    }
}

__global__ void __launch_bounds__(kImportanceTile)
    importance_merge_kernel(const __grid_constant__ ImportanceArguments arguments,
                            int64_t first_tile) {
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t slot_index = blockIdx.x / work.part_tiles;
    const int64_t tile = blockIdx.x - slot_index * work.part_tiles;
    const int64_t b = slot_index / params.slots();
    const int64_t used = work.used[b];
    const int64_t keys = work.end[b] - work.begin[b];
    const bool by_key = params.axis == ScoreAxis::kKey;
    const int64_t probes = by_key ? params.group() * used : keys;
    const int64_t targets = by_key ? keys : used;
    const int64_t probe = (first_tile + tile) * kImportanceTile + threadIdx.x;
    if (probe >= probes) return;

    const int64_t splits = (targets + kImportanceSplit - 1) / kImportanceSplit;
    const int64_t first =
        (slot_index * work.part_tiles + tile) * work.splits * kImportanceTile + threadIdx.x;
    float highest = -CUDART_INF_F;
    for (int64_t s = 0; s < splits; ++s) {
        highest = fmaxf(highest, work.part_highest[first + s * kImportanceTile]);
    }
    float sum = 0.0f;
    const float shift = highest > -CUDART_INF_F ? highest : 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
        const int64_t part = first + s * kImportanceTile;
        sum += work.part_sum[part] * expf(work.part_highest[part] - shift);
    }
    work.highest[slot_index * params.probes() + probe] = shift;
    work.inverse[slot_index * params.probes() + probe] = sum != 0.0f ? 1.0f / sum : 0.0f;
}

template <typename T>
__global__ void __launch_bounds__(ImportanceProduct<T>::kThreads)
    importance_fold_kernel(const __grid_constant__ ImportanceArguments arguments) {
    using Product = ImportanceProduct<T>;
    auto& shared = *shared_memory<typename Product::Shared>();
    const ImportanceParams& params = arguments.params;
    const int64_t tiles = (params.targets() + kImportanceTile - 1) / kImportanceTile;
    const int64_t group_index = blockIdx.x / tiles;  // over the batch
    const int64_t first_target = (blockIdx.x - group_index * tiles) * kImportanceTile;
    const int64_t b = group_index / params.key_heads;
    const int64_t first_head = (group_index - b * params.key_heads) * params.group();
    const int64_t heads = params.folds_each_head() ? 1 : params.group();
    const bool max_probes = params.max_over_probes();
    const bool max_heads = params.max_over_heads();

    float score[Product::kThreadTargets];
    for (int64_t head = 0; head < params.group(); head += heads) {
        const ImportanceSlot<T> slot(arguments, b, first_head + head, heads);
        if (first_target >= slot.targets) return;
        float folded[Product::kThreadTargets] = {};
        Product product;
        for (int64_t first_probe = 0; first_probe < slot.probes; first_probe += kImportanceTile) {
            product.multiply(slot, first_target, first_probe, shared);
            for (int k = 0; k < Product::kThreadProbes; ++k) {
                const int64_t probe = first_probe + Product::probe(k);
                int32_t limit = slot.limit(probe);
                if (limit == ImportanceSlot<T>::kSeesNothing) continue;
                const float shift =
                    slot.lse != nullptr ? slot.given_lse(probe) : slot.highest[probe];
                const float factor = slot.lse != nullptr ? 1.0f : slot.inverse[probe];
                // The row saw nothing.
                if (slot.lse != nullptr && shift == -CUDART_INF_F) continue;
                for (int i = 0; i < Product::kThreadTargets; ++i) {
                    if (limit < slot.threshold(first_target + Product::target(i))) continue;
                    const float mass = expf(product.value[i][k] * params.scale - shift) * factor;
                    folded[i] = fold_pair(max_probes, folded[i], mass);
                }
            }
        }
        for (int i = 0; i < Product::kThreadTargets; ++i) {
            const float all = Product::fold_probes(folded[i], [max_probes](float a, float other) {
                return fold_pair(max_probes, a, other);
            });
            score[i] = head == 0 ? all : fold_pair(max_heads, score[i], all);
        }
    }
    if (!Product::owns_targets()) return;
    float* out = arguments.workspace.group_scores + group_index * params.targets();
    for (int i = 0; i < Product::kThreadTargets; ++i) {
        const int64_t target = first_target + Product::target(i);
        if (target < params.targets()) out[target] = score[i];
    }
}

__global__ void __launch_bounds__(kImportancePlanThreads)
    importance_heads_kernel(const __grid_constant__ ImportanceArguments arguments) {
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t element = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= params.batch * params.targets()) return;
    const int64_t b = element / params.targets();
    const int64_t at = element - b * params.targets();
    const float* groups = work.group_scores + b * params.key_heads * params.targets();
    if (params.axis == ScoreAxis::kQuery) {
        if (at >= work.used[b]) return;
        float score = 0.0f;
        for (int64_t head = 0; head < params.key_heads; ++head) {
            score += groups[head * params.targets() + at];
        }
        params.score[b * params.window + work.rows[b * params.window + at]] = score;
        return;
    }
    const int64_t target = at - work.begin[b];
    const bool inside = at >= work.begin[b] && at < work.end[b];
    const int32_t rows = params.visible[element];
    const float divisor =
        params.head_divisor() *
        (params.rows == RowsOp::kMean && rows > 1 ? static_cast<float>(rows) : 1.0f);
    const bool each = params.heads == HeadsOp::kNone;
    float score = 0.0f;
    for (int64_t head = 0; head < params.key_heads; ++head) {
        const float one = inside ? groups[head * params.targets() + target] : 0.0f;
        if (each) {
            params.score[(b * params.key_heads + head) * params.tokens + at] = one / divisor;
        } else {
            score = head == 0 ? one : fold_pair(params.max_over_heads(), score, one);
        }
    }
    if (!each) params.score[element] = score / divisor;
}

}  // namespace lightvlm
