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
// Owner     One block owns one row. A warp owns 32 tokens of the pool and a quarter of the columns
//           of a tile of kPool choices, by mma.m16n8k16 (fp32 accumulation; fp32 features in two
//           fp16 terms and three products, diverse_features.cuh). Warp 0 chooses, kPool / 32 tokens
//           a lane.
// Exact     Sums depend on neither batch, block size of another row nor scheduling; atomics are
//           maxima and counts.
// Shared    Under 99 KiB: the pool as fp16 (34 KiB), as many choices, and in their place later the
//           pool's cosines to itself, bounds of up to 6,144 tokens (24 KiB; else in the workspace).
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

// The workspace of one row. Computed from one pointer: six would stay in registers.
struct DiverseState {
    int32_t* words;  // [kDiverseWords, tokens]
    int64_t tokens;

    // [tokens], score_key(value as far as known); kKeyNone: not free
    __device__ __forceinline__ uint32_t* keys() const { return reinterpret_cast<uint32_t*>(words); }
    __device__ __forceinline__ float* nearest() const { return floats(1); }
    // See diverse_scale(); 0: resembles nothing.
    __device__ __forceinline__ float* scale() const { return floats(2); }
    // Of the scaled vector.
    __device__ __forceinline__ float* inverse_norm() const { return floats(3); }
    // The choices that nearest() knows.
    __device__ __forceinline__ int32_t* seen() const { return words + 4 * tokens; }
    // The segment's choices in their order.
    __device__ __forceinline__ int32_t* chosen() const { return words + 5 * tokens; }

  private:
    __device__ __forceinline__ float* floats(int64_t place) const {
        return reinterpret_cast<float*>(words + place * tokens);
    }
};

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
        DiverseOperand<kTerms, kPool> tile;  // choices
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
    float tile_inverse_norm[2][kPool];  // two tiles take turns
    int32_t taken;                      // in the latest round
    uint32_t keys[kDiverseSharedTokens];
};

// One row, one segment at a time.
template <int kPool, typename T>
struct DiverseBlock {
    static constexpr int kTerms = kDiverseTerms<T>;
    static constexpr int kThreads = 4 * kPool;
    static constexpr int kSteps = kDiverseChunk / 16;  // of mma in a chunk
    // A warp's part of a tile: 2 x 16 rows, kBlocks x 8 columns.
    static constexpr int kRowParts = kPool / 32;
    static constexpr int kColumns = kPool / 4;
    static constexpr int kBlocks = kColumns / 8;
    static constexpr int kGroups = kDiverseChunk / kDiverseGroup;
    using Shared = SelectDiverseShared<kPool, kTerms>;

    const SelectDiverseParams& params;
    const DiverseFeatures<T>& features;
    const DiverseState& state;
    Shared& shared;
    uint32_t* keys;  // in shared memory or in the workspace
    int32_t choices;

    using Sums = float[kTerms][2][kBlocks][4];

    __device__ __forceinline__ int first_row() const {
        return static_cast<int>(threadIdx.x) / kWarpThreads % kRowParts * 32;
    }
    __device__ __forceinline__ int first_column() const {
        return static_cast<int>(threadIdx.x) / kWarpThreads / kRowParts * kColumns;
    }

    __device__ void stage_pool(int size, int32_t c) {
        LIGHTVLM_UNROLL
        for (int unit = threadIdx.x; unit < kPool * kGroups; unit += kThreads) {
            const int row = unit / kGroups;
            const int channel = unit % kGroups * kDiverseGroup;
            float x[kDiverseGroup] = {};
            if (row < size) features.load(shared.choice.token[row], c + channel, x);
            shared.pool.store(row, channel, x, row < size ? shared.scale[row] : 0.0f);
        }
    }

    __device__ void stage_tile(int32_t first, int32_t c, float* inverse_norm) {
        for (int unit = threadIdx.x; unit < kPool * kGroups; unit += kThreads) {
            const int row = unit / kGroups;
            const int channel = unit % kGroups * kDiverseGroup;
            float x[kDiverseGroup] = {};
            float scale = 0.0f;
            if (first + row < choices) {
                const int32_t token = state.chosen()[first + row];
                scale = state.scale()[token];
                features.load(token, c + channel, x);
                if (channel == 0) inverse_norm[row] = state.inverse_norm()[token];
            }
            shared.tile.store(row, channel, x, scale);
        }
    }

    // sums += own tokens of the pool x own rows of `columns`, over one chunk.
    __device__ __forceinline__ void multiply(const DiverseOperand<kTerms, kPool>& columns,
                                             Sums& sums) const {
        const int group = threadIdx.x % kWarpThreads / 4;
        const int pair = threadIdx.x % 4 * 2;
        LIGHTVLM_UNROLL_BY(4)
        for (int k = 0; k < kSteps; ++k) {
            uint32_t a[kTerms][2][4];
            uint32_t b[kTerms][kBlocks][2];
            LIGHTVLM_UNROLL
            for (int t = 0; t < kTerms; ++t) {
                LIGHTVLM_UNROLL
                for (int part = 0; part < 8; ++part) {
                    a[t][part / 4][part % 4] =
                        shared.pool.pair(t, first_row() + part / 4 * 16 + part % 2 * 8 + group,
                                         k * 16 + part % 4 / 2 * 8 + pair);
                }
                LIGHTVLM_UNROLL
                for (int part = 0; part < 2 * kBlocks; ++part) {
                    b[t][part / 2][part % 2] = columns.pair(
                        t, first_column() + part / 2 * 8 + group, k * 16 + part % 2 * 8 + pair);
                }
            }
            LIGHTVLM_UNROLL
            for (int half = 0; half < 2; ++half) {
                LIGHTVLM_UNROLL
                for (int block = 0; block < kBlocks; ++block) {
                    ptx::mma_m16n8k16<half_t>(sums[0][half][block], a[0][half], b[0][block]);
                    if constexpr (kTerms == 2) {
                        ptx::mma_m16n8k16<half_t>(sums[1][half][block], a[0][half], b[1][block]);
                        ptx::mma_m16n8k16<half_t>(sums[1][half][block], a[1][half], b[0][block]);
                    }
                }
            }
        }
    }

    // Calls body(column, product) for what this lane holds of one of its four rows.
    template <typename Body>
    __device__ __forceinline__ void for_each_product(const Sums& sums, int row, Body body) const {
        LIGHTVLM_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
            LIGHTVLM_UNROLL
            for (int i = 0; i < 2; ++i) {
                float product = sums[0][row / 2][block][row % 2 * 2 + i];
                if constexpr (kTerms == 2) {
                    product += sums[1][row / 2][block][row % 2 * 2 + i] * (1.0f / kDiverseLow);
                }
                body(first_column() + block * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i,
                     product);
            }
        }
    }

    // The slot of the lane's row in [0, 4).
    __device__ __forceinline__ int own_slot(int row) const {
        return first_row() + row * 8 + static_cast<int>(threadIdx.x) % kWarpThreads / 4;
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
            const float scale = state.scale()[i];
            shared.worth[slot] = worth;
            shared.scale[slot] = scale;
            shared.inverse_norm[slot] = state.inverse_norm()[i];
            shared.nearest[slot] = __float_as_uint(state.nearest()[i]);
            // Nothing times any similarity is nothing, and a zero vector resembles nothing.
            if (worth == 0.0f || scale == 0.0f) continue;
            first = state.seen()[i];
            shared.seen[slot] = first;
        }
        return block_reduce<kThreads>(first, reinterpret_cast<int32_t*>(shared.row.words),
                                      [](int32_t a, int32_t b) { return a < b ? a : b; });
    }

    // Compares the pool with the choices from `first` on.
    __device__ void compare_with_choices(int size, int32_t first) {
        int32_t unseen = shared.seen[first_row() + threadIdx.x % kWarpThreads];
        unseen = __reduce_min_sync(kFullWarp, unseen);
        for (int32_t tile = first; tile < choices; tile += kPool) {
            // Of the warp: a token that has not seen one of its columns.
            const bool needed =
                unseen < tile + first_column() + kColumns && tile + first_column() < choices;
            // While a warp still reads these, another may be staging the next tile.
            float* inverse_norm = shared.tile_inverse_norm[(tile - first) / kPool % 2];
            Sums sums = {};
            for (int32_t c = 0; c == 0 || c < features.channels; c += kDiverseChunk) {
                if (features.channels > kDiverseChunk) stage_pool(size, c);
                stage_tile(tile, c, inverse_norm);
                __syncthreads();
                if (needed) multiply(shared.tile, sums);
                __syncthreads();
            }
            if (!needed) continue;
            const int columns = choices - tile < kPool ? choices - tile : kPool;
            LIGHTVLM_UNROLL
            for (int row = 0; row < 4; ++row) {
                const int slot = own_slot(row);
                const float own_norm = shared.inverse_norm[slot];
                float nearest = 0.0f;
                for_each_product(sums, row, [&](int column, float product) {
                    if (column >= columns) return;
                    const float cosine = product * (own_norm * inverse_norm[column]);
                    nearest = cosine > nearest ? cosine : nearest;
                });
                for (int step = 1; step < 4; step *= 2) {
                    const float other = __shfl_xor_sync(kFullWarp, nearest, step);
                    nearest = other > nearest ? other : nearest;
                }
                if (threadIdx.x % 4 == 0) {
                    atomicMax(&shared.nearest[slot], __float_as_uint(nearest));
                }
            }
        }
    }

    // The cosines of the pool's tokens to each other.
    __device__ void compare_with_pool(int size) {
        // Only of a token to those before it.
        const bool needed = first_column() < first_row() + 31;
        Sums sums = {};
        for (int32_t c = 0; c == 0 || c < features.channels; c += kDiverseChunk) {
            if (features.channels > kDiverseChunk) {
                __syncthreads();
                stage_pool(size, c);
                __syncthreads();
            }
            if (needed) multiply(shared.pool, sums);
        }
        if (!needed) return;
        LIGHTVLM_UNROLL
        for (int row = 0; row < 4; ++row) {
            const int slot = own_slot(row);
            const float own_norm = shared.inverse_norm[slot];
            float* cosines = shared.cosines + slot * (slot - 1) / 2;
            for_each_product(sums, row, [&](int column, float product) {
                if (column >= slot) return;
                cosines[column] = product * (own_norm * shared.inverse_norm[column]);
            });
        }
    }

    // Warp 0: chooses from the pool as long as its best exceeds all that is outside.
    __device__ void take(const SelectionRow& row, int size, int32_t budget) {
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
                state.chosen()[choices + taken] = static_cast<int32_t>(winner);
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
            state.nearest()[token[j]] = nearest[j];
            state.seen()[token[j]] = choices + taken;
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
                state.nearest()[i] = 0.0f;
                state.seen()[i] = 0;
            }
            if (row.forced == nullptr) continue;
            uint32_t forced_here;
            const uint32_t rank = block_rank<kThreads>(forced, shared.row.words, &forced_here);
            if (forced) state.chosen()[choices + rank] = static_cast<int32_t>(i);
            choices += static_cast<int32_t>(forced_here);
        }
        return block_reduce<kThreads>(free_tokens, reinterpret_cast<int32_t*>(shared.row.words),
                                      [](int32_t a, int32_t b) { return a + b; });
    }

    __device__ void choose(const SelectionRow& row) {
        const int64_t wanted = segment_budget(params.rows, row);
        if (wanted == 0) return;
        if (wanted >= start(row)) {  // whatever resembles whatever
            for (int64_t i = row.begin + threadIdx.x; i < row.end; i += kThreads) {
                if (row.is_candidate(i)) row.inverse[i] = 0;
            }
            return;
        }
        int32_t budget = static_cast<int32_t>(wanted);
        while (budget > 0) {
            const int size =
                fill_pool<kThreads, kPool>(keys, static_cast<uint32_t>(row.begin),
                                           static_cast<uint32_t>(row.end), shared.choice);
            if (size == 0) return;
            __syncthreads();
            const int32_t first = load_pool(row, size);
            if (features.channels <= kDiverseChunk) {
                stage_pool(size, 0);
                __syncthreads();
            }
            compare_with_choices(size, first);
            compare_with_pool(size);
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
    const DiverseState state{params.workspace + row_index * kDiverseWords * tokens, tokens};
    const DiverseFeatures<T> features(
        static_cast<const T*>(params.features) + row_index * params.features_row_stride,
        params.features_token_stride, params.channels);
    Block block{params,
                features,
                state,
                shared,
                tokens <= kDiverseSharedTokens ? shared.keys : state.keys(),
                0};
    measure_features<Block::kThreads>(features, tokens, state.scale(), state.inverse_norm());
    for_each_segment<Block::kThreads>(params.rows, row_index, shared.row,
                                      [&](const SelectionRow& row) { block.choose(row); });
    write_selection<Block::kThreads>(params.rows, row_index, shared.row);
}

}  // namespace lightvlm
