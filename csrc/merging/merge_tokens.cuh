// merge_tokens: each dropped token into the most similar kept one, in three launches without a
// host in between.
//
//   1. merge_prepare.cuh      lists of kept and dropped tokens, lengths of the metric vectors
//   2. merge_similarity.cuh   best[d] for each dropped token d
//   3. here                   the merged rows
//
// Formula   out(slot of c) = (w_c x_c + sum w_i x_i) / (w_c + sum w_i), over the d = i with best[d]
// = c Owner     A block owns one slot and a chunk of its columns; it finds the arriving tokens by a
// sweep
//           over best[], in ascending order, and adds them in that order. No atomics.
// Exact     Products and sums round to fp32 one by one (no fused multiply-add), as on the CPU.
// Shared    3 KiB: the tokens and weights of up to 256 arrivals; more take another sweep.
// Bound     Bytes: x is read once, out written once; each block sweeps 8 B x dropped from the L2.
#pragma once

#include "common/block.cuh"
#include "merging/merge_prepare.cuh"

namespace lightvlm {

constexpr int kMergeThreads = 128;
constexpr int kMergeArrivals = 256;

struct MergeShared {
    int32_t token[kMergeArrivals];
    float weight[kMergeArrivals];
    uint32_t ranks[kMergeThreads / kWarpThreads];
    uint32_t maxima[kMergeThreads / kWarpThreads];
};

struct Arrivals {
    int64_t count = 0;
    float highest = 0.0f;  // weight
};

// Lists arrivals [first, first + kMergeArrivals) at the kept token, counts all of them, and writes
// where they went.
__device__ inline Arrivals find_arrivals(const MergeTokensParams& params, int64_t row,
                                         int32_t token, int64_t first, int32_t* target,
                                         int32_t entry, MergeShared& shared) {
    const MergeWorkspace workspace(params);
    const unsigned long long* best = workspace.best + row * params.tokens;
    const int32_t* dropped = workspace.dropped + row * params.tokens;
    const float* weight = params.weight + row * params.weight_stride;
    const int32_t dropped_count = workspace.dropped_count[row];
    Arrivals arrivals;
    uint32_t highest = 0;
    for (int64_t tile = 0; tile < dropped_count; tile += kMergeThreads) {
        const int64_t d = tile + threadIdx.x;
        int32_t from = -1;
        float share = 0.0f;
        // 0, where nothing was near, stands for no token.
        if (d < dropped_count && static_cast<uint32_t>(best[d]) == ~static_cast<uint32_t>(token)) {
            from = dropped[d];
            share = is_weight(weight[from]) ? weight[from] : 0.0f;
            if (target != nullptr) target[from] = entry;
        }
        uint32_t here;
        const int64_t at =
            arrivals.count + block_rank<kMergeThreads>(share > 0.0f, shared.ranks, &here) - first;
        if (share > 0.0f && at >= 0 && at < kMergeArrivals) {
            shared.token[at] = from;
            shared.weight[at] = share;
        }
        // Floats that are not negative order as their bits do.
        highest = max(highest, __float_as_uint(share));
        arrivals.count += here;
    }
    highest = block_reduce<kMergeThreads>(highest, shared.maxima,
                                          [](uint32_t a, uint32_t b) { return max(a, b); });
    arrivals.highest = __uint_as_float(highest);
    return arrivals;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kMergeThreads)
    merge_rows_kernel(const __grid_constant__ MergeTokensParams params, int64_t chunks) {
    auto& shared = *shared_memory<MergeShared>();
    const int64_t chunk = blockIdx.x % chunks;
    const int64_t slot = blockIdx.x / chunks % params.slots;
    const int64_t row = blockIdx.x / chunks / params.slots;
    const int64_t column = (chunk * kMergeThreads + threadIdx.x) * kVector;
    const bool active = column < params.width;
    T* out = static_cast<T*>(params.out) + (row * params.slots + slot) * params.width + column;

    const MergeWorkspace workspace(params);
    const int32_t count = merge_count(params, row);
    const int64_t entry = slot - params.slot_of(0, count);
    const int32_t token =
        entry >= 0 && entry < count ? workspace.kept[row * params.slots + entry] : -1;
    float sums[kVector] = {};
    if (token < 0) {
        if (active) store_floats<kVector>(out, sums);
        return;
    }
    const T* x = static_cast<const T*>(params.x) + row * params.x_row_stride + column;
    int32_t* target =
        params.target != nullptr && chunk == 0 ? params.target + row * params.tokens : nullptr;
    const Arrivals arrivals =
        find_arrivals(params, row, token, 0, target, static_cast<int32_t>(entry), shared);
    if (arrivals.count == 0) {
        if (active) copy_values<kVector>(out, x + token * params.x_token_stride);
        return;
    }

    float total = 0.0f;
    const auto add = [&](int32_t from, float share) {
        total = __fadd_rn(total, share);
        if (!active) return;
        float values[kVector];
        load_floats<kVector>(x + from * params.x_token_stride, values);
        LIGHTVLM_UNROLL
        for (int v = 0; v < kVector; ++v) {
            sums[v] = __fadd_rn(sums[v], __fmul_rn(share, values[v]));
        }
    };
    const float own = params.weight[row * params.weight_stride + token];
    const float own_weight = is_weight(own) ? own : 0.0f;
    const float scale = weight_scale(max(own_weight, arrivals.highest), arrivals.count + 1);
    if (own_weight > 0.0f) add(token, own_weight * scale);
    for (int64_t first = 0; first < arrivals.count; first += kMergeArrivals) {
        if (first > 0) {
            __syncthreads();  // the list before has been read
            find_arrivals(params, row, token, first, nullptr, 0, shared);
        }
        const int64_t left = arrivals.count - first;
        const int listed = static_cast<int>(left < kMergeArrivals ? left : kMergeArrivals);
        for (int i = 0; i < listed; ++i) add(shared.token[i], shared.weight[i] * scale);
    }
    if (!active) return;
    LIGHTVLM_UNROLL
    for (float& sum : sums) sum = __fdiv_rn(sum, total);
    store_floats<kVector>(out, sums);
}

}  // namespace lightvlm
