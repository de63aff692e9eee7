// importance: what each target gets from the probes, without a matrix of them. Probes, targets and
// slots: importance.h. This file: 32-bit vectors, on the CUDA cores; 16-bit ones: see
// importance_tensor.cuh.
//
// Formula   p[probe, target] = exp(scale * <probe, target> - lse[probe]) where the probe sees the
//           target; score[target] = fold of p over the probes of a head, then over heads.
// Launches  plan     (row_pos) one block a batch row: which probe rows count, in order
//           lse      (own softmax) one block for 64 probes x 512 targets: maximum and sum
//           merge    (own softmax) one thread a probe: joins the splits in order
//           fold     one block for 64 targets of a key head: recomputes p, folds it over the
//                    probes of all heads of its group; writes group_scores
//           heads    one thread a target: folds the groups, divides; counts who sees the key
// Order     Rows that do not count are dropped and targets counted from the first key on, so sums
//           run in an order that padding does not change; no atomics but on the error word.
// Shared    26 KiB (importance_product.cuh).
// Bound     FLOPs: 2 * W * N * Hq * D, twice for an own softmax, at the rate of the CUDA cores; the
//           vectors of a tile are read once for each tile of the other side.
#pragma once

#include "importance/importance_product.cuh"
#include "importance/importance_view.cuh"
#include "importance/importance_write.cuh"

namespace lightvlm {

// Parts [first_part, first_part + work.parts) of every slot, half a part a block.
template <typename T>
__global__ void __launch_bounds__(ImportanceProduct<T>::kThreads)
    importance_lse_kernel(const __grid_constant__ ImportanceArguments arguments,
                          int64_t first_part) {
    using Product = ImportanceProduct<T>;
    constexpr int kHalves = kImportancePart / kImportanceTile;
    auto& shared = *shared_memory<typename Product::Shared>();
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t slot_index = blockIdx.x / (kHalves * work.parts);  // over the batch
    const int64_t tile = blockIdx.x - slot_index * kHalves * work.parts;
    const int64_t heads = params.query_heads / params.slots();
    const int64_t b = slot_index / params.slots();
    ImportanceRows rows(params, b);
    rows.take_list(work, b);
    const ImportanceSlot<T> slot(arguments, rows, b, (slot_index - b * params.slots()) * heads,
                                 heads);
    const int64_t first_probe = first_part * kImportancePart + tile * kImportanceTile;
    const int64_t first_target = blockIdx.y * kImportanceSplit;
    if (first_probe >= slot.probes || first_target >= slot.targets) return;
    const int64_t past = first_target + kImportanceSplit;
    const int64_t last_target = past < slot.targets ? past : slot.targets;
    const float scale = importance_scale(params);

    int32_t limit[Product::kThreadProbes];
    float highest[Product::kThreadProbes];
    float sum[Product::kThreadProbes];
    for (int k = 0; k < Product::kThreadProbes; ++k) {
        limit[k] = slot.limit(static_cast<int32_t>(first_probe) + Product::probe(k));
        highest[k] = -CUDART_INF_F;
        sum[k] = 0.0f;
    }
    Product product;
    for (int64_t t = first_target; t < last_target; t += kImportanceTile) {
        product.multiply(slot, t, first_probe, shared);
        for (int i = 0; i < Product::kThreadTargets; ++i) {
            const int64_t target = t + Product::target(i);
            const int32_t threshold = slot.threshold(static_cast<int32_t>(target));
            for (int k = 0; k < Product::kThreadProbes; ++k) {
                if (target >= last_target || limit[k] < threshold) continue;
                const float logit = __fmul_rn(product.value[i][k], scale);
                // A logit of -inf adds nothing, and -inf - -inf would be NaN.
                if (logit == -CUDART_INF_F) continue;
                const float most = nan_maximum(logit, highest[k]);
                sum[k] = sum[k] * exp2f(highest[k] - most) + exp2f(logit - most);
                highest[k] = most;
            }
        }
    }
    float merged_highest;
    float merged_sum;
    Product::merge_targets(highest, sum, shared, &merged_highest, &merged_sum);
    if (threadIdx.x < kImportanceTile) {
        const int64_t part = slot_index * work.parts + tile / kHalves;
        const int64_t at = (part * work.splits + blockIdx.y) * kImportancePart +
                           tile % kHalves * kImportanceTile + threadIdx.x;
        work.part_highest[at] = merged_highest;
        work.part_sum[at] = merged_sum;
    }
}

template <typename T>
__global__ void __launch_bounds__(ImportanceProduct<T>::kThreads)
    importance_fold_kernel(const __grid_constant__ ImportanceArguments arguments) {
    using Product = ImportanceProduct<T>;
    auto& shared = *shared_memory<typename Product::Shared>();
    const ImportanceParams& params = arguments.params;
    const int64_t tiles = (params.targets() + kImportanceTile - 1) / kImportanceTile;
    const int64_t group_index = blockIdx.x / tiles;  // over the batch
    const auto first_target =
        static_cast<int32_t>((blockIdx.x - group_index * tiles) * kImportanceTile);
    const int64_t b = group_index / params.key_heads;
    const int64_t first_head = (group_index - b * params.key_heads) * params.group();
    const int64_t heads = params.folds_each_head() ? 1 : params.group();
    const bool max_probes = params.max_over_probes();
    const bool max_heads = params.max_over_heads();
    const float scale = importance_scale(params);
    ImportanceRows rows(params, b);
    rows.take_list(arguments.workspace, b);

    float score[Product::kThreadTargets];
    for (int64_t head = 0; head < params.group(); head += heads) {
        ImportanceSlot<T> slot(arguments, rows, b, first_head + head, heads);
        if (first_target >= slot.targets) return;
        slot.skip_rows_before(first_target);
        float folded[Product::kThreadTargets] = {};
        Product product;
        for (int32_t first = 0; first < slot.probes; first += kImportanceTile) {
            product.multiply(slot, first_target, first, shared);
            LIGHTVLM_UNROLL
            for (int k = 0; k < Product::kThreadProbes; ++k) {
                const int32_t probe = first + Product::probe(k);
                const int32_t limit = slot.limit(probe);
                if (limit == ImportanceSlot<T>::kSeesNothing) continue;
                float shift;
                float factor;
                if (!slot.normaliser(probe, &shift, &factor)) continue;
                for (int i = 0; i < Product::kThreadTargets; ++i) {
                    if (limit < slot.threshold(first_target + Product::target(i))) continue;
                    const float logit = __fmul_rn(product.value[i][k], scale);
                    folded[i] = fold_pair(max_probes, folded[i], exp2f(logit - shift) * factor);
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

}  // namespace lightvlm
