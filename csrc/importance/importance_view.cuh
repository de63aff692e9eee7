// What the kernels of importance share: the workspace, the probe rows that count, and a slot's
// probes and targets.
#pragma once

#include "common/block.cuh"
#include "common/launch.h"
#include "importance/importance.h"

// Before a loop whose copies would want more registers than there are, and before one whose array
// would lie in local memory without copies.
#ifdef LIGHTVLM_EMULATION
#define LIGHTVLM_KEEP_ROLLED
#define LIGHTVLM_UNROLL
#else
#define LIGHTVLM_KEEP_ROLLED _Pragma("unroll 1")
#define LIGHTVLM_UNROLL _Pragma("unroll")
#endif

namespace lightvlm {

// Where the workspace holds what; all sizes upper bounds that the host knows.
struct ImportanceWorkspace {
    // With row_pos: which probe rows count, in order, where they stand, and how many they are.
    int32_t* rows;       // [batch, window]
    int32_t* positions;  // [batch, window]
    int32_t* used;       // [batch]
    // Unless heads are folded at once.
    float* group_scores;  // [batch, key_heads, targets]
    // Own softmax, in units of log 2: of each probe, maximum and 1 / sum of exponentials,
    // [batch, slots, probes] (null: joined in fold); and of each split of its targets.
    float* highest;
    float* inverse;
    float* part_highest;  // [batch, slots, parts, splits, kImportancePart]
    float* part_sum;
    int64_t parts;  // of a slot that there is room for
    int64_t splits;
};

struct ImportanceArguments {
    ImportanceParams params;
    ImportanceWorkspace workspace;
};

inline ImportanceWorkspace divide_workspace(const ImportanceParams& params) {
    ImportanceWorkspace work = {};
    int32_t* next = params.workspace;
    const auto integers = [&next](int64_t count) {
        int32_t* taken = next;
        next += count;
        return taken;
    };
    const auto floats = [&integers](int64_t count) {
        return reinterpret_cast<float*>(integers(count));
    };
    if (params.row_pos != nullptr) {
        work.rows = integers(params.batch * params.window);
        work.positions = integers(params.batch * params.window);
        work.used = integers(params.batch);
    }
    if (!importance_folds_heads_at_once(params)) {
        work.group_scores = floats(params.batch * params.key_heads * params.targets());
    }
    if (params.lse != nullptr) return work;
    if (!importance_joins_in_fold(params)) {
        const int64_t probes = params.batch * params.slots() * params.probes();
        work.highest = floats(probes);
        work.inverse = floats(probes);
    }
    work.splits = (params.targets() + kImportanceSplit - 1) / kImportanceSplit;
    const int64_t part_words = importance_part_words(params);
    if (part_words == 0) return work;
    const int64_t parts = (params.probes() + kImportancePart - 1) / kImportancePart;
    const int64_t room = (params.workspace + params.workspace_words - next) / part_words;
    work.parts = room < parts ? room : parts;
    work.part_highest = floats(work.parts * part_words / 2);
    work.part_sum = floats(work.parts * part_words / 2);
    return work;
}

// Maximum and 1 / sum of a probe from those of `splits` splits of its targets, in order.
__device__ __forceinline__ void join_splits(const ImportanceWorkspace& work, int64_t at,
                                            int32_t splits, float* shift, float* inverse) {
    float highest = -CUDART_INF_F;
    for (int32_t s = 0; s < splits; ++s) {
        highest = fmaxf(highest, work.part_highest[at + s * kImportancePart]);
    }
    // All logits -inf: exp(-inf - 0) is 0, where -inf - -inf would be NaN.
    *shift = highest > -CUDART_INF_F ? highest : 0.0f;
    float sum = 0.0f;
    for (int32_t s = 0; s < splits; ++s) {
        const int64_t one = at + s * kImportancePart;
        sum += work.part_sum[one] * exp2f(work.part_highest[one] - *shift);
    }
    *inverse = sum != 0.0f ? 1.0f / sum : 0.0f;
}

// A batch row: its keys [begin, end), and the `used` probe rows that count. Without row_pos these
// are the last ones, standing at the last keys.
struct ImportanceRows {
    int32_t begin = 0;
    int32_t end = 0;
    int32_t used = 0;
    int32_t window = 0;
    const int32_t* rows = nullptr;  // null: no row_pos
    const int32_t* positions = nullptr;
    bool valid = false;

    // `used` is left at 0 where there is a row_pos.
    __device__ __forceinline__ ImportanceRows(const ImportanceParams& params, int64_t b) {
        const int64_t first = params.leftpad != nullptr ? params.leftpad[b] : 0;
        const int64_t past = params.lens != nullptr ? params.lens[b] : params.tokens;
        window = static_cast<int32_t>(params.window);
        valid = 0 <= first && first <= past && past <= params.tokens;
        if (!valid) return;
        begin = static_cast<int32_t>(first);
        end = static_cast<int32_t>(past);
        if (params.row_pos == nullptr) used = window < end - begin ? window : end - begin;
    }

    __device__ __forceinline__ void take_list(const ImportanceWorkspace& work, int64_t b) {
        if (work.rows == nullptr) return;
        rows = work.rows + b * window;
        positions = work.positions + b * window;
        used = work.used[b];
    }

    __device__ __forceinline__ int32_t keys() const { return end - begin; }
    __device__ __forceinline__ int32_t row(int32_t u) const {
        return rows != nullptr ? rows[u] : window - used + u;
    }
    __device__ __forceinline__ int32_t position(int32_t u) const {
        return positions != nullptr ? positions[u] : end - used + u;
    }
};

// Lists the rows that count; returns how many. The block calls it.
template <int kThreads>
__device__ int32_t list_importance_rows(const ImportanceParams& params, int64_t b,
                                        const ImportanceRows& bounds, uint32_t* scratch,
                                        int32_t* rows, int32_t* positions) {
    int32_t used = 0;
    for (int64_t first = 0; first < params.window; first += kThreads) {
        const int64_t w = first + threadIdx.x;
        int32_t position = -1;
        if (bounds.valid && w < params.window) {
            position = params.row_pos[b * params.row_pos_stride + w];
        }
        const bool counts = position >= bounds.begin && position >= 0;
        uint32_t counted;
        const auto at =
            used + static_cast<int32_t>(block_rank<kThreads>(counts, scratch, &counted));
        if (counts) {
            rows[at] = static_cast<int32_t>(w);
            positions[at] = position;
        }
        used += static_cast<int32_t>(counted);
    }
    return used;
}

// How many probe rows see key `at` of batch row b. (row_pos is read again: rows that do not count
// stand before every key.)
__device__ __forceinline__ int32_t visible_rows(const ImportanceParams& params, int64_t b,
                                                const ImportanceRows& bounds, int64_t at) {
    if (at < bounds.begin || at >= bounds.end) return 0;
    if (params.row_pos == nullptr) {
        if (!params.causal) return bounds.used;
        const int64_t later = bounds.end - at;
        return static_cast<int32_t>(bounds.used < later ? bounds.used : later);
    }
    const int64_t least = params.causal ? at : bounds.begin;
    int32_t count = 0;
    const int32_t* positions = params.row_pos + b * params.row_pos_stride;
    for (int64_t w = 0; w < params.window; ++w) count += positions[w] >= least ? 1 : 0;
    return count;
}

// Heads [head, head + heads) of batch row b: the vectors of their probes and of the targets they
// share, and who sees whom: probe p sees target t where limit(p) >= threshold(t).
template <typename T>
struct ImportanceSlot {
    static constexpr int32_t kSeesNothing = INT32_MIN;
    static constexpr int32_t kSplit = static_cast<int32_t>(kImportanceSplit);

    const ImportanceParams& params;
    const ImportanceWorkspace& work;
    const ImportanceRows& rows;
    const T* query;
    const T* key;
    const float* lse;  // of the first head; null: own softmax
    int64_t slot;      // over the batch
    int32_t offset;    // of the first probe in its slot
    bool by_key;
    int32_t skipped = 0;  // rows at the front that take no part
    int32_t probes;
    int32_t targets;

    __device__ __forceinline__ ImportanceSlot(const ImportanceArguments& arguments,
                                              const ImportanceRows& counted, int64_t b,
                                              int64_t head, int64_t heads)
        : params(arguments.params), work(arguments.workspace), rows(counted) {
        by_key = params.axis == ScoreAxis::kKey;
        const int64_t group = params.group();
        const int64_t key_head = head / group;
        query = static_cast<const T*>(params.query) + b * params.query_batch_stride +
                head * params.query_head_stride;
        key = static_cast<const T*>(params.key) + b * params.key_batch_stride +
              key_head * params.key_head_stride + rows.begin * params.key_token_stride;
        lse = params.lse == nullptr
                  ? nullptr
                  : params.lse + b * params.lse_batch_stride + head * params.lse_head_stride;
        probes = by_key ? static_cast<int32_t>(heads) * rows.used : rows.keys();
        targets = by_key ? rows.keys() : rows.used;
        // A key head's probes lie together, `used` of them for each query head.
        slot = b * params.slots() + (by_key ? key_head : head);
        offset = by_key ? static_cast<int32_t>(head - key_head * group) * rows.used : 0;
    }

    // Leaves out rows that see no target from `first` on, where they are the first ones: whole
    // tiles of them, so that the others stay in their places and sums in their order.
    __device__ __forceinline__ void skip_rows_before(int32_t first) {
        if (!by_key || !params.causal || rows.rows != nullptr || rows.used == 0) return;
        const int32_t heads = probes / rows.used;
        const int32_t blind = first - (rows.keys() - rows.used);
        skipped = blind > 0 ? blind / kImportanceTile * kImportanceTile : 0;
        probes = heads * (rows.used - skipped);
    }

    struct Probe {
        int32_t head;
        int32_t u;
    };

    // Of axis "key": which head and row.
    __device__ __forceinline__ Probe place(int32_t p) const {
        const auto live = static_cast<uint32_t>(rows.used - skipped);
        const uint32_t head = static_cast<uint32_t>(p) / live;
        return {static_cast<int32_t>(head),
                static_cast<int32_t>(static_cast<uint32_t>(p) - head * live) + skipped};
    }

    __device__ __forceinline__ const T* probe(int32_t p) const {
        if (!by_key) return key + p * params.key_token_stride;
        const Probe at = place(p);
        return query + at.head * params.query_head_stride +
               rows.row(at.u) * params.query_row_stride;
    }

    __device__ __forceinline__ const T* target(int32_t t) const {
        return by_key ? key + t * params.key_token_stride
                      : query + rows.row(t) * params.query_row_stride;
    }

    __device__ __forceinline__ int32_t limit(int32_t p) const {
        if (p >= probes) return kSeesNothing;
        if (!params.causal) return 0;
        return by_key ? rows.position(place(p).u) : -(rows.begin + p);
    }

    // Targets past the end pass for the last one.
    __device__ __forceinline__ int32_t threshold(int32_t t) const {
        if (!params.causal) return 0;
        const int32_t at = t < targets ? t : targets - 1;
        return by_key ? rows.begin + at : -rows.position(at);
    }

    // The probe's share of a target is 2^(scale * log2(e) * product - shift) * factor; false where
    // the row saw nothing.
    __device__ __forceinline__ bool normaliser(int32_t p, float* shift, float* factor) const {
        const Probe at = by_key ? place(p) : Probe{0, p};
        if (lse == nullptr) {
            const int32_t index = offset + at.head * rows.used + at.u;
            if (work.highest != nullptr) {
                *shift = work.highest[slot * params.probes() + index];
                *factor = work.inverse[slot * params.probes() + index];
            } else {
                const int32_t splits = (targets + kSplit - 1) / kSplit;
                const int64_t part = slot * work.parts + index / kImportancePart;
                join_splits(work, part * work.splits * kImportancePart + index % kImportancePart,
                            splits, shift, factor);
            }
            return true;
        }
        const float given = lse[at.head * params.lse_head_stride + rows.row(at.u)];
        // What rounding loses of given * log2(e) goes to the factor.
        constexpr float kLog2E = 1.44269504f;
        constexpr float kLog2ELow = 1.92596299e-8f;
        *shift = given * kLog2E;
        const float low = fmaf(given, kLog2E, -*shift) + given * kLog2ELow;
        *factor = fabsf(*shift) <= 3.0e38f ? exp2f(-low) : 1.0f;
        return given != -CUDART_INF_F;
    }
};

// The logits' factor, in units of log 2.
__device__ __forceinline__ float importance_scale(const ImportanceParams& params) {
    return params.scale * 1.44269504f;
}

}  // namespace lightvlm
