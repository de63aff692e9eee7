// A blocked matrix product of dropped with kept tokens whose error is bounded, and who may be the
// best of a row within the bound. No matrix of similarities is stored beyond a block of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
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
    float* scale;    // by token, measured: multiplied with first; 0 stands for a zero vector
    float* inverse;  // by token, measured: 1 / length of the scaled vector
    const int32_t* kept;
    const int32_t* dropped;
    int64_t kept_count;
    int64_t dropped_count;
};

namespace nearest_detail {

constexpr int64_t kBlockPanels = 12;
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

// With product p of the row and a column, as it comes out of the tiles:
//   value = (p + offset) * row.step * column.step + column.bias
//   error = row.residual * column.length + row.length * column.residual
struct ScreenRow {
    float step;
    int32_t offset;
    float residual;
    float length;
    float slack;  // what rounding adds to the difference of two
};

struct ScreenColumns {
    std::vector<float> step, bias, length, residual;

    explicit ScreenColumns(int64_t columns)
        : step(columns), bias(columns), length(columns), residual(columns) {}

    void set(int64_t c, float its_step, float its_bias, float its_length, float its_residual) {
        step[c] = its_step;
        bias[c] = its_bias;
        length[c] = its_length;
        residual[c] = its_residual;
    }
};

// Columns whose value + error reaches the highest value - error, ascending, and that sum. left has
// room for all.
template <typename Product>
struct LeaveColumns {
    template <CpuLevel level>
    static LIGHTVLM_INLINE int64_t run(const Product* products, ScreenRow row, const float* step,
                                       const float* bias, const float* length,
                                       const float* residual, int64_t n, float* upper,
                                       int32_t* left) {
        constexpr int kLanes = 16;
        float lower[kLanes];
        for (float& one : lower) one = -3.0e38f;
        const auto look_at = [&](int64_t c, float* lowest) {
            float product;
            if constexpr (std::is_same_v<Product, int32_t>) {
                product = static_cast<float>(products[c] + row.offset);
            } else {
                product = products[c];
            }
            const float value = product * row.step * step[c] + bias[c];
            const float error = row.residual * length[c] + row.length * residual[c];
            upper[c] = value + error;
            const float under = value - error;
            *lowest = under > *lowest ? under : *lowest;
        };
        int64_t c = 0;
        for (; c + kLanes <= n; c += kLanes) {
            for (int l = 0; l < kLanes; ++l) look_at(c + l, &lower[l]);
        }
        for (; c < n; ++c) look_at(c, &lower[0]);
        float limit = lower[0];
        for (int l = 1; l < kLanes; ++l) limit = lower[l] > limit ? lower[l] : limit;
        limit -= row.slack;
        int64_t count = 0;
        for (c = 0; c + kLanes <= n; c += kLanes) {
            int32_t any = 0;
            for (int l = 0; l < kLanes; ++l) any |= upper[c + l] >= limit ? 1 : 0;
            if (any == 0) continue;
            for (int l = 0; l < kLanes; ++l) {
                left[count] = static_cast<int32_t>(c) + l;
                count += upper[c + l] >= limit ? 1 : 0;
            }
        }
        for (; c < n; ++c) {
            left[count] = static_cast<int32_t>(c);
            count += upper[c] >= limit ? 1 : 0;
        }
        return count;
    }
};

// The columns left for a row, ascending, and value + error of each.
struct LeftColumns {
    const int32_t* column;
    const float* upper;
    int64_t count;
};

// What a thread needs for a block of rows.
class ScreenBlock {
  public:
    ScreenBlock(int64_t columns, int64_t out_pitch)
        : out_pitch_(out_pitch),
          products_(std::make_unique_for_overwrite<uint32_t[]>(kBlockRows * out_pitch)),
          staged_(std::make_unique_for_overwrite<uint32_t[]>(kBlockRows * kPitch)),
          upper_(std::make_unique_for_overwrite<float[]>(columns + 1)),
          begin_(kBlockRows + 1, 0) {}

    uint32_t* products(int64_t row) { return products_.get() + row * out_pitch_; }
    uint32_t* staged(int64_t row) { return staged_.get() + row * kPitch; }
    LeftColumns left(int64_t row) const {
        return {left_.data() + begin_[row], left_upper_.data() + begin_[row],
                begin_[row + 1] - begin_[row]};
    }

  private:
    friend class Screen;
    int64_t out_pitch_;
    std::unique_ptr<uint32_t[]> products_;
    std::unique_ptr<uint32_t[]> staged_;
    std::unique_ptr<float[]> upper_;
    std::vector<int32_t> left_;  // columns, row by row
    std::vector<float> left_upper_;
    std::vector<int64_t> begin_;
};

class Screen {
  public:
    Screen(ProductUnit unit, int64_t columns, int64_t units)
        : columns_(columns),
          units_(units),
          panels_((columns + kPanelColumns - 1) / kPanelColumns),
          packed_(std::make_unique_for_overwrite<uint32_t[]>(panels_ * units * kPanelColumns)),
          multiply_tile_(lightvlm::multiply_tile(unit)) {}

    // stage(column, unit, n, to): units [unit, unit + n) of a column.
    template <typename Stage>
    void pack(const Stage& stage) const {
        parallel_dynamic(panels_, units_ * kPanelColumns, [&](int64_t p) {
            alignas(64) uint32_t rows[kPanelColumns * kTransposePitch];
            for (int64_t unit = 0; unit < units_; unit += kTranspose) {
                const int64_t n = std::min(kTranspose, units_ - unit);
                for (int64_t c = 0; c < kPanelColumns; ++c) {
                    const int64_t column = p * kPanelColumns + c;
                    if (column < columns_) {
                        stage(column, unit, n, rows + c * kTransposePitch);
                    } else {
                        std::memset(rows + c * kTransposePitch, 0,
                                    static_cast<size_t>(n) * sizeof(uint32_t));
                    }
                }
                multiversion<TransposePanel>(static_cast<const uint32_t*>(rows), kTransposePitch, n,
                                             panel(p) + unit * kPanelColumns);
            }
        });
    }

    // work(block, begin, end) over all rows, in blocks of at most kBlockRows, by threads.
    template <typename Work>
    void for_rows(int64_t rows, const Work& work) const {
        const int64_t threads = torch::stable::get_num_threads();
        // Row blocks as large as they go, and as many for each thread.
        const int64_t rounds = (rows + threads * kBlockRows - 1) / (threads * kBlockRows);
        const int64_t even = (rows + threads * rounds - 1) / (threads * rounds);
        const int64_t block_rows = (even + kTileRows - 1) / kTileRows * kTileRows;
        const int64_t blocks = (rows + block_rows - 1) / block_rows;
        parallel_items(blocks, kParallelGrain, [&](int64_t begin, int64_t end) {
            ScreenBlock block(columns_, panels_ * kPanelColumns);
            for (int64_t b = begin; b < end; ++b) {
                work(block, b * block_rows, std::min((b + 1) * block_rows, rows));
            }
        });
    }

    // row(r, unit, n): where units [unit, unit + n) of row r stand, kPitch or a pitch of the caller
    // apart for r, r + 1, ...; called for each row of a tile, for the same units one after another.
    template <typename RowAt>
    void multiply(ScreenBlock& block, int64_t rows, const RowAt& row) const {
        const int64_t out_pitch = panels_ * kPanelColumns;
        const int64_t whole = rows / kTileRows;
        for (int64_t first = 0; first < panels_; first += kBlockPanels) {
            const int64_t last = std::min(first + kBlockPanels, panels_);
            for (int64_t unit = 0; unit < units_; unit += kUnits) {
                const int64_t n = std::min(kUnits, units_ - unit);
                const uint32_t* at[kBlockRows];
                for (int64_t r = 0; r < rows; ++r) at[r] = row(r, unit, n);
                const int64_t pitch = rows > 1 ? at[1] - at[0] : 0;
                if (whole * kTileRows < rows) stage_rest(block, at, whole * kTileRows, rows, n);
                for (int64_t p = first; p < last; ++p) {
                    const uint32_t* share = panel(p) + unit * kPanelColumns;
                    for (int64_t t = 0; t * kTileRows < rows; ++t) {
                        const bool rest = t == whole;
                        multiply_tile_({rest ? block.staged(whole * kTileRows) : at[t * kTileRows],
                                        rest ? kPitch : pitch, share, n,
                                        block.products(t * kTileRows) + p * kPanelColumns,
                                        out_pitch, unit == 0});
                    }
                }
            }
        }
    }

    // Which columns may be the best of a row of the block; rows one after another. Returns how
    // many.
    template <typename Product>
    int64_t leave(ScreenBlock& block, int64_t row, const ScreenRow& terms,
                  const ScreenColumns& columns) const {
        const int64_t begin = row == 0 ? 0 : block.begin_[row];
        block.left_.resize(static_cast<size_t>(begin + columns_ + 1));
        const int64_t count = multiversion<LeaveColumns<Product>>(
            reinterpret_cast<const Product*>(block.products(row)), terms, columns.step.data(),
            columns.bias.data(), columns.length.data(), columns.residual.data(), columns_,
            block.upper_.get(), block.left_.data() + begin);
        block.begin_[row] = begin;
        block.begin_[row + 1] = begin + count;
        block.left_.resize(static_cast<size_t>(begin + count));
        block.left_upper_.resize(static_cast<size_t>(begin + count));
        for (int64_t i = begin; i < begin + count; ++i) {
            block.left_upper_[i] = block.upper_[block.left_[i]];
        }
        return count;
    }

  private:
    static constexpr int64_t kTranspose = 128;
    static constexpr int64_t kTransposePitch = kTranspose + 16;

    uint32_t* panel(int64_t p) const { return packed_.get() + p * units_ * kPanelColumns; }

    // The last tile, if it is not whole: nobody reads the products of the rows that it lacks.
    void stage_rest(ScreenBlock& block, const uint32_t** at, int64_t begin, int64_t rows,
                    int64_t n) const {
        for (int64_t r = begin; r < begin + kTileRows; ++r) {
            const uint32_t* from = at[std::min(r, rows - 1)];
            if (from == block.staged(r)) continue;
            std::memcpy(block.staged(r), from, static_cast<size_t>(n) * sizeof(uint32_t));
        }
    }

    int64_t columns_;
    int64_t units_;
    int64_t panels_;
    std::unique_ptr<uint32_t[]> packed_;
    MultiplyTile multiply_tile_;
};

}  // namespace nearest_detail

}  // namespace lightvlm
