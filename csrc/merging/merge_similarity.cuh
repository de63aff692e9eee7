// The second launch of merge_tokens, and of merge_pairs for large windows: each dropped token's
// most similar kept one. (In merge_pairs the dropped ones are the sources, the kept ones the
// destinations.)
//
// Formula   best[d] = max over kept tokens c of d's group of
//           score_key(dot(d, c) * inverse_length(c)) << 32 | ~c
// Owner     A block owns a tile of 64 dropped x 64 kept tokens over the whole width, and hands the
//           best of each row to an atomic maximum over integers: exact, in any order, and ties
//           go to the lower kept token. Tiles without a common group end at once.
// Problem   Who stands at which position: a struct with the metric, and
//               bool may_match(row, first_dropped, first_kept)   false: the tile has no pair
//               SimilarityToken dropped(row, position), kept(row, position)
//               unsigned long long* best(row)                    by position of the dropped token
// Shared    General: 64 x 2 rows of 16 values. Tensor cores: three stages of 64 x 2 rows of 64
//           values, rows 16 bytes longer than that so that fragments load without bank conflicts.
// Bound     FLOPs: 2 * kept * dropped * width; fragments of shared memory come first on the
//           tensor-core path, at about half of what mma.sync can do.
#pragma once

#include <type_traits>

#include "common/block.cuh"
#include "common/ptx.cuh"
#include "merging/merge_numbers.h"
#include "merging/merge_vector.cuh"

namespace lightvlm {

constexpr int kSimilarityTile = 64;

// A token of a tile; the default stands past the end, and for bad entries.
struct SimilarityToken {
    int32_t token = -1;
    int32_t group = -1;
    float scale = 0.0f;  // 0 where there is no token
    float inverse = 0.0f;
};

// The vectors that are compared. Strides in elements.
struct SimilarityMetric {
    const void* data;
    int64_t width;
    int64_t row_stride;
    int64_t token_stride;
};

// The tokens of one block's tile.
struct SimilarityTokens {
    int32_t dropped[kSimilarityTile];  // -1 past the end
    int32_t kept[kSimilarityTile];     // -1 past the end, and for bad entries
    int32_t dropped_group[kSimilarityTile];
    int32_t kept_group[kSimilarityTile];
    float dropped_scale[kSimilarityTile];  // 0 where there is no token
    float kept_scale[kSimilarityTile];
    float kept_inverse[kSimilarityTile];
};

// Where a block works.
struct SimilarityTile {
    int64_t row;
    int64_t first_dropped;
    int64_t first_kept;
};

__device__ __forceinline__ SimilarityTile similarity_tile(uint32_t dropped_tiles,
                                                          uint32_t kept_tiles) {
    const uint32_t tile = blockIdx.x % (dropped_tiles * kept_tiles);
    return {static_cast<int64_t>(blockIdx.x / (dropped_tiles * kept_tiles)),
            static_cast<int64_t>(tile / kept_tiles) * kSimilarityTile,
            static_cast<int64_t>(tile % kept_tiles) * kSimilarityTile};
}

// Fills in the tokens. False, in each thread, where no pair of the tile has a group in common.
template <int kThreads, typename Problem>
__device__ bool load_similarity_tokens(const Problem& problem, const SimilarityTile& tile,
                                       SimilarityTokens& tokens) {
    if (!problem.may_match(tile.row, tile.first_dropped, tile.first_kept)) return false;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kSimilarityTile; i += kThreads) {
        const int at = i % kSimilarityTile;
        if (i >= kSimilarityTile) {
            const SimilarityToken one = problem.kept(tile.row, tile.first_kept + at);
            tokens.kept[at] = one.token;
            tokens.kept_group[at] = one.group;
            tokens.kept_scale[at] = one.scale;
            tokens.kept_inverse[at] = one.inverse;
        } else {
            const SimilarityToken one = problem.dropped(tile.row, tile.first_dropped + at);
            tokens.dropped[at] = one.token;
            tokens.dropped_group[at] = one.group;
            tokens.dropped_scale[at] = one.scale;
        }
    }
    __syncthreads();
    constexpr int kPerRow = kThreads / kSimilarityTile;
    const int row = static_cast<int>(threadIdx.x) / kPerRow;
    bool match = false;
    for (int c = static_cast<int>(threadIdx.x) % kPerRow; c < kSimilarityTile; c += kPerRow) {
        match = match ||
                (tokens.kept_group[c] >= 0 && tokens.kept_group[c] == tokens.dropped_group[row]);
    }
    return __syncthreads_or(match ? 1 : 0) != 0;
}

// What best[] holds for a pair of the tile; 0 where they have no group in common.
__device__ __forceinline__ unsigned long long pair_value(const SimilarityTokens& tokens, int row,
                                                         int column, float dot) {
    const int32_t group = tokens.kept_group[column];
    if (group < 0 || group != tokens.dropped_group[row]) return 0;
    const uint32_t key = score_key(dot * tokens.kept_inverse[column]);
    return static_cast<unsigned long long>(key) << 32 | ~static_cast<uint32_t>(tokens.kept[column]);
}

// The highest value of the kLanes neighbouring lanes that share a row goes to the dropped token.
template <int kLanes, typename Problem>
__device__ __forceinline__ void report_best(const Problem& problem, const SimilarityTile& tile,
                                            int row, unsigned long long value) {
    for (int step = kLanes / 2; step > 0; step /= 2) {
        const unsigned long long other = __shfl_xor_sync(kFullWarp, value, step);
        value = other > value ? other : value;
    }
    if (value == 0 || threadIdx.x % kLanes != 0) return;
    atomicMax(problem.best(tile.row) + tile.first_dropped + row, value);
}

// Any dtype, any alignment.
constexpr int kGeneralThreads = 256;
constexpr int kGeneralDepth = 16;

struct GeneralShared {
    SimilarityTokens tokens;
    float dropped[kGeneralDepth][kSimilarityTile + 4];
    float kept[kGeneralDepth][kSimilarityTile + 4];
};

template <typename T, typename Problem>
__global__ void __launch_bounds__(kGeneralThreads)
    merge_similarity_kernel(const __grid_constant__ Problem problem, uint32_t dropped_tiles,
                            uint32_t kept_tiles) {
    auto& shared = *shared_memory<GeneralShared>();
    const SimilarityTile tile = similarity_tile(dropped_tiles, kept_tiles);
    if (!load_similarity_tokens<kGeneralThreads>(problem, tile, shared.tokens)) return;
    const SimilarityMetric& vectors = problem.metric;
    const T* metric = static_cast<const T*>(vectors.data) + tile.row * vectors.row_stride;
    const auto load = [&](int32_t token, float scale, int64_t k) {
        if (scale == 0.0f || k >= vectors.width) return 0.0f;
        return to_float(metric[token * vectors.token_stride + k]) * scale;
    };

    // A thread owns 4 x 4 pairs, 16 apart.
    constexpr int kOwn = 4;
    constexpr int kStep = kSimilarityTile / kOwn;
    const int own_row = static_cast<int>(threadIdx.x) / kStep;
    const int own_column = static_cast<int>(threadIdx.x) % kStep;
    float sums[kOwn][kOwn] = {};
    for (int64_t k0 = 0; k0 < vectors.width; k0 += kGeneralDepth) {
        for (int i = static_cast<int>(threadIdx.x); i < kSimilarityTile * kGeneralDepth;
             i += kGeneralThreads) {
            const int k = i % kGeneralDepth;
            const int at = i / kGeneralDepth;
            shared.dropped[k][at] =
                load(shared.tokens.dropped[at], shared.tokens.dropped_scale[at], k0 + k);
            shared.kept[k][at] = load(shared.tokens.kept[at], shared.tokens.kept_scale[at], k0 + k);
        }
        __syncthreads();
        for (int k = 0; k < kGeneralDepth; ++k) {
            LIGHTVLM_UNROLL
            for (int r = 0; r < kOwn; ++r) {
                const float dropped = shared.dropped[k][own_row + r * kStep];
                LIGHTVLM_UNROLL
                for (int c = 0; c < kOwn; ++c) {
                    sums[r][c] =
                        __fmaf_rn(dropped, shared.kept[k][own_column + c * kStep], sums[r][c]);
                }
            }
        }
        __syncthreads();
    }
    LIGHTVLM_UNROLL
    for (int r = 0; r < kOwn; ++r) {
        unsigned long long best = 0;
        LIGHTVLM_UNROLL
        for (int c = 0; c < kOwn; ++c) {
            const unsigned long long value =
                pair_value(shared.tokens, own_row + r * kStep, own_column + c * kStep, sums[r][c]);
            best = value > best ? value : best;
        }
        report_best<kStep>(problem, tile, own_row + r * kStep, best);
    }
}

// 16-bit dtypes on tensor cores: rows of whole, aligned pieces of 16 bytes.
constexpr int kTensorThreads = 128;
constexpr int kTensorDepth = 64;
constexpr int kTensorPitch = kTensorDepth + 8;
constexpr int kTensorStages = 3;

struct TensorShared {
    SimilarityTokens tokens;
    __align__(16) uint16_t dropped[kTensorStages][kSimilarityTile][kTensorPitch];
    __align__(16) uint16_t kept[kTensorStages][kSimilarityTile][kTensorPitch];
};

// Starts to load one stage: 64 tokens' values [k0, k0 + 64).
template <typename T>
__device__ __forceinline__ void load_stage(const SimilarityMetric& vectors, const T* metric,
                                           const int32_t* tokens, const float* scales, int64_t k0,
                                           uint16_t (*stage)[kTensorPitch]) {
    constexpr int kPiece = 8;
    constexpr int kPieces = kTensorDepth / kPiece;
    for (int i = static_cast<int>(threadIdx.x); i < kSimilarityTile * kPieces;
         i += kTensorThreads) {
        const int at = i / kPieces;
        const int64_t k = k0 + i % kPieces * kPiece;
        uint16_t* to = &stage[at][i % kPieces * kPiece];
        const float scale = k < vectors.width ? scales[at] : 0.0f;
        const bool read = scale != 0.0f;
        const T* from = read ? metric + tokens[at] * vectors.token_stride + k : metric;
        if (scale == 1.0f || scale == 0.0f) {
            ptx::cp_async_16(to, from, read);
            continue;
        }
        float values[kPiece];
        load_floats<kPiece>(from, values);
        for (float& value : values) value *= scale;
        store_floats<kPiece>(reinterpret_cast<T*>(to), values);
    }
    ptx::cp_async_commit();
}

__device__ __forceinline__ uint32_t load_pair(const uint16_t* values) {
    return *reinterpret_cast<const uint32_t*>(values);
}

template <typename T, typename Problem>
__global__ void __launch_bounds__(kTensorThreads)
    merge_similarity_tensor_kernel(const __grid_constant__ Problem problem, uint32_t dropped_tiles,
                                   uint32_t kept_tiles) {
    auto& shared = *shared_memory<TensorShared>();
    const SimilarityTile tile = similarity_tile(dropped_tiles, kept_tiles);
    if (!load_similarity_tokens<kTensorThreads>(problem, tile, shared.tokens)) return;
    const SimilarityMetric& vectors = problem.metric;
    const T* metric = static_cast<const T*>(vectors.data) + tile.row * vectors.row_stride;
    const int64_t depths = (vectors.width + kTensorDepth - 1) / kTensorDepth;
    const auto load = [&](int64_t depth) {
        const int stage = static_cast<int>(depth % kTensorStages);
        load_stage<T>(vectors, metric, shared.tokens.dropped, shared.tokens.dropped_scale,
                      depth * kTensorDepth, shared.dropped[stage]);
        load_stage<T>(vectors, metric, shared.tokens.kept, shared.tokens.kept_scale,
                      depth * kTensorDepth, shared.kept[stage]);
    };

    // Four warps, each 32 x 32 pairs: 2 x 4 tiles of mma.m16n8k16.
    constexpr int kRowTiles = 2;
    constexpr int kColumnTiles = 4;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int warp_row = warp / 2 * 16 * kRowTiles;
    const int warp_column = warp % 2 * 8 * kColumnTiles;
    // Of the fragments: lane = 4 * fragment_row + fragment_pair.
    const int fragment_row = lane / 4;
    const int fragment_pair = lane % 4 * 2;
    float sums[kRowTiles][kColumnTiles][4] = {};

    for (int64_t depth = 0; depth < kTensorStages - 1; ++depth) load(depth);
    for (int64_t depth = 0; depth < depths; ++depth) {
        // Each load() closes two groups; those of the next depth may still be under way.
        ptx::cp_async_wait<2 * (kTensorStages - 2)>();
        __syncthreads();
        load(depth + kTensorStages - 1);
        const int stage = static_cast<int>(depth % kTensorStages);
        LIGHTVLM_UNROLL
        for (int k = 0; k < kTensorDepth; k += 16) {
            uint32_t rows[kRowTiles][4];
            uint32_t columns[kColumnTiles][2];
            LIGHTVLM_UNROLL
            for (int r = 0; r < kRowTiles; ++r) {
                LIGHTVLM_UNROLL
                for (int part = 0; part < 4; ++part) {
                    const int row = warp_row + 16 * r + fragment_row + part % 2 * 8;
                    rows[r][part] =
                        load_pair(&shared.dropped[stage][row][k + fragment_pair + part / 2 * 8]);
                }
            }
            LIGHTVLM_UNROLL
            for (int c = 0; c < kColumnTiles; ++c) {
                LIGHTVLM_UNROLL
                for (int part = 0; part < 2; ++part) {
                    const int column = warp_column + 8 * c + fragment_row;
                    columns[c][part] =
                        load_pair(&shared.kept[stage][column][k + fragment_pair + part * 8]);
                }
            }
            LIGHTVLM_UNROLL
            for (int r = 0; r < kRowTiles; ++r) {
                LIGHTVLM_UNROLL
                for (int c = 0; c < kColumnTiles; ++c) {
                    ptx::mma_m16n8k16<T>(sums[r][c], rows[r], columns[c]);
                }
            }
        }
    }
    ptx::cp_async_wait<0>();
    LIGHTVLM_UNROLL
    for (int r = 0; r < kRowTiles; ++r) {
        LIGHTVLM_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + 16 * r + 8 * half + fragment_row;
            unsigned long long best = 0;
            LIGHTVLM_UNROLL
            for (int c = 0; c < kColumnTiles; ++c) {
                LIGHTVLM_UNROLL
                for (int of_pair = 0; of_pair < 2; ++of_pair) {
                    const int column = warp_column + 8 * c + fragment_pair + of_pair;
                    const unsigned long long value =
                        pair_value(shared.tokens, row, column, sums[r][c][2 * half + of_pair]);
                    best = value > best ? value : best;
                }
            }
            report_best<4>(problem, tile, row, best);
        }
    }
}

}  // namespace lightvlm
