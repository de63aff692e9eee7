// Own softmax of importance on tensor cores: maximum and sum of exponentials of 128 probes over 512
// targets a block, in units of log 2. The probes are stationary (importance_tensor_tile.cuh): a
// thread keeps both for its 4 probes, and the 4 lanes that share them join at the end.
#pragma once

#include "importance/importance_tensor_rows.cuh"

namespace lightvlm {

template <typename T, int kWidth>
__global__ void __launch_bounds__(kTensorThreads, kTensorBlocks<kWidth>)
    importance_tensor_lse_kernel(const __grid_constant__ ImportanceArguments arguments,
                                 int64_t first_part, bool even, bool planned) {
    using Tile = TensorTile<T, kWidth>;
    auto& shared = *shared_memory<TensorKernelShared<T, kWidth>>();
    const ImportanceParams& params = arguments.params;
    const ImportanceWorkspace& work = arguments.workspace;
    const int64_t slot_index = blockIdx.x / work.parts;  // over the batch
    const int64_t part = blockIdx.x - slot_index * work.parts;
    const int64_t heads = params.query_heads / params.slots();
    const int64_t b = slot_index / params.slots();
    const ImportanceRows& rows = take_rows(arguments, b, planned, shared);
    const ImportanceSlot<T>& slot =
        shared.slot.set(arguments, rows, b, (slot_index - b * params.slots()) * heads, heads, 0);
    // The merge kernel asks for no more than how many they are.
    const bool first_block = part == 0 && blockIdx.y == 0 && slot_index == b * params.slots();
    if (work.used != nullptr && first_block && threadIdx.x == 0) work.used[b] = rows.used;
    const int64_t past_probes = (first_part + part) * kImportancePart;
    if (past_probes >= slot.probes || blockIdx.y * kImportanceSplit >= slot.targets) return;
    const auto first_probe = static_cast<int32_t>(past_probes);
    const auto first_target = static_cast<int32_t>(blockIdx.y * kImportanceSplit);
    const int32_t left = slot.targets - first_target;
    const int32_t targets = left < kImportanceSplit ? left : kImportanceSplit;
    const float scale = importance_scale(params);

    const int thread = static_cast<int>(threadIdx.x);
    shared.tile.stationary[thread] =
        first_probe + thread < slot.probes ? slot.probe(first_probe + thread) : nullptr;
    int32_t limit[kThreadRows];
    float highest[kThreadRows];
    float sum[kThreadRows];
    int32_t least = INT32_MAX;
    int32_t most = INT32_MIN;
    for (int i = 0; i < kThreadRows; ++i) {
        limit[i] = slot.limit(first_probe + Tile::row(i));
        least = limit[i] < least ? limit[i] : least;
        most = limit[i] > most ? limit[i] : most;
        highest[i] = -CUDART_INF_F;
        sum[i] = 0.0f;
    }
    least = __reduce_min_sync(kFullWarp, least);
    most = __reduce_max_sync(kFullWarp, most);
    __syncthreads();
    Tile tile(params, even, shared.tile);
    tile.keep_stationary();

    const auto fill = [&](int t, StreamedTile<T>& known) {
        const int at = thread % kStreamed;
        const int32_t target = t * kStreamed + at;
        const bool inside = target < targets;
        // No probe sees what is past the end.
        const int32_t level = inside ? slot.threshold(first_target + target) : INT32_MAX;
        known.vector[at] = inside ? slot.target(first_target + target) : nullptr;
        known.level[at] = level;
        if (at == 0) known.count = targets - t * kStreamed;
        Tile::bound_levels(known, level);
    };
    const auto use = [&](const StreamedTile<T>& known, int buffer) {
        const int32_t bottom = min(known.lowest[0], known.lowest[1]);
        const int32_t top = max(known.highest[0], known.highest[1]);
        if (most < bottom) return;
        const int columns = min(known.count, kStreamed);
        LIGHTVLM_KEEP_ROLLED
        for (int column = 0; column < columns; column += kColumnStep) {
            float product[2][2][4];
            tile.multiply(buffer, column, product);
            const int own = column + thread % 4 * 2;
            for (int r = 0; r < kThreadRows; ++r) {
                float logit[4];
                float peak = highest[r];
                for (int c = 0; c < 4; ++c) {
                    logit[c] = __fmul_rn(product[c / 2][r / 2][r % 2 * 2 + c % 2], scale);
                    if (least < top && limit[r] < known.level[own + c / 2 * 8 + c % 2]) {
                        logit[c] = -CUDART_INF_F;
                    }
                    // A NaN is not noticed here, but makes the sum one.
                    peak = fmaxf(peak, logit[c]);
                }
                const float shift = peak > -CUDART_INF_F ? peak : 0.0f;
                float more = 0.0f;
                for (int c = 0; c < 4; ++c) more += ptx::exp2_approximate(logit[c] - shift);
                sum[r] = sum[r] * ptx::exp2_approximate(highest[r] - shift) + more;
                highest[r] = peak;
            }
        }
    };
    tile.stream((targets + kStreamed - 1) / kStreamed, fill, use);

    const int64_t at =
        ((slot_index * work.parts + part) * work.splits + blockIdx.y) * kImportancePart;
    for (int r = 0; r < kThreadRows; ++r) {
        for (int step = 1; step < 4; step *= 2) {
            const float other = __shfl_xor_sync(kFullWarp, highest[r], step);
            const float other_sum = __shfl_xor_sync(kFullWarp, sum[r], step);
            const float peak = fmaxf(highest[r], other);
            const float shift = peak > -CUDART_INF_F ? peak : 0.0f;
            sum[r] = sum[r] * exp2f(highest[r] - shift) + other_sum * exp2f(other - shift);
            highest[r] = peak;
        }
        if (thread % 4 == 0) {
            work.part_highest[at + Tile::row(r)] = highest[r];
            work.part_sum[at + Tile::row(r)] = sum[r];
        }
    }
}

}  // namespace lightvlm
