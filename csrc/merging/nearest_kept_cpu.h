// For each dropped token of a group the most similar kept one: a blocked matrix product with a
// running argmax. Blocks of kept tokens are packed once for all threads; no matrix of similarities
// is stored beyond a block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "common/parallel.h"
#include "merging/product_tile_cpu.h"

namespace lightvlm {

// One group's tokens, and what is known of all tokens of the row.
template <typename T>
struct NearestKept {
    const T* metric;  // token t at metric + t * stride
    int64_t stride;
    int64_t width;
    const float* scale;    // by token: multiplied with first; 0 stands for a zero vector
    const float* inverse;  // by token: 1 / length of the scaled vector
    const int32_t* kept;
    const int32_t* dropped;
    int64_t kept_count;
    int64_t dropped_count;
};

namespace nearest_detail {

constexpr int64_t kBlockColumns = 12 * kPanelColumns;
constexpr int64_t kBlockRows = 8 * kTileRows;
constexpr int64_t kUnits = 512;          // of k at a time: a panel's share stays in the L2 cache
constexpr int64_t kPitch = kUnits + 16;  // rows of a tile fall into different cache sets

// n elements of a vector, scaled, as units; the rest of `units` is zero.
template <typename T>
struct StageVector {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const T* from, float scale, int64_t n, bool pairs,
                                    int64_t units, uint32_t* to) {
        if (scale == 0.0f) n = 0;
        if (pairs) {
            if constexpr (std::is_same_v<T, bfloat16_t>) {
                auto* target = reinterpret_cast<uint16_t*>(to);
                if (scale == 1.0f) {
                    std::memcpy(target, from, static_cast<size_t>(n) * sizeof(T));
                } else {
                    for (int64_t i = 0; i < n; ++i) {
                        target[i] = from_float<bfloat16_t>(to_float(from[i]) * scale).bits;
                    }
                }
                std::memset(target + n, 0, static_cast<size_t>(2 * units - n) * sizeof(uint16_t));
            }
            return;
        }
        for (int64_t i = 0; i < n; ++i) {
            to[i] = float16_detail::float_bits(to_float(from[i]) * scale);
        }
        std::memset(to + n, 0, static_cast<size_t>(units - n) * sizeof(uint32_t));
    }
};

// panel[k][column] = rows[column][k].
struct TransposePanel {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const uint32_t* rows, int64_t pitch, int64_t units,
                                    uint32_t* panel) {
        constexpr int64_t kStep = 16;
        for (int64_t k0 = 0; k0 < units; k0 += kStep) {
            const int64_t n = std::min(kStep, units - k0);
            for (int64_t column = 0; column < kPanelColumns; ++column) {
                const uint32_t* row = rows + column * pitch + k0;
                uint32_t* to = panel + k0 * kPanelColumns + column;
                for (int64_t k = 0; k < n; ++k) to[k * kPanelColumns] = row[k];
            }
        }
    }
};

// The highest product * inverse; of equals the first. best is that of the columns before.
struct UpdateBest {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const float* products, const float* inverse, int64_t n,
                                    int32_t first, float* best, int32_t* best_at) {
        constexpr int kLanes = 16;
        float lane_best[kLanes];
        int32_t lane_at[kLanes];
        for (int l = 0; l < kLanes; ++l) {
            lane_best[l] = -std::numeric_limits<float>::infinity();
            lane_at[l] = 0;
        }
        int64_t j = 0;
        for (; j + kLanes <= n; j += kLanes) {
            for (int l = 0; l < kLanes; ++l) {
                const float value = products[j + l] * inverse[j + l];
                const bool higher = value > lane_best[l];
                lane_best[l] = higher ? value : lane_best[l];
                lane_at[l] = higher ? static_cast<int32_t>(j) + l : lane_at[l];
            }
        }
        float highest = *best;
        int32_t at = *best_at - first;  // of an earlier block: negative, so that it wins ties
        for (int l = 0; l < kLanes; ++l) {
            if (lane_best[l] > highest || (lane_best[l] == highest && lane_at[l] < at)) {
                highest = lane_best[l];
                at = lane_at[l];
            }
        }
        for (; j < n; ++j) {
            const float value = products[j] * inverse[j];
            if (value > highest) {
                highest = value;
                at = static_cast<int32_t>(j);
            }
        }
        *best = highest;
        *best_at = at + first;
    }
};

template <typename T>
struct Block {
    const NearestKept<T>& group;
    bool pairs;
    int64_t units;  // of a whole vector
    int64_t first;  // kept tokens [first, first + columns)
    int64_t columns;
    std::vector<uint32_t>& panels;  // [columns / kPanelColumns][units][kPanelColumns]
    std::vector<float>& inverse;    // by column
    MultiplyTile multiply;

    int64_t panel_count() const { return (columns + kPanelColumns - 1) / kPanelColumns; }
    uint32_t* panel(int64_t p) const { return panels.data() + p * units * kPanelColumns; }

    void stage(int32_t token, int64_t unit, int64_t n_units, uint32_t* to) const {
        const int64_t per_unit = pairs ? 2 : 1;
        const int64_t begin = unit * per_unit;
        const int64_t n = std::min(group.width - begin, n_units * per_unit);
        multiversion<StageVector<T>>(group.metric + token * group.stride + begin,
                                     group.scale[token], n, pairs, n_units, to);
    }

    void pack(int64_t p) const {
        alignas(64) uint32_t rows[kPanelColumns * (kTranspose + 16)];
        constexpr int64_t pitch = kTranspose + 16;
        for (int64_t unit = 0; unit < units; unit += kTranspose) {
            const int64_t n = std::min(kTranspose, units - unit);
            for (int64_t c = 0; c < kPanelColumns; ++c) {
                const int64_t column = p * kPanelColumns + c;
                if (column < columns) {
                    stage(group.kept[first + column], unit, n, rows + c * pitch);
                } else {
                    std::memset(rows + c * pitch, 0, static_cast<size_t>(n) * sizeof(uint32_t));
                }
            }
            multiversion<TransposePanel>(static_cast<const uint32_t*>(rows), pitch, n,
                                         panel(p) + unit * kPanelColumns);
        }
    }

    // Dropped tokens [begin, end), at most kBlockRows of them.
    void search(int64_t begin, int64_t end, uint32_t* rows, float* products, float* best,
                int32_t* best_at) const {
        const int64_t out_pitch = panel_count() * kPanelColumns;
        const int64_t tiles = (end - begin + kTileRows - 1) / kTileRows;
        for (int64_t unit = 0; unit < units; unit += kUnits) {
            const int64_t n = std::min(kUnits, units - unit);
            for (int64_t r = 0; r < tiles * kTileRows; ++r) {
                // Rows past the end repeat the last one; nobody reads their products.
                stage(group.dropped[std::min(begin + r, end - 1)], unit, n, rows + r * kPitch);
            }
            for (int64_t p = 0; p < panel_count(); ++p) {
                for (int64_t t = 0; t < tiles; ++t) {
                    multiply({rows + t * kTileRows * kPitch, kPitch,
                              panel(p) + unit * kPanelColumns, n,
                              products + t * kTileRows * out_pitch + p * kPanelColumns, out_pitch,
                              unit == 0});
                }
            }
        }
        for (int64_t d = begin; d < end; ++d) {
            multiversion<UpdateBest>(static_cast<const float*>(products + (d - begin) * out_pitch),
                                     static_cast<const float*>(inverse.data()), columns,
                                     static_cast<int32_t>(first), best + d, best_at + d);
        }
    }

    static constexpr int64_t kTranspose = 128;
};

}  // namespace nearest_detail

// nearest[d] gets the position in `kept` of the token most similar to dropped[d], and best[d] their
// product times the kept one's inverse length. width > 0.
template <typename T>
void find_nearest_kept(const NearestKept<T>& group, int32_t* nearest, float* best) {
    using namespace nearest_detail;
    const bool pairs = std::is_same_v<T, bfloat16_t> && has_bf16_products();
    const int64_t units = pairs ? (group.width + 1) / 2 : group.width;
    const int64_t threads = torch::stable::get_num_threads();
    // Row blocks as large as they go, and as many for each thread.
    const int64_t rounds =
        (group.dropped_count + threads * kBlockRows - 1) / (threads * kBlockRows);
    const int64_t even = (group.dropped_count + threads * rounds - 1) / (threads * rounds);
    const int64_t block_rows = (even + kTileRows - 1) / kTileRows * kTileRows;
    const int64_t row_blocks = (group.dropped_count + block_rows - 1) / block_rows;

    std::fill_n(best, group.dropped_count, -std::numeric_limits<float>::infinity());
    std::fill_n(nearest, group.dropped_count, 0);
    const int64_t most_columns = std::min(kBlockColumns, group.kept_count);
    const int64_t most_panels = (most_columns + kPanelColumns - 1) / kPanelColumns;
    std::vector<uint32_t> panels(static_cast<size_t>(most_panels * units * kPanelColumns));
    std::vector<float> inverse(static_cast<size_t>(most_columns));
    for (int64_t first = 0; first < group.kept_count; first += kBlockColumns) {
        const int64_t columns = std::min(kBlockColumns, group.kept_count - first);
        const Block<T> block{group,   pairs,  units,   first,
                             columns, panels, inverse, multiply_tile(pairs)};
        for (int64_t c = 0; c < columns; ++c) inverse[c] = group.inverse[group.kept[first + c]];
        parallel_dynamic(block.panel_count(), units * kPanelColumns,
                         [&](int64_t p) { block.pack(p); });
        parallel_items(row_blocks, kParallelGrain, [&](int64_t begin, int64_t end) {
            const auto rows = std::make_unique_for_overwrite<uint32_t[]>(block_rows * kPitch);
            const auto products = std::make_unique_for_overwrite<float[]>(
                block_rows * block.panel_count() * kPanelColumns);
            for (int64_t b = begin; b < end; ++b) {
                block.search(b * block_rows, std::min((b + 1) * block_rows, group.dropped_count),
                             rows.get(), products.get(), best, nearest);
            }
        });
    }
}

}  // namespace lightvlm
