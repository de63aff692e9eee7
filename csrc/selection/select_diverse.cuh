// select_diverse: the greedy choice by score and dissimilarity, in one launch.
//
// Formula   Per segment, the forced tokens are chosen first; then, until the budget is full, the
//           candidate with the highest worth * (1 - strength * nearest), where nearest is its
//           largest cosine to a chosen token, at least 0 (diverse_value.h); ties to the lower
//           index.
// Lazy      nearest only grows, so a value that has not seen the latest choices is an upper bound.
//           A round compares the tops of all warps; if the highest has seen all choices it is
//           chosen, else each warp whose top may still win brings that one token up to date. Most
//           tokens are never compared with most choices, and the result is that of comparing all.
// Owner     One block owns one row. Of a segment, tile t of 32 tokens belongs to warp t mod warps;
//           the warp computes its tokens' cosines, lanes striding over the channels.
// Exact     A cosine is summed in one order whatever the block size, and is never an input of
//           another sum: the choice does not depend on the batch or on scheduling.
// Shared    Under 1 KiB: the tops of the warps. The state of the tokens is in the workspace (L2).
// Bound     Latency: about 2 us a choice plus the cosines, at most budget * tokens * channels
//           products; features are read through L1/L2.
#pragma once

#include <cmath>

#include "common/float16.cuh"
#include "selection/diverse_value.h"
#include "selection/rows.cuh"
#include "selection/select_diverse.h"

namespace lightvlm {

// The workspace of one row.
struct DiverseState {
    float* value;         // [tokens], -inf: not to be chosen (any more)
    float* nearest;       // [tokens]
    float* scale;         // [tokens], see diverse_scale(); 0: resembles nothing
    float* inverse_norm;  // [tokens], of the scaled vector
    int32_t* seen;        // [tokens], the choices that `nearest` knows
    int32_t* chosen;      // [tokens], the segment's choices in their order

    __device__ DiverseState(int32_t* words, int64_t tokens)
        : value(reinterpret_cast<float*>(words)),
          nearest(reinterpret_cast<float*>(words + tokens)),
          scale(reinterpret_cast<float*>(words + 2 * tokens)),
          inverse_norm(reinterpret_cast<float*>(words + 3 * tokens)),
          seen(words + 4 * tokens),
          chosen(words + 5 * tokens) {}
};

template <int kThreads>
struct SelectDiverseShared {
    RowScratch<kThreads> row;
    unsigned long long tops[kThreads / kWarpThreads];
    uint32_t top_seen_all[kThreads / kWarpThreads];
};

template <typename T>
struct DiverseFeatures {
    const T* data;
    int64_t token_stride;
    int64_t channels;

    __device__ __forceinline__ const T* token(int64_t i) const { return data + i * token_stride; }
};

// Orders by value, then by lower index; 0: no token.
__device__ __forceinline__ unsigned long long choice_key(float value, int64_t i) {
    if (value == -INFINITY) return 0;
    return static_cast<unsigned long long>(score_key(value)) << 32 |
           (0xffffffffu - static_cast<uint32_t>(i));
}

__device__ __forceinline__ int64_t choice_token(unsigned long long key) {
    return 0xffffffffu - static_cast<uint32_t>(key);
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int step = kWarpThreads / 2; step > 0; step /= 2) {
        value += __shfl_xor_sync(kFullWarp, value, step);
    }
    return value;
}

// Scales and norms of a row's tokens, a warp a token.
template <int kThreads, typename T>
__device__ void measure_features(const DiverseFeatures<T>& features, const DiverseState& state,
                                 int64_t tokens) {
    const int lane = threadIdx.x % kWarpThreads;
    for (int64_t i = threadIdx.x / kWarpThreads; i < tokens; i += kThreads / kWarpThreads) {
        const T* x = features.token(i);
        uint32_t largest = 0;  // as bits, where NaN is above infinity
        for (int64_t c = lane; c < features.channels; c += kWarpThreads) {
            const uint32_t bits = __float_as_uint(to_float(x[c])) & 0x7fffffffu;
            largest = bits > largest ? bits : largest;
        }
        for (int step = kWarpThreads / 2; step > 0; step /= 2) {
            const uint32_t other = __shfl_xor_sync(kFullWarp, largest, step);
            largest = other > largest ? other : largest;
        }
        const float scale = diverse_scale(__uint_as_float(largest));
        float squares = 0.0f;
        if (scale > 0.0f) {
            for (int64_t c = lane; c < features.channels; c += kWarpThreads) {
                const float scaled = to_float(x[c]) * scale;
                squares += scaled * scaled;
            }
        }
        squares = warp_sum(squares);
        if (lane == 0) {
            state.scale[i] = scale;
            state.inverse_norm[i] = scale > 0.0f ? 1.0f / sqrtf(squares) : 0.0f;
        }
    }
}

// Compares token i with the choices it has not seen; by one whole warp.
template <typename T>
__device__ void catch_up(const DiverseFeatures<T>& features, const DiverseState& state, int64_t i,
                         int32_t choices, float worth, float strength) {
    const int lane = threadIdx.x % kWarpThreads;
    const T* x = features.token(i);
    const float scale = state.scale[i];
    float nearest = state.nearest[i];
    for (int32_t choice = scale > 0.0f ? state.seen[i] : choices; choice < choices; ++choice) {
        const int64_t j = state.chosen[choice];
        const float other_scale = state.scale[j];
        if (other_scale == 0.0f) continue;
        const T* y = features.token(j);
        float product = 0.0f;
        for (int64_t c = lane; c < features.channels; c += kWarpThreads) {
            product += (to_float(x[c]) * scale) * (to_float(y[c]) * other_scale);
        }
        const float cosine = warp_sum(product) * (state.inverse_norm[i] * state.inverse_norm[j]);
        nearest = cosine > nearest ? cosine : nearest;
    }
    __syncwarp();
    if (lane == 0) {
        state.nearest[i] = nearest;
        state.seen[i] = choices;
        state.value[i] = diverse_value(worth, strength, nearest);
    }
}

// What the warp's tokens hold best.
template <int kThreads>
__device__ unsigned long long warp_top(const SelectionRow& row, const DiverseState& state) {
    unsigned long long top = 0;
    for (int64_t i = row.begin + threadIdx.x; i < row.end; i += kThreads) {
        if (!row.in_segment(i)) continue;
        const unsigned long long key = choice_key(state.value[i], i);
        top = key > top ? key : top;
    }
    for (int step = kWarpThreads / 2; step > 0; step /= 2) {
        const unsigned long long other = __shfl_xor_sync(kFullWarp, top, step);
        top = other > top ? other : top;
    }
    return top;
}

// The best token that has seen all choices, as a key; 0: the segment has no candidate left.
template <int kThreads, typename T>
__device__ unsigned long long next_choice(const SelectDiverseParams& params,
                                          const SelectionRow& row, const DiverseState& state,
                                          const DiverseFeatures<T>& features, int32_t choices,
                                          SelectDiverseShared<kThreads>& shared) {
    constexpr int kWarps = kThreads / kWarpThreads;
    const int warp = threadIdx.x / kWarpThreads;
    while (true) {
        const unsigned long long own = warp_top<kThreads>(row, state);
        const int64_t i = choice_token(own);
        float worth = 0.0f;
        bool seen_all = true;
        if (own != 0) {
            worth = diverse_worth(row.scores[i]);
            // Nothing times any similarity is nothing.
            seen_all = worth == 0.0f || state.seen[i] == choices;
        }
        if (threadIdx.x % kWarpThreads == 0) {
            shared.tops[warp] = own;
            shared.top_seen_all[warp] = seen_all;
        }
        __syncthreads();
        unsigned long long best = 0;
        unsigned long long best_seen_all = 0;
        for (int w = 0; w < kWarps; ++w) {
            const unsigned long long top = shared.tops[w];
            best = top > best ? top : best;
            if (shared.top_seen_all[w] && top > best_seen_all) best_seen_all = top;
        }
        if (best == best_seen_all) return best;
        if (!seen_all && own > best_seen_all) {
            catch_up(features, state, i, choices, worth, params.strength);
        }
        __syncthreads();
    }
}

template <int kThreads, typename T>
__global__ void __launch_bounds__(kThreads) select_diverse_kernel(SelectDiverseParams params) {
    auto& shared = *shared_memory<SelectDiverseShared<kThreads>>();
    const int64_t row_index = blockIdx.x;
    const int64_t tokens = params.rows.tokens;
    const DiverseState state(params.workspace + row_index * kDiverseWords * tokens, tokens);
    const DiverseFeatures<T> features{
        static_cast<const T*>(params.features) + row_index * params.features_row_stride,
        params.features_token_stride, params.channels};

    measure_features<kThreads>(features, state, tokens);
    for_each_segment<kThreads>(params.rows, row_index, shared.row, [&](const SelectionRow& row) {
        const int64_t budget = segment_budget(params.rows, row);
        if (budget == 0) return;
        int32_t choices = 0;
        for (int64_t tile = row.begin; tile < row.end; tile += kThreads) {
            const int64_t i = tile + threadIdx.x;
            const bool own = i < row.end && row.in_segment(i);
            const bool forced = own && row.is_forced(i);
            if (own) {
                state.value[i] = row.is_candidate(i) ? diverse_worth(row.scores[i]) : -INFINITY;
                state.nearest[i] = 0.0f;
                state.seen[i] = 0;
            }
            uint32_t forced_here;
            const uint32_t rank = block_rank<kThreads>(forced, shared.row.words, &forced_here);
            if (forced) state.chosen[choices + rank] = static_cast<int32_t>(i);
            choices += static_cast<int32_t>(forced_here);
        }
        __syncthreads();
        for (int64_t taken = 0; taken < budget; ++taken) {
            const unsigned long long best =
                next_choice<kThreads>(params, row, state, features, choices, shared);
            if (best == 0) break;
            if (threadIdx.x == 0) {
                const int64_t i = choice_token(best);
                row.inverse[i] = 0;
                state.value[i] = -INFINITY;
                state.chosen[choices] = static_cast<int32_t>(i);
            }
            ++choices;
            __syncthreads();
        }
    });
    write_selection<kThreads>(params.rows, row_index, shared.row);
}

}  // namespace lightvlm
