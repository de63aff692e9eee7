// importance of 16-bit vectors, on tensor cores. Formula and order of sums: importance.cuh.
//
// Launches  plan   (row_pos with axis "query", or with more than kListedRows rows) as there
//           lse    (own softmax) one block for 128 probes x 512 targets: maximum and sum
//           merge  (own softmax of many probes or targets) as there; else the next one does it
//           fold   one block for 128 targets: folds p over the probes of all heads of a group, and
//                  over the key heads where there are enough blocks without these; then it divides
//                  by the rows that see the key, and is the last launch
//           heads  (few blocks) as there
// Owner     fold: the targets are stationary (importance_tensor_tile.cuh), so each vector of K is
//           read once, and a thread adds up its 4 targets' masses in registers; the 4 lanes that
//           share targets are added at the end. lse: the probes are stationary, with a running
//           maximum and sum for each.
// Shared    27, 35, 43 or 75 KiB for widths up to 64, 96, 128 or 256, of which 4 are listed rows.
// Bound     Tensor cores: 2 * W * N * Hq * D FLOPs, twice for an own softmax; bytes of K below W of
//           20 or so. One exponential an element is 63 % of that at D = 128.
#pragma once

#include "importance/importance_tensor_lse.cuh"
#include "importance/importance_tensor_rows.cuh"
#include "importance/importance_write.cuh"

namespace lightvlm {

// A tile's masses, added to (or their maximum taken with) what each of the thread's targets has.
template <bool kMasked, bool kMax, typename T, int kWidth>
__device__ __forceinline__ void fold_streamed(const TensorTile<T, kWidth>& tile,
                                              const StreamedTile<T>& known, int buffer, float scale,
                                              const int32_t (&threshold)[kThreadRows],
                                              float (&mass)[kThreadRows]) {
    const int columns = min(known.count, kStreamed);
    LIGHTVLM_KEEP_ROLLED
    for (int column = 0; column < columns; column += kColumnStep) {
        float product[2][2][4];
        tile.multiply(buffer, column, product);
        const int own = column + static_cast<int>(threadIdx.x) % 4 * 2;
        for (int c = 0; c < 4; ++c) {
            const int at = own + c / 2 * 8 + c % 2;
            const float shift = known.shift[at];
            const float factor = known.factor[at];
            const int32_t limit = kMasked ? known.level[at] : 0;
            for (int r = 0; r < kThreadRows; ++r) {
                if (kMasked && limit < threshold[r]) continue;
                const float logit = __fmul_rn(product[c / 2][r / 2][r % 2 * 2 + c % 2], scale);
                const float value = ptx::exp2_approximate(logit - shift);
                if constexpr (kMax) {
                    mass[r] = nan_maximum(mass[r], value * factor);
                } else {
                    mass[r] = fmaf(value, factor, mass[r]);
                }
            }
        }
    }
}

// Writes the scores of a tile's keys, and of those of its numbers that lie outside [begin, end).
__device__ __forceinline__ void write_tile_scores(const ImportanceParams& params,
                                                  const ImportanceRows& rows, int64_t b,
                                                  int64_t head, int32_t first,
                                                  const int (&place)[kThreadRows],
                                                  const float (&score)[kThreadRows]) {
    const bool each = params.heads == HeadsOp::kNone;
    float* out = params.score + (each ? b * params.key_heads + head : b) * params.tokens;
    int32_t* visible = params.visible + b * params.tokens;
    for (int r = 0; r < kThreadRows; ++r) {
        const int32_t t = first + place[r];
        if (threadIdx.x % 4 != 0 || t >= rows.keys()) continue;
        const int64_t at = static_cast<int64_t>(rows.begin) + t;
        const int32_t count = visible_rows(params, b, rows, at);
        out[at] = score[r] / score_divisor(params, count);
        if (head == 0) visible[at] = count;
    }
    const int64_t at = static_cast<int64_t>(first) + threadIdx.x;
    if (at < params.tokens && (at < rows.begin || at >= rows.end)) {
        out[at] = 0.0f;
        if (head == 0) visible[at] = 0;
    }
}

// all_heads: a block takes every key head of its targets. direct: it writes the scores.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kTensorThreads, kTensorBlocks<kWidth>)
    importance_tensor_fold_kernel(const __grid_constant__ ImportanceArguments arguments, bool even,
                                  bool planned, bool all_heads, bool direct) {
    using Tile = TensorTile<T, kWidth>;
    auto& shared = *shared_memory<TensorKernelShared<T, kWidth>>();
    const ImportanceParams& params = arguments.params;
    const bool by_key = params.axis == ScoreAxis::kKey;
    const int64_t tiles = (params.targets() + kStationary - 1) / kStationary;
    const int64_t index = blockIdx.x / tiles;
    const auto first = static_cast<int32_t>((blockIdx.x - index * tiles) * kStationary);
    const int64_t key_heads = all_heads ? params.key_heads : 1;
    const int64_t b = all_heads ? index : index / params.key_heads;
    const int64_t first_key_head = all_heads ? 0 : index - b * params.key_heads;
    const int64_t heads = params.folds_each_head() ? 1 : params.group();
    const bool max_probes = params.max_over_probes();
    const bool max_heads = params.max_over_heads();
    const float scale = importance_scale(params);
    const int thread = static_cast<int>(threadIdx.x);
    const ImportanceRows& rows = take_rows(arguments, b, planned, shared);
    if (direct && !rows.valid && first == 0 && first_key_head == 0 && thread == 0) {
        report_device_error(params.error, kErrorLens);
    }
    int place[kThreadRows];
    for (int r = 0; r < kThreadRows; ++r) place[r] = Tile::row(r);

    float score[kThreadRows] = {};
    const int32_t targets = by_key ? rows.keys() : rows.used;
    const int64_t last_head = (first_key_head + key_heads) * params.group();
    Tile tile(params, even, shared.tile);
    for (int64_t head = first_key_head * params.group(); first < targets && head < last_head;
         head += heads) {
        const ImportanceSlot<T>& slot = shared.slot.set(arguments, rows, b, head, heads, first);
        int32_t threshold[kThreadRows];
        int32_t bottom = INT32_MAX;
        int32_t top = INT32_MIN;
        for (int r = 0; r < kThreadRows; ++r) {
            threshold[r] = slot.threshold(first + place[r]);
            bottom = threshold[r] < bottom ? threshold[r] : bottom;
            top = threshold[r] > top ? threshold[r] : top;
        }
        bottom = __reduce_min_sync(kFullWarp, bottom);
        top = __reduce_max_sync(kFullWarp, top);
        // The heads of a group share keys, not queries.
        if (!by_key || head % params.group() == 0) {
            const int32_t t = first + thread;
            shared.tile.stationary[thread] = t < targets ? slot.target(t) : nullptr;
            __syncthreads();
            tile.keep_stationary();
        }

        const auto fill = [&](int t, StreamedTile<T>& known) {
            const int at = thread % kStreamed;
            const int32_t p = t * kStreamed + at;
            float shift = 0.0f;
            float factor = 0.0f;
            int32_t limit = slot.limit(p);
            if (p < slot.probes && !slot.normaliser(p, &shift, &factor)) {
                limit = ImportanceSlot<T>::kSeesNothing;
            }
            known.vector[at] = p < slot.probes ? slot.probe(p) : nullptr;
            known.level[at] = limit;
            known.shift[at] = shift;
            known.factor[at] = factor;
            if (at == 0) known.count = slot.probes - t * kStreamed;
            Tile::bound_levels(known, limit);
        };
        float mass[kThreadRows] = {};
        const auto use = [&](const StreamedTile<T>& known, int buffer) {
            if (max(known.highest[0], known.highest[1]) < bottom) return;
            const bool masked = min(known.lowest[0], known.lowest[1]) < top;
            if (max_probes) {
                fold_streamed<true, true>(tile, known, buffer, scale, threshold, mass);
            } else if (masked) {
                fold_streamed<true, false>(tile, known, buffer, scale, threshold, mass);
            } else {
                fold_streamed<false, false>(tile, known, buffer, scale, threshold, mass);
            }
        };
        tile.stream((slot.probes + kStreamed - 1) / kStreamed, fill, use);
        for (int r = 0; r < kThreadRows; ++r) {
            for (int step = 1; step < 4; step *= 2) {
                mass[r] = fold_pair(max_probes, mass[r], __shfl_xor_sync(kFullWarp, mass[r], step));
            }
            const bool start = head == first_key_head * params.group();
            score[r] = start ? mass[r] : fold_pair(max_heads, score[r], mass[r]);
        }
    }
    if (direct) {
        write_tile_scores(params, rows, b, first_key_head, first, place, score);
        return;
    }
    if (thread % 4 != 0) return;
    float* out = arguments.workspace.group_scores + index * params.targets() + first;
    for (int r = 0; r < kThreadRows; ++r) {
        if (first + place[r] < params.targets()) out[place[r]] = score[r];
    }
}

}  // namespace lightvlm
