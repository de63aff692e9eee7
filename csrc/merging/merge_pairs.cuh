// merge_pairs: bipartite matching within windows, in six launches without a host in between.
//
//   1. here                   tokens listed by window and role, lengths of the metric vectors
//   2. merge_window.cuh       best[s] for the sources s of small windows, 16-bit dtypes
//   3. merge_similarity.cuh   best[s] for those of all others
//   4. here                   the best pairs of each window merge
//   5. here                   who is left, and who arrives at whom
//   6. merge_rows.cuh         the merged rows
//
// Places    A row's tokens that are in windows, by window id; within a window the sources, then
//           the destinations, then the protected ones, each ascending. All that 2 to 4 read of a
//           token lies by place, side by side for a window.
// Owner     In 1 and 5 a warp owns a token, in 4 a place. It counts over the row, or over its
//           window, 32 tokens a step: no sort, no atomics, no order of blocks.
// Shared    None.
// Bound     1: bytes, the metric is read once. 4 and 5: latency of N / 32 steps.
#pragma once

#include "common/block.cuh"
#include "common/device_error.cuh"
#include "merging/merge_arrange.cuh"
#include "merging/merge_measure.cuh"
#include "merging/merge_pairs.h"
#include "merging/merge_similarity.cuh"

namespace lightvlm {

constexpr int kPairsThreads = 256;
constexpr int kPairsWarps = kPairsThreads / kWarpThreads;

// Blocks that give each of a row's items a warp.
__host__ __device__ constexpr int64_t row_blocks(int64_t items) {
    return (items + kPairsWarps - 1) / kPairsWarps;
}

struct RowWarp {
    int64_t row;
    int64_t item;  // may be past the last
};

// In 32 bits, as the grid has no more: a division of 64 is a call.
__device__ __forceinline__ RowWarp row_warp(int64_t items) {
    const auto blocks = static_cast<uint32_t>(row_blocks(items));
    return {static_cast<int64_t>(blockIdx.x / blocks),
            static_cast<int64_t>(blockIdx.x % blocks) * kPairsWarps +
                static_cast<int64_t>(threadIdx.x) / kWarpThreads};
}

// A window, for each of its places.
struct __align__(16) PairWindow {
    int32_t begin;  // place of its first source
    int32_t sources;
    int32_t destinations;
    int32_t pairs;  // at most as many as there are sources with a destination
};

// The parts of the workspace, all [rows, tokens], by place unless said otherwise.
struct PairsWorkspace {
    PairWindow* window;
    unsigned long long* best;  // score_key(cosine) << 32 | ~destination; 0: none yet
    int32_t* token;            // -1: no token has this place
    float* scale;              // metric_scale()
    float* inverse;            // inverse_length()
    int32_t* into;             // by token: the one it is part of, or -1
    ListSpan* span;            // [rows, slots], by entry
    int32_t* order;            // arriving tokens by the one they go to

    __host__ __device__ explicit PairsWorkspace(const MergePairsParams& params) {
        const int64_t all = params.rows * params.tokens;
        window = reinterpret_cast<PairWindow*>(params.workspace);
        best = reinterpret_cast<unsigned long long*>(window + all);
        token = reinterpret_cast<int32_t*>(best + all);
        scale = reinterpret_cast<float*>(token + all);
        inverse = scale + all;
        into = reinterpret_cast<int32_t*>(inverse + all);
        order = into + all;
        span = reinterpret_cast<ListSpan*>(params.workspace + pairs_token_words(all));
    }
};

// Windows that merge_window.cuh takes.
constexpr int kWindowSources = 32;
constexpr int kWindowDestinations = 32;

__device__ __forceinline__ bool is_small(const PairWindow& window) {
    return window.sources <= kWindowSources && window.destinations <= kWindowDestinations;
}

// Sources and destinations of the larger windows; of all of them if `all`.
struct MergePairsProblem {
    SimilarityMetric metric;
    MergePairsParams params;
    bool all;

    __host__ MergePairsProblem(const MergePairsParams& pairs, bool all_windows)
        : metric{pairs.metric, pairs.metric_width, pairs.metric_row_stride,
                 pairs.metric_token_stride},
          params(pairs),
          all(all_windows) {}

    __device__ __forceinline__ unsigned long long* best(int64_t row) const {
        return PairsWorkspace(params).best + row * params.tokens;
    }
    // A window's destinations stand behind its sources.
    __device__ __forceinline__ bool may_match(int64_t, int64_t first_source,
                                              int64_t first_destination) const {
        return first_destination + kSimilarityTile > first_source;
    }
    __device__ __forceinline__ SimilarityToken dropped(int64_t row, int64_t place) const {
        return at(row, place, true);
    }
    __device__ __forceinline__ SimilarityToken kept(int64_t row, int64_t place) const {
        return at(row, place, false);
    }

  private:
    __device__ __forceinline__ SimilarityToken at(int64_t row, int64_t place, bool source) const {
        const PairsWorkspace workspace(params);
        const int64_t here = row * params.tokens + place;
        if (place >= params.tokens || workspace.token[here] < 0) return {};
        const PairWindow window = workspace.window[here];
        const int64_t of_window = place - window.begin;
        const bool is_source = of_window < window.sources;
        const bool takes_part = of_window < window.sources + window.destinations;
        if (!takes_part || is_source != source || window.pairs == 0) return {};
        if (!all && is_small(window)) return {};
        return {workspace.token[here], window.begin, workspace.scale[here],
                workspace.inverse[here]};
    }
};

// What a warp counts of the tokens of a row.
struct PairCounts {
    int32_t lower = 0;  // in windows of a lower id
    int32_t sources = 0;
    int32_t destinations = 0;
    int32_t members = 0;  // protected ones too
    // Before this one:
    int32_t sources_before = 0;
    int32_t destinations_before = 0;
    int32_t members_before = 0;
    bool gives = false;  // this one is a source,
    bool free = false;   // and not protected
};

__device__ inline PairCounts count_window(const MergePairsParams& params, int64_t row,
                                          int64_t token, int32_t id) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int32_t* ids = params.window + row * params.window_stride;
    const uint32_t lanes_before = (1u << lane) - 1u;
    PairCounts counts;
    for (int64_t base = 0; base < params.tokens; base += kWarpThreads) {
        const int64_t t = base + lane;
        const int32_t other = t < params.tokens ? ids[t] : -1;
        const bool same = other == id;
        const uint32_t members = __ballot_sync(kFullWarp, same);
        counts.lower += __popc(__ballot_sync(kFullWarp, other >= 0 && other < id));
        if (members == 0) continue;
        const int32_t position = counts.members + __popc(members & lanes_before);
        bool gives = position % 2 == 0;
        if (same && params.source != nullptr) {
            gives = params.source[row * params.source_stride + t] != 0;
        }
        const bool free = same && (params.is_protected == nullptr ||
                                   params.is_protected[row * params.protected_stride + t] == 0);
        const uint32_t sources = __ballot_sync(kFullWarp, free && gives);
        const uint32_t destinations = __ballot_sync(kFullWarp, free && !gives);
        const int64_t before = token - base;
        if (before >= 0) {
            const uint32_t mask = before >= kWarpThreads ? kFullWarp : (1u << before) - 1u;
            counts.sources_before += __popc(sources & mask);
            counts.destinations_before += __popc(destinations & mask);
            counts.members_before += __popc(members & mask);
            if (before < kWarpThreads) {
                counts.gives = (sources >> before & 1u) != 0;
                counts.free = ((sources | destinations) >> before & 1u) != 0;
            }
        }
        counts.sources += __popc(sources);
        counts.destinations += __popc(destinations);
        counts.members += __popc(members);
    }
    return counts;
}

// Places behind the last window: those of the tokens in none.
__device__ inline int64_t place_outside(const MergePairsParams& params, int64_t row,
                                        int64_t token) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int32_t* ids = params.window + row * params.window_stride;
    int64_t place = 0;
    for (int64_t base = 0; base < params.tokens; base += kWarpThreads) {
        const int64_t t = base + lane;
        const bool before = t < params.tokens && (ids[t] >= 0 || t < token);
        place += __popc(__ballot_sync(kFullWarp, before));
    }
    return place;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kPairsThreads)
    merge_pairs_prepare_kernel(const __grid_constant__ MergePairsParams params) {
    const PairsWorkspace workspace(params);
    const RowWarp warp = row_warp(params.tokens);
    const int64_t row = warp.row;
    const int64_t token = warp.item;
    if (token >= params.tokens) return;
    const int64_t all = row * params.tokens + token;
    const bool writes = threadIdx.x % kWarpThreads == 0;
    const int32_t id = params.window[row * params.window_stride + token];
    if (writes) {
        workspace.into[all] = id >= -1 ? static_cast<int32_t>(token) : -1;
        if (params.weight != nullptr &&
            !is_weight(params.weight[row * params.weight_stride + token])) {
            report_device_error(params.error, kErrorWeight);
        }
    }
    if (id < 0) {
        const int64_t place = place_outside(params, row, token);
        if (writes) workspace.token[row * params.tokens + place] = -1;
        return;
    }
    const PairCounts counts = count_window(params, row, token, id);
    const PairBudget budget = pair_budget(params, row, id, counts.sources + counts.destinations);
    if (budget.error != 0 && writes) report_device_error(params.error, budget.error);
    PairWindow window{counts.lower, counts.sources, counts.destinations, 0};
    if (counts.destinations > 0) {
        window.pairs =
            static_cast<int32_t>(budget.pairs < counts.sources ? budget.pairs : counts.sources);
    }
    int32_t of_window = counts.sources_before;
    if (!counts.free) {
        of_window = counts.sources + counts.destinations + counts.members_before -
                    counts.sources_before - counts.destinations_before;
    } else if (!counts.gives) {
        of_window = counts.sources + counts.destinations_before;
    }
    const int64_t here = row * params.tokens + window.begin + of_window;
    VectorMeasure measure{0.0f, 0.0f};
    if (window.pairs > 0 && counts.free) {
        measure = measure_vector<kVector>(static_cast<const T*>(params.metric) +
                                              row * params.metric_row_stride +
                                              token * params.metric_token_stride,
                                          params.metric_width);
    }
    if (!writes) return;
    workspace.token[here] = static_cast<int32_t>(token);
    workspace.window[here] = window;
    workspace.best[here] = 0;
    workspace.scale[here] = measure.scale;
    workspace.inverse[here] = measure.inverse;
}

// How good a source's best pair is: higher first, ties to the lower place. best == 0, where nothing
// was compared, cannot be: each source of a window with pairs has a destination.
__device__ __forceinline__ unsigned long long pair_rank(unsigned long long best, float inverse,
                                                        int64_t place) {
    const float score = key_score(static_cast<uint32_t>(best >> 32)) * inverse;
    return static_cast<unsigned long long>(score_key(score)) << 32 | ~static_cast<uint32_t>(place);
}

__global__ void __launch_bounds__(kPairsThreads)
    merge_pairs_choose_kernel(const __grid_constant__ MergePairsParams params) {
    const PairsWorkspace workspace(params);
    const RowWarp warp = row_warp(params.tokens);
    const int64_t row = warp.row;
    const int64_t place = warp.item;
    const int64_t all = row * params.tokens + place;
    if (place >= params.tokens || workspace.token[all] < 0) return;
    const PairWindow window = workspace.window[all];
    if (window.pairs == 0 || place - window.begin >= window.sources) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const unsigned long long own = pair_rank(workspace.best[all], workspace.inverse[all], place);
    int32_t better = 0;
    const int64_t first = row * params.tokens + window.begin;
    for (int32_t base = 0; base < window.sources; base += kWarpThreads) {
        const int32_t s = base + lane;
        const bool is_better =
            s < window.sources && pair_rank(workspace.best[first + s], workspace.inverse[first + s],
                                            window.begin + s) > own;
        better += __popc(__ballot_sync(kFullWarp, is_better));
    }
    if (lane == 0 && better < window.pairs) {
        workspace.into[row * params.tokens + workspace.token[all]] =
            static_cast<int32_t>(~static_cast<uint32_t>(workspace.best[all]));
    }
}

// One warp more than there are tokens in a row: it counts those that are left.
__global__ void __launch_bounds__(kPairsThreads)
    merge_pairs_arrange_kernel(const __grid_constant__ MergePairsParams params) {
    const PairsWorkspace workspace(params);
    const RowWarp warp = row_warp(params.tokens + 1);
    const int64_t row = warp.row;
    const int64_t token = warp.item;
    if (token > params.tokens) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int32_t* into = workspace.into + row * params.tokens;
    const int64_t to = token < params.tokens ? into[token] : params.tokens;
    // The entry of `to`: how many are left before it.
    int32_t entry = 0;
    for (int64_t base = 0; base < to; base += kWarpThreads) {
        const int64_t t = base + lane;
        entry += __popc(__ballot_sync(kFullWarp, t < to && into[t] == t));
    }
    if (token == params.tokens) {
        if (lane != 0) return;
        const bool fits = entry <= params.slots;
        if (!fits) report_device_error(params.error, kErrorCapacity);
        params.count[row] = fits ? entry : static_cast<int32_t>(params.slots);
        return;
    }
    const bool left = to >= 0 && entry < params.slots;  // otherwise it vanishes
    ArrivalRank rank;
    if (left) {
        rank = rank_arrivals(params.tokens, static_cast<uint32_t>(to), token, [&](int64_t i) {
            return into[i] == i ? kGoesNowhere : static_cast<uint32_t>(into[i]);
        });
    }
    if (lane != 0) return;
    const int64_t all = row * params.tokens + token;
    params.target[all] = left ? entry : -1;
    params.inverse[all] = left && to == token ? entry : -1;
    if (!left) return;
    if (to == token) {
        params.index[row * params.slots + entry] = static_cast<int32_t>(token);
        workspace.span[row * params.slots + entry] = ListSpan{rank.less, rank.equal};
    } else {
        workspace.order[row * params.tokens + rank.less + rank.equal_before] =
            static_cast<int32_t>(token);
    }
}

}  // namespace lightvlm
