// CPU twin of importance.cuh. Probes are packed in panels of 32 (importance_panel_cpu.h). With
// given log-sum-exps threads share runs of targets, each against all panels of a slot
// (importance_given_cpu.h); with an own softmax they share panels, each against all targets
// (importance_own_cpu.h), and what panels give is added up in their order. Nothing depends on the
// number of threads.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "common/parallel.h"
#include "importance/importance.h"
#include "importance/importance_given_cpu.h"
#include "importance/importance_own_cpu.h"
#include "importance/importance_panel_cpu.h"
#include "importance/importance_rows_cpu.h"

namespace lightvlm {

namespace {

using namespace importance_detail;

// Floats that panels of one round may hold for their targets.
constexpr int64_t kRoundFloats = int64_t{4} << 20;
constexpr int64_t kRoundPanels = 64;  // at least

// Uninitialised, aligned as vector loads want it.
template <typename T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}))) {}
    ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* get() const { return data_; }

  private:
    T* data_;
};

// Heads [head, head + heads) of a batch row, whose probes share panels.
struct Slot {
    int64_t b;
    int64_t head;
    int64_t heads;
    int64_t probes;
    int64_t first_panel;

    int64_t panels() const { return (probes + kPanelLanes - 1) / kPanelLanes; }
};

template <typename T>
class Scorer {
  public:
    Scorer(const ImportanceParams& params, const std::vector<BatchRow>& rows)
        : params_(params),
          rows_(rows),
          by_key_(params.axis == ScoreAxis::kKey),
          query_(static_cast<const T*>(params.query)),
          key_(static_cast<const T*>(params.key)),
          targets_(params.targets()),
          units_(units_of<T>(params.width)) {
        // Not 0: that would make NaN of what is hidden, and no float is lost besides 1.
        scale_ = std::max(std::fabs(params.scale) * 1.44269504f, FLT_MIN);
        // Keys are packed once for all heads of their group, whose queries are different targets.
        const int64_t heads = by_key_ && params.folds_each_head() ? 1 : params.group();
        slots_per_row_ = params.query_heads / heads;
        for (int64_t b = 0; b < params.batch; ++b) {
            for (int64_t head = 0; head < params.query_heads; head += heads) {
                const int64_t probes = by_key_ ? heads * rows[b].used() : rows[b].keys();
                slots_.push_back(
                    {b, head, heads, probes, static_cast<int64_t>(panel_slot_.size())});
                panel_slot_.resize(panel_slot_.size() + slots_.back().panels(),
                                   static_cast<int64_t>(slots_.size()) - 1);
            }
        }
    }

    void run() {
        slot_scores_.assign(slots_.size() * targets_, 0.0f);
        if (params_.lse != nullptr) {
            fold_given();
        } else {
            fold_own();
        }
        parallel_items(params_.batch, slots_per_row_ * targets_, [&](int64_t first, int64_t last) {
            for (int64_t b = first; b < last; ++b) write_scores(b);
        });
    }

  private:
    int64_t targets_of(const BatchRow& row) const { return by_key_ ? row.keys() : row.used(); }

    const T* keys_of(const Slot& slot) const {
        return key_ + slot.b * params_.key_batch_stride +
               slot.head / params_.group() * params_.key_head_stride +
               rows_[slot.b].begin * params_.key_token_stride;
    }

    // The targets of a slot; for axis "query" those of one of its heads.
    Targets<T> make_targets(const Slot& slot, int64_t head) const {
        const BatchRow& row = rows_[slot.b];
        Targets<T> targets;
        targets.threshold = row.threshold.data();
        targets.width = params_.width;
        if (by_key_) {
            targets.base = keys_of(slot);
            targets.stride = params_.key_token_stride;
        } else {
            targets.base =
                query_ + slot.b * params_.query_batch_stride + head * params_.query_head_stride;
            targets.stride = params_.query_row_stride;
            targets.row = row.rows.data();
        }
        return targets;
    }

    // Panel `index` of all; its units are written to `units`.
    Panel make_panel(int64_t index, uint32_t* staged, uint32_t* units) const {
        const Slot& slot = slots_[panel_slot_[index]];
        const BatchRow& row = rows_[slot.b];
        const int64_t first = (index - slot.first_panel) * kPanelLanes;
        const int used = static_cast<int>(std::min<int64_t>(kPanelLanes, slot.probes - first));
        Panel panel = {};
        const T* probe[kPanelLanes] = {};
        for (int lane = 0; lane < used; ++lane) {
            const int64_t p = first + lane;
            if (!by_key_) {
                probe[lane] = keys_of(slot) + p * params_.key_token_stride;
                panel.limit[lane] = params_.causal ? -static_cast<int32_t>(row.begin + p) : 0;
                continue;
            }
            const int64_t head = slot.head + p / row.used();
            const int64_t u = p % row.used();
            probe[lane] = query_ + slot.b * params_.query_batch_stride +
                          row.rows[u] * params_.query_row_stride + head * params_.query_head_stride;
            panel.limit[lane] = params_.causal ? row.positions[u] : 0;
            if (params_.lse == nullptr) continue;
            const float lse = params_.lse[slot.b * params_.lse_batch_stride +
                                          head * params_.lse_head_stride + row.rows[u]];
            const double shift = static_cast<double>(lse) * 1.4426950408889634;
            panel.shift[lane] = static_cast<float>(shift);
            const double low = shift - panel.shift[lane];
            panel.shift_low[lane] = std::isfinite(low) ? static_cast<float>(low) : 0.0f;
            if (lse == -std::numeric_limits<float>::infinity()) panel.limit[lane] = kSeesNothing;
        }
        panel.close(used);
        panel.units = units;
        multiversion<PackPanel<T>>(static_cast<const T* const*>(probe), panel.lanes, params_.width,
                                   params_.scale < 0.0f, staged, units);
        return panel;
    }

    void fold_given() {
        const auto count = static_cast<int64_t>(panel_slot_.size());
        const int64_t pitch = panel_units(units_);
        const Buffer<uint32_t> units(count * pitch);
        std::vector<Panel> panels(count);
        parallel_items(count, kPanelLanes * params_.width / 4, [&](int64_t first, int64_t last) {
            const Buffer<uint32_t> staged(kLanes * kUnitPitch);
            for (int64_t i = first; i < last; ++i) {
                panels[i] = make_panel(i, staged.get(), units.get() + i * pitch);
            }
        });
        const int64_t runs = (targets_ + kGivenRun - 1) / kGivenRun;
        const auto slot_count = static_cast<int64_t>(slots_.size());
        const int64_t steps = params_.group() * params_.window * kGivenRun * params_.width / 32;
        const auto fold = [&](int64_t item, GivenScratch* scratch) {
            const Slot& slot = slots_[item / runs];
            GivenRun<T> run;
            run.begin = item % runs * kGivenRun;
            run.end = std::min(run.begin + kGivenRun, targets_of(rows_[slot.b]));
            if (run.begin >= run.end) return;
            run.targets = make_targets(slot, slot.head);
            run.panels = panels.data() + slot.first_panel;
            run.panel_count = slot.panels();
            run.scale = scale_;
            run.use_max = params_.max_over_probes();
            run.scores = slot_scores_.data() + item / runs * targets_ + run.begin;
            multiversion<FoldGiven<T>>(static_cast<const GivenRun<T>*>(&run), scratch);
        };
        // Runs at the end of the keys are seen by fewer rows.
        parallel_dynamic(slot_count * runs, steps, [&](int64_t item) {
            const Buffer<GivenScratch> scratch(1);
            fold(item, scratch.get());
        });
    }

    void fold_own() {
        const auto count = static_cast<int64_t>(panel_slot_.size());
        const int64_t round = std::max(kRoundPanels, kRoundFloats / std::max<int64_t>(1, targets_));
        const Buffer<float> folded(std::min(round, count) * targets_);
        for (int64_t begin = 0; begin < count; begin += round) {
            const int64_t end = std::min(begin + round, count);
            const int64_t steps = kPanelLanes * targets_ * params_.width / 16;
            parallel_items(end - begin, steps, [&](int64_t first, int64_t last) {
                const Buffer<OwnScratch> scratch(1);
                const Buffer<uint32_t> staged(kLanes * kUnitPitch);
                const Buffer<uint32_t> units(panel_units(units_));
                const Buffer<float> logits((targets_ + kTargetGroup) * kPanelLanes);
                const Buffer<float> peaks(own_blocks(targets_) * kPanelLanes);
                for (int64_t i = begin + first; i < begin + last; ++i) {
                    const Panel panel = make_panel(i, staged.get(), units.get());
                    fold_panel(i, panel, scratch.get(), logits.get(), peaks.get(),
                               folded.get() + (i - begin) * targets_);
                }
            });
            add_panels(begin, end, folded.get());
        }
    }

    void fold_panel(int64_t index, const Panel& panel, OwnScratch* scratch, float* logits,
                    float* peaks, float* scores) const {
        const Slot& slot = slots_[panel_slot_[index]];
        const std::vector<int32_t>& threshold = rows_[slot.b].threshold;
        const auto is_seen = [&panel](int32_t t) { return t <= panel.highest; };
        const auto first = std::find_if(threshold.begin(), threshold.end(), is_seen);
        const auto last =
            std::find_if(threshold.rbegin(), std::make_reverse_iterator(first), is_seen);
        OwnRun<T> run;
        run.count = targets_of(rows_[slot.b]);
        run.first = first - threshold.begin();
        run.last = last.base() - threshold.begin();
        run.panel = &panel;
        run.scale = scale_;
        run.use_max = params_.max_over_probes();
        run.logits = logits;
        run.peaks = peaks;
        run.scores = scores;
        const int64_t sets = by_key_ ? 1 : slot.heads;
        for (int64_t head = 0; head < sets; ++head) {
            run.targets = make_targets(slot, slot.head + head);
            run.add = head > 0;
            multiversion<FoldOwn<T>>(static_cast<const OwnRun<T>*>(&run), scratch);
        }
    }

    // Adds what the panels of a round give to their slots, in order.
    void add_panels(int64_t begin, int64_t end, const float* folded) {
        const bool use_max = params_.max_over_probes();
        parallel_items(targets_, end - begin, [&](int64_t first, int64_t last) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t slot = panel_slot_[i];
                const int64_t stop = std::min(last, targets_of(rows_[slots_[slot].b]));
                float* score = slot_scores_.data() + slot * targets_;
                const float* more = folded + (i - begin) * targets_;
                for (int64_t t = first; t < stop; ++t) {
                    score[t] = use_max ? maximum(score[t], more[t]) : score[t] + more[t];
                }
            }
        });
    }

    // Folds `count` slots of batch row b, from `slot` on, and divides.
    void fold_slots(int64_t b, int64_t slot, int64_t count, float* score) const {
        const bool use_max = params_.max_over_heads();
        const BatchRow& row = rows_[b];
        const int64_t used = targets_of(row);
        const float* from = slot_scores_.data() + (b * slots_per_row_ + slot) * targets_;
        const int32_t* visible = params_.visible + b * params_.tokens + row.begin;
        const float heads = params_.head_divisor();
        const bool mean = by_key_ && params_.rows == RowsOp::kMean;
        for (int64_t t = 0; t < used; ++t) {
            float value = from[t];
            for (int64_t s = 1; s < count; ++s) {
                const float other = from[s * targets_ + t];
                value = use_max ? maximum(value, other) : value + other;
            }
            const float rows = mean ? static_cast<float>(std::max(1, visible[t])) : 1.0f;
            const int64_t at = by_key_ ? row.begin + t : row.rows[t];
            score[at] = value / (heads * rows);
        }
    }

    void write_scores(int64_t b) const {
        if (by_key_ && params_.heads == HeadsOp::kNone) {
            const int64_t count = slots_per_row_ / params_.key_heads;
            for (int64_t head = 0; head < params_.key_heads; ++head) {
                float* score = params_.score + (b * params_.key_heads + head) * targets_;
                std::fill(score, score + targets_, 0.0f);
                fold_slots(b, head * count, count, score);
            }
        } else {
            float* score = params_.score + b * targets_;
            std::fill(score, score + targets_, 0.0f);
            fold_slots(b, 0, slots_per_row_, score);
        }
    }

    const ImportanceParams& params_;
    const std::vector<BatchRow>& rows_;
    const bool by_key_;
    const T* query_;
    const T* key_;
    const int64_t targets_;
    const int64_t units_;
    float scale_ = 1.0f;
    int64_t slots_per_row_ = 0;
    std::vector<Slot> slots_;
    std::vector<int64_t> panel_slot_;  // of each panel, in the order of the slots
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
