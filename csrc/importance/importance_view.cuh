// What the kernels of importance share: the workspace, and a slot's probes and targets.
#pragma once

#include "common/launch.h"
#include "importance/importance.h"

namespace lightvlm {

// Where the workspace holds what; all sizes upper bounds that the host knows.
struct ImportanceWorkspace {
    int32_t* rows;       // [batch, window] the probe rows that count, in order
    int32_t* positions;  // [batch, window] where they stand
    int32_t* used;       // [batch] how many they are
    int32_t* begin;      // [batch] keys lie in [begin, end)
    int32_t* end;
    float* group_scores;  // [batch, key_heads, targets]
    // Own softmax: of each probe, maximum and 1 / sum of exponentials, [batch, slots, probes];
    // and before they are merged, of each split of its targets.
    float* highest;
    float* inverse;
    float* part_highest;  // [batch, slots, part_tiles, splits, kImportanceTile]
    float* part_sum;
    int64_t part_tiles;  // probe tiles of a slot that the parts have room for
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
    work.rows = integers(params.batch * params.window);
    work.positions = integers(params.batch * params.window);
    work.used = integers(params.batch);
    work.begin = integers(params.batch);
    work.end = integers(params.batch);
    work.group_scores = floats(params.batch * params.key_heads * params.targets());
    if (params.lse != nullptr) return work;
    const int64_t probes = params.batch * params.slots() * params.probes();
    work.highest = floats(probes);
    work.inverse = floats(probes);
    work.splits = (params.targets() + kImportanceSplit - 1) / kImportanceSplit;
    const int64_t tile_words = importance_tile_words(params);
    if (tile_words == 0) return work;
    const int64_t tiles = (params.probes() + kImportanceTile - 1) / kImportanceTile;
    const int64_t room = (params.workspace + params.workspace_words - next) / tile_words;
    work.part_tiles = room < tiles ? room : tiles;
    work.part_highest = floats(work.part_tiles * tile_words / 2);
    work.part_sum = floats(work.part_tiles * tile_words / 2);
    return work;
}

// Heads [head, head + heads) of batch row b: the vectors of their probes and of the targets they
// share, and who sees whom: probe p sees target t where limit(p) >= threshold(t).
template <typename T>
struct ImportanceSlot {
    const ImportanceParams& params;
    const int32_t* rows;
    const int32_t* positions;
    const T* query;
    const T* key;
    const float* lse;  // of the first head; null: own softmax
    const float* highest;
    const float* inverse;
    int64_t used;
    int64_t begin;
    int64_t probes;
    int64_t targets;

    static constexpr int32_t kSeesNothing = INT32_MIN;

    __device__ ImportanceSlot(const ImportanceArguments& arguments, int64_t b, int64_t head,
                              int64_t heads)
        : params(arguments.params) {
        const ImportanceWorkspace& work = arguments.workspace;
        const bool by_key = params.axis == ScoreAxis::kKey;
        const int64_t group = params.group();
        const int64_t key_head = head / group;
        rows = work.rows + b * params.window;
        positions = work.positions + b * params.window;
        used = work.used[b];
        begin = work.begin[b];
        const int64_t keys = work.end[b] - begin;
        query = static_cast<const T*>(params.query) + b * params.query_batch_stride +
                head * params.query_head_stride;
        key = static_cast<const T*>(params.key) + b * params.key_batch_stride +
              key_head * params.key_head_stride + begin * params.key_token_stride;
        lse = params.lse == nullptr
                  ? nullptr
                  : params.lse + b * params.lse_batch_stride + head * params.lse_head_stride;
        probes = by_key ? heads * used : keys;
        targets = by_key ? keys : used;
        // A key head's probes lie together, `used` of them for each query head.
        const int64_t slot = b * params.slots() + (by_key ? key_head : head);
        const int64_t offset =
            slot * params.probes() + (by_key ? (head - key_head * group) * used : 0);
        highest = work.highest + (lse == nullptr ? offset : 0);
        inverse = work.inverse + (lse == nullptr ? offset : 0);
    }

    __device__ __forceinline__ bool by_key() const { return params.axis == ScoreAxis::kKey; }

    __device__ __forceinline__ const T* probe(int64_t p) const {
        if (!by_key()) return key + p * params.key_token_stride;
        const int64_t head = p / used;
        return query + head * params.query_head_stride +
               rows[p - head * used] * params.query_row_stride;
    }

    __device__ __forceinline__ const T* target(int64_t t) const {
        return by_key() ? key + t * params.key_token_stride
                        : query + rows[t] * params.query_row_stride;
    }

    __device__ __forceinline__ int32_t limit(int64_t p) const {
        if (p >= probes) return kSeesNothing;
        if (!params.causal) return 0;
        return by_key() ? positions[p % used] : -static_cast<int32_t>(begin + p);
    }

    // t may lie past the targets: nobody looks at the result then.
    __device__ __forceinline__ int32_t threshold(int64_t t) const {
        if (!params.causal || t >= targets) return 0;
        return by_key() ? static_cast<int32_t>(begin + t) : -positions[t];
    }

    // Only for a given log-sum-exp, hence for axis "key".
    __device__ __forceinline__ float given_lse(int64_t p) const {
        const int64_t head = p / used;
        return lse[head * params.lse_head_stride + rows[p - head * used]];
    }
};

}  // namespace lightvlm
