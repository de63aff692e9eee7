// CPU twin of importance.cuh. Threads share tiles of up to 32 probes (importance_tile_cpu.h); each
// tile writes what it gives to every target, and these are added up in tile order, so that the
// result does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "importance/importance.h"
#include "importance/importance_tile_cpu.h"

namespace lightvlm {

namespace {

using namespace importance_detail;

// Floats that tiles of one round may hold for their targets.
constexpr int64_t kRoundFloats = int64_t{4} << 20;
constexpr int64_t kRoundTiles = 64;  // at least

// One batch row: its keys, and the probe rows that count.
struct BatchRow {
    int64_t begin = 0;
    int64_t end = 0;
    std::vector<int32_t> rows;
    std::vector<int32_t> positions;
    std::vector<int32_t> threshold;  // of each target, for Tile

    int64_t keys() const { return end - begin; }
    int64_t used() const { return static_cast<int64_t>(rows.size()); }
};

BatchRow plan_row(const ImportanceParams& params, int64_t b, FirstError& error) {
    BatchRow row;
    row.begin = params.leftpad != nullptr ? params.leftpad[b] : 0;
    row.end = params.lens != nullptr ? params.lens[b] : params.tokens;
    if (row.begin < 0 || row.begin > row.end || row.end > params.tokens) {
        const bool by_lens = params.lens != nullptr && (row.end < 0 || row.end > params.tokens);
        error.report(kErrorLens, b, -1, static_cast<double>(by_lens ? row.end : row.begin));
        return row;
    }
    for (int64_t w = 0; w < params.window; ++w) {
        const int64_t position = params.row_pos != nullptr
                                     ? params.row_pos[b * params.row_pos_stride + w]
                                     : row.end - params.window + w;
        if (position < row.begin) continue;
        row.rows.push_back(static_cast<int32_t>(w));
        row.positions.push_back(static_cast<int32_t>(position));
    }
    if (params.axis == ScoreAxis::kKey) {
        row.threshold.resize(row.keys(), 0);
        for (int64_t t = 0; params.causal && t < row.keys(); ++t) {
            row.threshold[t] = static_cast<int32_t>(row.begin + t);
        }
    } else {
        row.threshold.resize(row.used(), 0);
        for (int64_t t = 0; params.causal && t < row.used(); ++t) {
            row.threshold[t] = -row.positions[t];
        }
    }
    return row;
}

void count_visible(const ImportanceParams& params, int64_t b, const BatchRow& row) {
    int32_t* visible = params.visible + b * params.tokens;
    std::fill(visible, visible + params.tokens, 0);
    if (!params.causal) {
        std::fill(visible + row.begin, visible + row.end, static_cast<int32_t>(row.used()));
        return;
    }
    if (row.begin == row.end) return;
    // Each row counts at the last key that it sees; then from the back, all who count later see
    // too.
    for (const int32_t position : row.positions) {
        ++visible[std::min<int64_t>(position, row.end - 1)];
    }
    for (int64_t j = row.end - 2; j >= row.begin; --j) visible[j] += visible[j + 1];
}

// Heads of a batch row that are folded together: `heads` query heads from `head` on.
struct Slot {
    int64_t b;
    int64_t head;
    int64_t heads;
    int64_t probes;
};

struct TileTask {
    int64_t slot;
    int64_t first_probe;
};

template <typename T>
class Scorer {
  public:
    Scorer(const ImportanceParams& params, const std::vector<BatchRow>& rows)
        : params_(params),
          rows_(rows),
          query_(static_cast<const T*>(params.query)),
          key_(static_cast<const T*>(params.key)) {
        const int64_t heads = params.folds_each_head() ? 1 : params.group();
        slots_per_row_ = params.query_heads / heads;
        for (int64_t b = 0; b < params.batch; ++b) {
            for (int64_t head = 0; head < params.query_heads; head += heads) {
                const int64_t probes =
                    params.axis == ScoreAxis::kKey ? heads * rows[b].used() : rows[b].keys();
                slots_.push_back({b, head, heads, probes});
            }
        }
        for (size_t s = 0; s < slots_.size(); ++s) {
            for (int64_t probe = 0; probe < slots_[s].probes; probe += kLanesMax) {
                tasks_.push_back({static_cast<int64_t>(s), probe});
            }
        }
    }

    void run() {
        const int64_t targets = params_.targets();
        const auto slot_count = static_cast<int64_t>(slots_.size());
        slot_scores_.assign(slot_count * targets, 0.0f);
        const auto task_count = static_cast<int64_t>(tasks_.size());
        const int64_t round = std::max(kRoundTiles, kRoundFloats / std::max<int64_t>(1, targets));
        const std::unique_ptr<float[]> folded(new float[std::min(round, task_count) * targets]);
        for (int64_t begin = 0; begin < task_count; begin += round) {
            const int64_t end = std::min(begin + round, task_count);
            fold_tiles(begin, end, folded.get());
            add_tiles(begin, end, folded.get());
        }
        parallel_items(params_.batch, slots_per_row_ * targets, [&](int64_t first, int64_t last) {
            for (int64_t b = first; b < last; ++b) write_scores(b);
        });
    }

  private:
    int64_t targets_of(const BatchRow& row) const {
        return params_.axis == ScoreAxis::kKey ? row.keys() : row.used();
    }

    // The probes of a task and the targets they may see.
    Tile<T> make_tile(const TileTask& task) const {
        const Slot& slot = slots_[task.slot];
        const BatchRow& row = rows_[slot.b];
        const T* query = query_ + slot.b * params_.query_batch_stride;
        const T* keys = key_ + slot.b * params_.key_batch_stride +
                        slot.head / params_.group() * params_.key_head_stride +
                        row.begin * params_.key_token_stride;
        Tile<T> tile;
        tile.probes =
            static_cast<int>(std::min<int64_t>(kLanesMax, slot.probes - task.first_probe));
        tile.width = params_.width;
        tile.scale = params_.scale;
        tile.own_softmax = params_.lse == nullptr;
        tile.use_max = params_.max_over_probes();
        tile.threshold = row.threshold.data();
        if (params_.axis == ScoreAxis::kKey) {
            tile.targets = keys;
            tile.target_stride = params_.key_token_stride;
        } else {
            tile.targets = query + slot.head * params_.query_head_stride;
            tile.target_stride = params_.query_row_stride;
            tile.row = row.rows.data();
        }
        for (int lane = 0; lane < tile.probes; ++lane) {
            const int64_t probe = task.first_probe + lane;
            if (params_.axis == ScoreAxis::kQuery) {
                tile.probe[lane] = keys + probe * params_.key_token_stride;
                tile.limit[lane] = params_.causal ? -static_cast<int32_t>(row.begin + probe) : 0;
                continue;
            }
            const int64_t head = slot.head + probe / row.used();
            const int64_t u = probe % row.used();
            tile.probe[lane] =
                query + row.rows[u] * params_.query_row_stride + head * params_.query_head_stride;
            tile.limit[lane] = params_.causal ? row.positions[u] : 0;
            if (params_.lse != nullptr) {
                tile.lse[lane] = params_.lse[slot.b * params_.lse_batch_stride +
                                             head * params_.lse_head_stride + row.rows[u]];
                if (tile.lse[lane] == -std::numeric_limits<float>::infinity()) {
                    tile.limit[lane] = kSeesNothing;
                }
            }
        }
        const int32_t limit = *std::max_element(tile.limit, tile.limit + tile.probes);
        const auto is_seen = [limit](int32_t threshold) { return threshold <= limit; };
        const auto begin = row.threshold.begin();
        const auto first = std::find_if(begin, row.threshold.end(), is_seen);
        const auto last =
            std::find_if(row.threshold.rbegin(), std::make_reverse_iterator(first), is_seen);
        tile.first = first - begin;
        tile.last = last.base() - begin;
        return tile;
    }

    void fold_tiles(int64_t begin, int64_t end, float* folded) const {
        const int64_t targets = params_.targets();
        const int64_t steps = kLanesMax * targets * params_.width / 16;
        parallel_items(end - begin, steps, [&](int64_t first, int64_t last) {
            const std::unique_ptr<TileScratch> scratch(new TileScratch);
            // Aligned as vector loads want it.
            const std::align_val_t alignment{64};
            const bool own_softmax = params_.lse == nullptr;
            float* logits =
                own_softmax ? static_cast<float*>(::operator new(
                                  (targets + kTargetGroup) * kLanesMax * sizeof(float), alignment))
                            : nullptr;
            for (int64_t i = first; i < last; ++i) {
                const TileTask& task = tasks_[begin + i];
                const Tile<T> tile = make_tile(task);
                multiversion<FoldTile>(&tile, targets_of(rows_[slots_[task.slot].b]), scratch.get(),
                                       logits, folded + i * targets);
            }
            ::operator delete(logits, alignment);
        });
    }

    // Adds what the tiles of a round give to their slots, in order.
    void add_tiles(int64_t begin, int64_t end, const float* folded) {
        const int64_t targets = params_.targets();
        const bool use_max = params_.max_over_probes();
        parallel_items(targets, end - begin, [&](int64_t first, int64_t last) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t slot = tasks_[i].slot;
                const int64_t stop = std::min(last, targets_of(rows_[slots_[slot].b]));
                float* score = slot_scores_.data() + slot * targets;
                const float* more = folded + (i - begin) * targets;
                for (int64_t t = first; t < stop; ++t) {
                    score[t] = use_max ? maximum(score[t], more[t]) : score[t] + more[t];
                }
            }
        });
    }

    // Folds `count` slots of batch row b, from `slot` on, and divides.
    void fold_slots(int64_t b, int64_t slot, int64_t count, float* score) const {
        const int64_t targets = params_.targets();
        const bool use_max = params_.max_over_heads();
        const BatchRow& row = rows_[b];
        const int64_t used = targets_of(row);
        const float* from = slot_scores_.data() + (b * slots_per_row_ + slot) * targets;
        const int32_t* visible = params_.visible + b * params_.tokens + row.begin;
        const float heads = params_.head_divisor();
        const bool mean = params_.axis == ScoreAxis::kKey && params_.rows == RowsOp::kMean;
        for (int64_t t = 0; t < used; ++t) {
            float value = from[t];
            for (int64_t s = 1; s < count; ++s) {
                const float other = from[s * targets + t];
                value = use_max ? maximum(value, other) : value + other;
            }
            const float rows = mean ? static_cast<float>(std::max(1, visible[t])) : 1.0f;
            const int64_t at = params_.axis == ScoreAxis::kKey ? row.begin + t : row.rows[t];
            score[at] = value / (heads * rows);
        }
    }

    void write_scores(int64_t b) const {
        const int64_t targets = params_.targets();
        if (params_.axis == ScoreAxis::kKey && params_.heads == HeadsOp::kNone) {
            const int64_t count = slots_per_row_ / params_.key_heads;
            for (int64_t head = 0; head < params_.key_heads; ++head) {
                float* score = params_.score + (b * params_.key_heads + head) * targets;
                std::fill(score, score + targets, 0.0f);
                fold_slots(b, head * count, count, score);
            }
        } else {
            float* score = params_.score + b * targets;
            std::fill(score, score + targets, 0.0f);
            fold_slots(b, 0, slots_per_row_, score);
        }
    }

    const ImportanceParams& params_;
    const std::vector<BatchRow>& rows_;
    const T* query_;
    const T* key_;
    int64_t slots_per_row_ = 0;
    std::vector<Slot> slots_;
    std::vector<TileTask> tasks_;
    std::vector<float> slot_scores_;
};

}  // namespace

Status importance_cpu(const ImportanceParams& params) {
    FirstError error;
    std::vector<BatchRow> rows(params.batch);
    parallel_items(params.batch, params.window + params.tokens, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) rows[b] = plan_row(params, b, error);
    });
    if (!error.status().ok()) return error.status();
    for (int64_t b = 0; b < params.batch; ++b) count_visible(params, b, rows[b]);
    dispatch_dtype(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        Scorer<T>(params, rows).run();
    });
    return error.status();
}

}  // namespace lightvlm
