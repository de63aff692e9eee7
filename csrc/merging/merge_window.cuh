// merge_pairs in small windows: the best destination of each source, at most 32 of either, 16-bit
// dtypes in whole, aligned pieces of 16 bytes.
//
// Formula   best[s] = max over the window's destinations d of
//           score_key(dot(s, d) * inverse_length(d)) << 32 | ~d
// Owner     A block owns a window: its first place. Each of the eight warps multiplies all sources
//           with all destinations over slices of 32 columns, warp w the slices w, w + 8, ...
//           The eight partial products are added in the order of the warps.
// Loads     A fragment of mma.m16n8k16 wants pairs of values 2 and 8 apart. A dot product may take
//           its columns in any order, if both sides take the same: a lane loads 8 neighbouring
//           values (16 bytes) of its row straight into registers, as the k of two mma. So rows come
//           in pieces of 64 bytes, no shared memory, no barrier, and two slices a warp are under
//           way: 64 KiB a block.
//
//              k of mma 0    lane % 4 = 0: columns 0 1 | 2 3    1: 8 9 | 10 11    ...
//              k of mma 1    lane % 4 = 0: columns 4 5 | 6 7    1: 12 13 | 14 15  ...
//
// Shared    33 KiB of partial products, 0.8 KiB of tokens.
// Bound     Bytes: the window's vectors are read once (from the L2, after the launch before). 2 *
//           32 * 32 * width operations a window are nothing to the tensor cores.
#pragma once

#include "common/block.cuh"
#include "common/ptx.cuh"
#include "merging/merge_pairs.cuh"

namespace lightvlm {

constexpr int kWindowThreads = 256;
constexpr int kWindowWarps = kWindowThreads / kWarpThreads;
constexpr int kWindowSlice = 32;
constexpr int kWindowPitch = kWindowDestinations + 1;

struct WindowShared {
    float products[kWindowWarps][kWindowSources][kWindowPitch];
    int32_t source[kWindowSources];
    int32_t destination[kWindowDestinations];
    float source_scale[kWindowSources];  // 0 where there is no token
    float destination_scale[kWindowDestinations];
    float inverse[kWindowDestinations];
};

struct __align__(16) WindowPiece {
    uint32_t pairs[4];  // 8 values
};

template <typename T>
__device__ __forceinline__ WindowPiece load_window_piece(const T* metric, int64_t offset,
                                                         float scale, bool inside) {
    WindowPiece piece{};
    if (scale == 0.0f || !inside) return piece;
    if (scale == 1.0f) return *reinterpret_cast<const WindowPiece*>(metric + offset);
    float values[8];
    load_floats<8>(metric + offset, values);
    for (float& value : values) value *= scale;
    store_floats<8>(reinterpret_cast<T*>(piece.pairs), values);
    return piece;
}

// Not more than half of an SM's registers: two blocks of it side by side.
template <typename T>
__global__ void __launch_bounds__(kWindowThreads, 2)
    merge_window_kernel(const __grid_constant__ MergePairsParams params) {
    const PairsWorkspace workspace(params);
    const int64_t row = blockIdx.x / static_cast<uint32_t>(params.tokens);
    const int64_t place = blockIdx.x % static_cast<uint32_t>(params.tokens);
    const int64_t here = row * params.tokens + place;
    if (workspace.token[here] < 0) return;
    const PairWindow window = workspace.window[here];
    if (window.begin != place || window.pairs == 0 || !is_small(window)) return;

    auto& shared = *shared_memory<WindowShared>();
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kWindowSources + kWindowDestinations) {
        const bool is_source = thread < kWindowSources;
        const int at = is_source ? thread : thread - kWindowSources;
        const bool there = at < (is_source ? window.sources : window.destinations);
        const int64_t from = here + at + (is_source ? 0 : window.sources);
        const int32_t token = there ? workspace.token[from] : -1;
        const float scale = there ? workspace.scale[from] : 0.0f;
        if (is_source) {
            shared.source[at] = token;
            shared.source_scale[at] = scale;
        } else {
            shared.destination[at] = token;
            shared.destination_scale[at] = scale;
            shared.inverse[at] = there ? workspace.inverse[from] : 0.0f;
        }
    }
    __syncthreads();

    const int warp = thread / kWarpThreads;
    const int lane = thread % kWarpThreads;
    const int group = lane / 4;
    const int column = lane % 4 * 8;
    constexpr int kRowTiles = kWindowSources / 16;
    constexpr int kColumnTiles = kWindowDestinations / 8;
    constexpr int kPieces = 2 * kRowTiles + kColumnTiles;  // of a lane and slice
    const T* metric = static_cast<const T*>(params.metric) + row * params.metric_row_stride;
    const int64_t slices = (params.metric_width + kWindowSlice - 1) / kWindowSlice;
    const auto load = [&](int64_t slice, WindowPiece(&pieces)[kPieces]) {
        const int64_t k = slice * kWindowSlice + column;
        const bool inside = k < params.metric_width;
        LIGHTVLM_UNROLL
        for (int p = 0; p < kPieces; ++p) {
            const bool of_source = p < 2 * kRowTiles;
            const int at = of_source ? 8 * p + group : 8 * (p - 2 * kRowTiles) + group;
            const int32_t token = of_source ? shared.source[at] : shared.destination[at];
            const float scale = of_source ? shared.source_scale[at] : shared.destination_scale[at];
            pieces[p] =
                load_window_piece(metric, token * params.metric_token_stride + k, scale, inside);
        }
    };

    float sums[kRowTiles][kColumnTiles][4] = {};
    WindowPiece next[kPieces];
    load(warp, next);
    for (int64_t slice = warp; slice < slices; slice += kWindowWarps) {
        WindowPiece pieces[kPieces];
        LIGHTVLM_UNROLL
        for (int p = 0; p < kPieces; ++p) pieces[p] = next[p];
        load(slice + kWindowWarps, next);
        LIGHTVLM_UNROLL
        for (int half = 0; half < 4; half += 2) {
            LIGHTVLM_UNROLL
            for (int r = 0; r < kRowTiles; ++r) {
                const uint32_t rows[4] = {pieces[2 * r].pairs[half], pieces[2 * r + 1].pairs[half],
                                          pieces[2 * r].pairs[half + 1],
                                          pieces[2 * r + 1].pairs[half + 1]};
                LIGHTVLM_UNROLL
                for (int c = 0; c < kColumnTiles; ++c) {
                    const uint32_t columns[2] = {pieces[2 * kRowTiles + c].pairs[half],
                                                 pieces[2 * kRowTiles + c].pairs[half + 1]};
                    ptx::mma_m16n8k16<T>(sums[r][c], rows, columns);
                }
            }
        }
    }
    LIGHTVLM_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
        LIGHTVLM_UNROLL
        for (int c = 0; c < kColumnTiles; ++c) {
            LIGHTVLM_UNROLL
            for (int i = 0; i < 4; ++i) {
                shared.products[warp][16 * r + i / 2 * 8 + group][8 * c + lane % 4 * 2 + i % 2] =
                    sums[r][c][i];
            }
        }
    }
    __syncthreads();

    // Eight threads a source, four destinations each.
    constexpr int kPerSource = kWindowThreads / kWindowSources;
    const int source = thread / kPerSource;
    unsigned long long best = 0;
    for (int d = thread % kPerSource; d < kWindowDestinations; d += kPerSource) {
        float dot = 0.0f;
        LIGHTVLM_UNROLL
        for (int w = 0; w < kWindowWarps; ++w) dot = __fadd_rn(dot, shared.products[w][source][d]);
        if (shared.destination[d] < 0) continue;
        const unsigned long long value =
            static_cast<unsigned long long>(score_key(dot * shared.inverse[d])) << 32 |
            ~static_cast<uint32_t>(shared.destination[d]);
        best = value > best ? value : best;
    }
    for (int step = kPerSource / 2; step > 0; step /= 2) {
        const unsigned long long other = __shfl_xor_sync(kFullWarp, best, step);
        best = other > best ? other : best;
    }
    if (thread % kPerSource == 0 && source < window.sources) workspace.best[here + source] = best;
}

}  // namespace lightvlm
