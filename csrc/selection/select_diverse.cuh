// select_diverse: the greedy choice by score and dissimilarity, in one launch.
//
// Formula   Per segment, the forced tokens are chosen first; then, until the budget is full, the
//           candidate with the highest worth * (1 - strength * nearest), where nearest is its
//           largest cosine to a chosen token, at least 0 (diverse_value.h); ties to the lower
//           index.
// Rounds    nearest only grows, so a value that has not seen the latest choices is an upper bound.
//           A round takes the kPool tokens with the highest bounds (diverse_pool.cuh), compares
//           them with the choices they have not seen and with each other, and then chooses among
//           them, one by one, as long as the best of them exceeds every bound outside: some 10 to
//           60 choices a round, the same that comparing all with all would make.
// Owner     One block owns one row. A warp owns 16 tokens of the pool and half the columns of a
//           tile of mma.m16n8k16 (fp32 accumulation; fp32 features in two fp16 terms and three
//           products, diverse_features.cuh). Warp 0 chooses, kPool / 32 tokens a lane.
// Exact     Sums depend on neither batch, block size of another row nor scheduling; atomics are
//           maxima and counts.
// Shared    Under 99 KiB: the pool as fp16 (34 KiB), a tile of 64 choices, and in its place later
//           the pool's products with itself, bounds of up to 6,144 tokens (else in the workspace).
// Bound     Latency of the rounds and tensor cores of one SM: about 0.2 to 0.7 * budget * tokens *
//           channels multiplications (docs/kernels/select_diverse.md).
#pragma once

#include <climits>
#include <cmath>

#include "selection/diverse_features.cuh"
#include "selection/diverse_pool.cuh"
#include "selection/rows.cuh"
#include "selection/select_diverse.h"

namespace lightvlm {

// The workspace of one row.
struct DiverseState {
    uint32_t* keys;       // [tokens], score_key(value as far as known); kKeyNone: not free
    float* nearest;       // [tokens]
    float* scale;         // [tokens], see diverse_scale(); 0: resembles nothing
    float* inverse_norm;  // [tokens], of the scaled vector
    int32_t* seen;        // [tokens], the choices that `nearest` knows
    int32_t* chosen;      // [tokens], the segment's choices in their order

    __device__ DiverseState(int32_t* words, int64_t tokens)
        : keys(reinterpret_cast<uint32_t*>(words)),
          nearest(reinterpret_cast<float*>(words + tokens)),
          scale(reinterpret_cast<float*>(words + 2 * tokens)),
          inverse_norm(reinterpret_cast<float*>(words + 3 * tokens)),
          seen(words + 4 * tokens),
          chosen(words + 5 * tokens) {}
};

constexpr int kDiverseTile = 64;            // choices that the pool is compared with at a time
constexpr int kDiverseSharedTokens = 6144;  // whose bounds fit into shared memory

// Products of the pool's tokens a > b, at a (a - 1) / 2 + b.
__device__ __forceinline__ int pair_place(int a, int b) {
    return a > b ? a * (a - 1) / 2 + b : b * (b - 1) / 2 + a;
}

template <int kPool, int kTerms>
struct SelectDiverseShared {
    static constexpr int kThreads = 4 * kPool;
    DiverseOperand<kTerms, kPool> pool;
    union {
        DiverseOperand<kTerms, kDiverseTile> tile;
        float cosines[kPool * (kPool - 1) / 2];
    };
    RowScratch<kThreads> row;
    PoolShared<kThreads, kPool> choice;
    // Of the tokens of the pool.
    float worth[kPool];
    float scale[kPool];
    float inverse_norm[kPool];
    uint32_t nearest[kPool];  // bits of a float >= 0, which order as integers
    int32_t seen[kPool];
    float tile_inverse_norm[2][kDiverseTile];  // two tiles take turns
    int32_t taken;                             // in the latest round
    uint32_t keys[kDiverseSharedTokens];
};

// One row, one segment at a time.
template <int kPool, typename T>
struct DiverseBlock {
    static constexpr int kTerms = kDiverseTerms<T>;
    static constexpr int kThreads = 4 * kPool;
    static constexpr int kRowGroups = kPool / 16;
    static constexpr int kSteps = kDiverseChunk / 16;     // of mma in a chunk
    static constexpr int kBlocks = kDiverseTile / 8 / 2;  // of 8 columns that a warp owns
    static constexpr int kGroups = kDiverseChunk / kDiverseGroup;
    using Shared = SelectDiverseShared<kPool, kTerms>;

    const SelectDiverseParams& params;
    const DiverseFeatures<T>& features;
    const DiverseState& state;
    Shared& shared;
    uint32_t* keys;  // in shared memory or in the workspace
    int32_t choices;

    // Fragments of this warp's 16 tokens of the pool.
    struct Own {
        uint32_t a[kTerms][kSteps][4];
    };

    __device__ __forceinline__ int row_group() const {
        return static_cast<int>(threadIdx.x) / kWarpThreads % kRowGroups;
    }
    __device__ __forceinline__ int column_half() const {
        return static_cast<int>(threadIdx.x) / kWarpThreads / kRowGroups;
    }

    __device__ void stage_pool(int size, int64_t c) {
        LIGHTVLM_UNROLL
        for (int unit = threadIdx.x; unit < kPool * kGroups; unit += kThreads) {
            const int row = unit / kGroups;
            const int channel = unit % kGroups * kDiverseGroup;
            float x[kDiverseGroup] = {};
            if (row < size) features.load(shared.choice.token[row], c + channel, x);
            shared.pool.store(row, channel, x, row < size ? shared.scale[row] : 0.0f);
        }
    }

    __device__ void stage_tile(int32_t first, int64_t c, float* inverse_norm) {
        for (int unit = threadIdx.x; unit < kDiverseTile * kGroups; unit += kThreads) {
            const int row = unit / kGroups;
            const int channel = unit % kGroups * kDiverseGroup;
            float x[kDiverseGroup] = {};
            float scale = 0.0f;
            if (first + row < choices) {
                const int32_t token = state.chosen[first + row];
                scale = state.scale[token];
                features.load(token, c + channel, x);
                if (channel == 0) inverse_norm[row] = state.inverse_norm[token];
            }
            shared.tile.store(row, channel, x, scale);
        }
    }

    __device__ __forceinline__ void load_own(Own& own) const {
        const int row = row_group() * 16 + threadIdx.x % kWarpThreads / 4;
        const int pair = threadIdx.x % 4 * 2;
        LIGHTVLM_UNROLL
        for (int t = 0; t < kTerms; ++t) {
            LIGHTVLM_UNROLL
            for (int k = 0; k < kSteps; ++k) {
                LIGHTVLM_UNROLL
                for (int part = 0; part < 4; ++part) {
                    own.a[t][k][part] =
                        shared.pool.pair(t, row + part % 2 * 8, k * 16 + part / 2 * 8 + pair);
                }
            }
        }
    }

    // sums[b] += own tokens x the 8 rows of `columns` from first + 8 b on, over one chunk.
    template <int kRows>
    __device__ __forceinline__ void multiply(const Own& own,
                                             const DiverseOperand<kTerms, kRows>& columns,
                                             int first, float (&sums)[kTerms][kBlocks][4]) const {
        const int row = first + threadIdx.x % kWarpThreads / 4;
        const int pair = threadIdx.x % 4 * 2;
        LIGHTVLM_UNROLL
        for (int k = 0; k < kSteps; ++k) {
            LIGHTVLM_UNROLL
            for (int block = 0; block < kBlocks; ++block) {
                uint32_t b[kTerms][2];
                LIGHTVLM_UNROLL
                for (int t = 0; t < kTerms; ++t) {
                    b[t][0] = columns.pair(t, row + 8 * block, k * 16 + pair);
                    b[t][1] = columns.pair(t, row + 8 * block, k * 16 + 8 + pair);
                }
                ptx::mma_m16n8k16<half_t>(sums[0][block], own.a[0][k], b[0]);
                if constexpr (kTerms == 2) {
                    ptx::mma_m16n8k16<half_t>(sums[1][block], own.a[0][k], b[1]);
                    ptx::mma_m16n8k16<half_t>(sums[1][block], own.a[1][k], b[0]);
                }
            }
        }
    }

    __device__ __forceinline__ static float product(const float (&sums)[kTerms][kBlocks][4],
                                                    int block, int i) {
        if constexpr (kTerms == 2) {
            return sums[0][block][i] + sums[1][block][i] * (1.0f / kDiverseLow);
        } else {
            return sums[0][block][i];
        }
    }

    // What the pool's tokens are; the pool is in shared.choice. Returns the first choice that one
    // of them has not seen.
    __device__ int32_t load_pool(const SelectionRow& row, int size) {
        int32_t first = INT_MAX;
        for (int slot = threadIdx.x; slot < kPool; slot += kThreads) {
            shared.scale[slot] = 0.0f;
            shared.inverse_norm[slot] = 0.0f;
            shared.nearest[slot] = 0;
            shared.seen[slot] = choices;
            if (slot >= size) continue;
            const int32_t i = shared.choice.token[slot];
            const float worth = diverse_worth(row.scores[i]);
            const float scale = state.scale[i];
            shared.worth[slot] = worth;
            shared.scale[slot] = scale;
            shared.inverse_norm[slot] = state.inverse_norm[i];
            shared.nearest[slot] = __float_as_uint(state.nearest[i]);
            // Nothing times any similarity is nothing, and a zero vector resembles nothing.
            if (worth == 0.0f || scale == 0.0f) continue;
            first = state.seen[i];
            shared.seen[slot] = first;
        }
        return block_reduce<kThreads>(first, reinterpret_cast<int32_t*>(shared.row.words),
                                      [](int32_t a, int32_t b) { return a < b ? a : b; });
    }

    // Compares the pool with the choices from `first` on.
    __device__ void compare_with_choices(Own& own, int size, int32_t first) {
        const int lane = threadIdx.x % kWarpThreads;
        const int64_t channels = features.channels;
        const int columns = column_half() * kBlocks * 8;
        int32_t unseen = choices;  // the first choice that one of the own tokens has not seen
        for (int r = 0; r < 16; ++r) {
            const int32_t seen = shared.seen[row_group() * 16 + r];
            unseen = seen < unseen ? seen : unseen;
        }
        for (int32_t tile = first; tile < choices; tile += kDiverseTile) {
            const bool needed = unseen < tile + kDiverseTile && tile + columns < choices;
            // While a warp still reads these, another may be staging the next tile.
            float* inverse_norm = shared.tile_inverse_norm[(tile - first) / kDiverseTile % 2];
            float sums[kTerms][kBlocks][4] = {};
            for (int64_t c = 0; c < channels; c += kDiverseChunk) {
                if (channels > kDiverseChunk) stage_pool(size, c);
                stage_tile(tile, c, inverse_norm);
                __syncthreads();
                if (channels > kDiverseChunk) load_own(own);
                if (needed) multiply(own, shared.tile, columns, sums);
                __syncthreads();
            }
            if (!needed) continue;
            LIGHTVLM_UNROLL
            for (int part = 0; part < 2; ++part) {
                const int slot = row_group() * 16 + lane / 4 + part * 8;
                float nearest = 0.0f;
                LIGHTVLM_UNROLL
                for (int block = 0; block < kBlocks; ++block) {
                    LIGHTVLM_UNROLL
                    for (int i = 0; i < 2; ++i) {
                        const int column = columns + block * 8 + lane % 4 * 2 + i;
                        if (tile + column >= choices) continue;
                        const float cosine = product(sums, block, part * 2 + i) *
                                             (shared.inverse_norm[slot] * inverse_norm[column]);
                        nearest = cosine > nearest ? cosine : nearest;
                    }
                }
                for (int step = 1; step < 4; step *= 2) {
                    const float other = __shfl_xor_sync(kFullWarp, nearest, step);
                    nearest = other > nearest ? other : nearest;
                }
                if (lane % 4 == 0) atomicMax(&shared.nearest[slot], __float_as_uint(nearest));
            }
        }
    }

    // The cosines of the pool's tokens to each other.
    __device__ void compare_with_pool(Own& own, int size) {
        const int lane = threadIdx.x % kWarpThreads;
        const int64_t channels = features.channels;
        for (int tile = 0; tile < size; tile += kDiverseTile) {
            const int columns = tile + column_half() * kBlocks * 8;
            // Only the products of a token with those before it.
            const bool needed = columns < row_group() * 16 + 15 && columns < kPool;
            float sums[kTerms][kBlocks][4] = {};
            for (int64_t c = 0; c < channels; c += kDiverseChunk) {
                if (channels > kDiverseChunk) {
                    __syncthreads();
                    stage_pool(size, c);
                    __syncthreads();
                    load_own(own);
                }
                if (needed) multiply(own, shared.pool, columns, sums);
            }
            if (!needed) continue;
            LIGHTVLM_UNROLL
            for (int block = 0; block < kBlocks; ++block) {
                LIGHTVLM_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int a = row_group() * 16 + lane / 4 + i / 2 * 8;
                    const int b = columns + block * 8 + lane % 4 * 2 + i % 2;
                    if (b >= a) continue;
                    shared.cosines[pair_place(a, b)] =
                        product(sums, block, i) * (shared.inverse_norm[a] * shared.inverse_norm[b]);
                }
            }
        }
    }

    // Warp 0: chooses from the pool as long as its best exceeds all that is outside.
    __device__ void take(const SelectionRow& row, int size, int64_t budget) {
        constexpr int kOwn = kPool / kWarpThreads;
        const int lane = threadIdx.x;
        unsigned long long outside =
            lane < kThreads / kWarpThreads ? shared.choice.outside[lane] : 0;
        outside = warp_highest(outside);
        float worth[kOwn];
        float nearest[kOwn];
        uint32_t key[kOwn];
        uint32_t token[kOwn];
        LIGHTVLM_UNROLL
        for (int j = 0; j < kOwn; ++j) {
            const int slot = j * kWarpThreads + lane;
            key[j] = kKeyNone;
            worth[j] = 0.0f;
            nearest[j] = 0.0f;
            token[j] = UINT_MAX;
            if (slot >= size) continue;
            worth[j] = shared.worth[slot];
            nearest[j] = __uint_as_float(shared.nearest[slot]);
            token[j] = static_cast<uint32_t>(shared.choice.token[slot]);
            key[j] = score_key(
                worth[j] == 0.0f ? 0.0f : diverse_value(worth[j], params.strength, nearest[j]));
        }
        int32_t taken = 0;
        for (; taken < budget; ++taken) {
            uint32_t best = kKeyNone;
            LIGHTVLM_UNROLL
            for (int j = 0; j < kOwn; ++j) best = key[j] > best ? key[j] : best;
            best = __reduce_max_sync(kFullWarp, best);
            if (best == kKeyNone) break;
            uint32_t winner = UINT_MAX;
            int slot = 0;
            LIGHTVLM_UNROLL
            for (int j = 0; j < kOwn; ++j) {
                if (key[j] != best || token[j] >= winner) continue;
                winner = token[j];
                slot = j * kWarpThreads + lane;
            }
            const uint32_t own_winner = winner;
            winner = __reduce_min_sync(kFullWarp, winner);
            if (choice_key(best, winner) < outside) break;
            const uint32_t holder = __ballot_sync(kFullWarp, own_winner == winner);
            slot = __shfl_sync(kFullWarp, slot, __ffs(static_cast<int>(holder)) - 1);
            if (lane == 0) {
                row.inverse[winner] = 0;
                keys[winner] = kKeyNone;
                state.chosen[choices + taken] = static_cast<int32_t>(winner);
            }
            LIGHTVLM_UNROLL
            for (int j = 0; j < kOwn; ++j) {
                const int own = j * kWarpThreads + lane;
                if (own == slot) key[j] = kKeyNone;
                if (key[j] == kKeyNone || worth[j] == 0.0f) continue;
                const float cosine = shared.cosines[pair_place(own, slot)];
                nearest[j] = cosine > nearest[j] ? cosine : nearest[j];
                key[j] = score_key(diverse_value(worth[j], params.strength, nearest[j]));
            }
        }
        LIGHTVLM_UNROLL
        for (int j = 0; j < kOwn; ++j) {
            if (key[j] == kKeyNone) continue;
            keys[token[j]] = key[j];
            state.nearest[token[j]] = nearest[j];
            state.seen[token[j]] = choices + taken;
        }
        if (lane == 0) shared.taken = taken;
    }

    // Bounds before anything is compared; the forced tokens are the first choices. Returns how many
    // tokens are free.
    __device__ int32_t start(const SelectionRow& row) {
        choices = 0;
        int32_t free_tokens = 0;
        for (int64_t tile = row.begin; tile < row.end; tile += kThreads) {
            const int64_t i = tile + threadIdx.x;
            const bool own = i < row.end && row.in_segment(i);
            const bool forced = own && row.is_forced(i);
            if (i < row.end) {
                const bool free = own && row.is_candidate(i);
                keys[i] = free ? score_key(diverse_worth(row.scores[i])) : kKeyNone;
                free_tokens += free;
            }
            if (own) {
                state.nearest[i] = 0.0f;
                state.seen[i] = 0;
            }
            if (row.forced == nullptr) continue;
            uint32_t forced_here;
            const uint32_t rank = block_rank<kThreads>(forced, shared.row.words, &forced_here);
            if (forced) state.chosen[choices + rank] = static_cast<int32_t>(i);
            choices += static_cast<int32_t>(forced_here);
        }
        return block_reduce<kThreads>(free_tokens, reinterpret_cast<int32_t*>(shared.row.words),
                                      [](int32_t a, int32_t b) { return a + b; });
    }

    __device__ void choose(const SelectionRow& row) {
        int64_t budget = segment_budget(params.rows, row);
        if (budget == 0) return;
        if (budget >= start(row)) {  // whatever resembles whatever
            for (int64_t i = row.begin + threadIdx.x; i < row.end; i += kThreads) {
                if (row.is_candidate(i)) row.inverse[i] = 0;
            }
            return;
        }
        while (budget > 0) {
            const int size = fill_pool<kThreads, kPool>(keys, row.begin, row.end, shared.choice);
            if (size == 0) return;
            __syncthreads();
            const int32_t first = load_pool(row, size);
            Own own;
            if (features.channels <= kDiverseChunk) {
                stage_pool(size, 0);
                __syncthreads();
                load_own(own);
            }
            compare_with_choices(own, size, first);
            compare_with_pool(own, size);
            __syncthreads();
            if (threadIdx.x < kWarpThreads) take(row, size, budget);
            __syncthreads();
            budget -= shared.taken;
            choices += shared.taken;
        }
    }
};

// One block an SM: 128 registers a thread for 512 threads, which the fragments of the pool use.
template <int kPool, typename T>
__global__ void __launch_bounds__(4 * kPool, 1) select_diverse_kernel(SelectDiverseParams params) {
    using Block = DiverseBlock<kPool, T>;
    auto& shared = *shared_memory<typename Block::Shared>();
    const int64_t row_index = blockIdx.x;
    const int64_t tokens = params.rows.tokens;
    const DiverseState state(params.workspace + row_index * kDiverseWords * tokens, tokens);
    const DiverseFeatures<T> features(
        static_cast<const T*>(params.features) + row_index * params.features_row_stride,
        params.features_token_stride, params.channels);
    Block block{
        params, features, state, shared, tokens <= kDiverseSharedTokens ? shared.keys : state.keys,
        0};
    measure_features<Block::kThreads>(features, tokens, state.scale, state.inverse_norm);
    for_each_segment<Block::kThreads>(params.rows, row_index, shared.row,
                                      [&](const SelectionRow& row) { block.choose(row); });
    write_selection<Block::kThreads>(params.rows, row_index, shared.row);
}

}  // namespace lightvlm
