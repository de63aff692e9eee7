// CPU twin of merge_pairs.cuh. For each row: tokens are listed by window and role, each source
// finds its best destination (nearest_kept_cpu.h), the best pairs of each window merge, and each
// token left sums its list in token order.
#include "merging/merge_pairs.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "common/parallel.h"
#include "merging/merge_rows_cpu.h"
#include "merging/nearest_kept_cpu.h"

namespace lightvlm {

namespace {

struct Window {
    int32_t id;
    int64_t positions = 0;  // tokens seen, protected ones too
    std::vector<int32_t> sources;
    std::vector<int32_t> destinations;
    int64_t pairs = 0;
};

// What is known of one row.
struct Row {
    std::vector<Window> windows;  // those with pairs
    std::vector<int32_t> into;    // by token: the one it is part of, or -1
    std::vector<float> scale;     // by token, for tokens of those windows
    std::vector<float> inverse;
    ArrivalLists arrivals;
};

class Pairs {
  public:
    explicit Pairs(const MergePairsParams& params)
        : params_(params), rows_(static_cast<size_t>(params.rows)) {}

    Status run() {
        FirstError error;
        parallel_items(params_.rows, 16 * params_.tokens, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                if (check_weights(row, error)) plan_row(row, error);
            }
        });
        if (!error.status().ok()) return error.status();
        dispatch_dtype(params_.metric_dtype,
                       [&](auto tag) { match_all<typename decltype(tag)::type>(); });
        parallel_items(params_.rows, 8 * params_.tokens, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) number_row(row, error);
        });
        if (!error.status().ok()) return error.status();
        dispatch_dtype(params_.dtype, [&](auto tag) {
            parallel_dynamic(params_.rows * params_.slots, 4 * params_.width + 8,
                             [&](int64_t item) {
                                 write_slot<typename decltype(tag)::type>(item / params_.slots,
                                                                          item % params_.slots);
                             });
        });
        return {};
    }

  private:
    const int32_t* window(int64_t row) const {
        return params_.window + row * params_.window_stride;
    }
    const float* weight(int64_t row) const {
        return params_.weight == nullptr ? nullptr : params_.weight + row * params_.weight_stride;
    }
    float weight_of(int64_t row, int64_t token) const {
        return params_.weight == nullptr ? 1.0f : weight(row)[token];
    }
    int64_t count(int64_t row) const { return params_.count[row]; }

    bool check_weights(int64_t row, FirstError& error) const {
        if (params_.weight == nullptr || multiversion<AllWeights>(weight(row), params_.tokens)) {
            return true;
        }
        const float* wrong = std::find_if_not(weight(row), weight(row) + params_.tokens, is_weight);
        error.report(kErrorWeight, row, wrong - weight(row), *wrong);
        return false;
    }

    void plan_row(int64_t row_index, FirstError& error) {
        Row& row = rows_[row_index];
        row.into.resize(static_cast<size_t>(params_.tokens));
        std::unordered_map<int32_t, size_t> window_of;
        size_t last = 0;
        for (int32_t token = 0; token < params_.tokens; ++token) {
            const int32_t id = window(row_index)[token];
            row.into[token] = id >= -1 ? token : -1;
            if (id < 0) continue;
            if (row.windows.empty() || row.windows[last].id != id) {
                const auto [entry, is_new] = window_of.try_emplace(id, row.windows.size());
                if (is_new) row.windows.push_back({id, 0, {}, {}, 0});
                last = entry->second;
            }
            Window& one = row.windows[last];
            const bool gives = params_.source == nullptr
                                   ? one.positions % 2 == 0
                                   : params_.source[row_index * params_.source_stride + token] != 0;
            ++one.positions;
            if (params_.is_protected != nullptr &&
                params_.is_protected[row_index * params_.protected_stride + token] != 0) {
                continue;
            }
            (gives ? one.sources : one.destinations).push_back(token);
        }
        for (Window& one : row.windows) {
            const auto sources = static_cast<int64_t>(one.sources.size());
            const auto members = sources + static_cast<int64_t>(one.destinations.size());
            const PairBudget budget = pair_budget(params_, row_index, one.id, members);
            if (budget.error != 0) {
                error.report(budget.error, row_index, -1, budget.value);
                return;
            }
            one.pairs = one.destinations.empty() ? 0 : std::min(budget.pairs, sources);
        }
        std::erase_if(row.windows, [](const Window& one) { return one.pairs == 0; });
    }

    template <typename T>
    void match_all() {
        struct Job {
            int64_t row;
            const Window* window;
        };
        std::vector<Job> jobs;
        for (int64_t r = 0; r < params_.rows; ++r) {
            rows_[r].scale.resize(static_cast<size_t>(params_.tokens));
            rows_[r].inverse.resize(static_cast<size_t>(params_.tokens));
            for (const Window& one : rows_[r].windows) jobs.push_back({r, &one});
        }
        const auto match_job = [&](const Job& job) { match<T>(job.row, *job.window); };
        // Many windows share out the threads; few of them are shared out themselves.
        if (static_cast<int64_t>(jobs.size()) >= 2 * torch::stable::get_num_threads()) {
            parallel_dynamic(static_cast<int64_t>(jobs.size()), kParallelGrain,
                             [&](int64_t job) { match_job(jobs[job]); });
        } else {
            for (const Job& job : jobs) match_job(job);
        }
    }

    template <typename T>
    void match(int64_t row_index, const Window& one) {
        Row& row = rows_[row_index];
        const auto sources = static_cast<int64_t>(one.sources.size());
        const auto destinations = static_cast<int64_t>(one.destinations.size());
        const T* metric =
            static_cast<const T*>(params_.metric) + row_index * params_.metric_row_stride;
        std::vector<int32_t> nearest(one.sources.size(), 0);
        std::vector<float> score(one.sources.size(), 0.0f);
        if (params_.metric_width > 0) {
            find_nearest_kept(
                NearestKept<T>{metric, params_.metric_token_stride, params_.metric_width,
                               row.scale.data(), row.inverse.data(), one.destinations.data(),
                               one.sources.data(), destinations, sources},
                nearest.data(), score.data());
            for (int64_t s = 0; s < sources; ++s) score[s] *= row.inverse[one.sources[s]];
        }
        std::vector<int32_t> order(one.sources.size());
        std::iota(order.begin(), order.end(), 0);
        if (one.pairs < sources) {
            std::nth_element(order.begin(), order.begin() + one.pairs, order.end(),
                             [&](int32_t a, int32_t b) {
                                 return score[a] > score[b] || (score[a] == score[b] && a < b);
                             });
        }
        for (int64_t i = 0; i < one.pairs; ++i) {
            row.into[one.sources[order[i]]] = one.destinations[nearest[order[i]]];
        }
    }

    // Numbers the tokens left, and lists who arrives at each.
    void number_row(int64_t row_index, FirstError& error) {
        Row& row = rows_[row_index];
        const int64_t tokens = params_.tokens;
        int32_t* index = params_.index + row_index * params_.slots;
        int32_t* inverse = params_.inverse + row_index * tokens;
        int32_t* target = params_.target + row_index * tokens;
        int64_t kept = 0;
        for (int32_t t = 0; t < tokens; ++t) {
            inverse[t] = row.into[t] == t ? static_cast<int32_t>(kept) : -1;
            if (row.into[t] != t) continue;
            if (kept < params_.slots) index[kept] = t;
            ++kept;
        }
        if (kept > params_.slots) {
            error.report(kErrorCapacity, row_index, -1, static_cast<double>(kept));
            return;
        }
        params_.count[row_index] = static_cast<int32_t>(kept);
        std::fill(index + kept, index + params_.slots, -1);
        for (int32_t t = 0; t < tokens; ++t) {
            const int32_t into = row.into[t];
            target[t] = into >= 0 ? inverse[into] : -1;
            row.into[t] = into != t && weighs(weight_of(row_index, t)) ? target[t] : -1;
        }
        row.arrivals.build(row.into.data(), tokens, kept);
    }

    template <typename T>
    void write_slot(int64_t row_index, int64_t entry) const {
        const Row& row = rows_[row_index];
        const int64_t entries = count(row_index);
        T* out = static_cast<T*>(params_.out) + row_index * params_.slots * params_.width;
        float* out_weight = params_.out_weight + row_index * params_.slots;
        if (entry >= entries) {
            const int64_t slot = params_.right ? entry - entries : entry;
            std::memset(out + slot * params_.width, 0,
                        static_cast<size_t>(params_.width) * sizeof(T));
            out_weight[slot] = 0.0f;
            return;
        }
        const int64_t slot = params_.slot_of(entry, entries);
        const int32_t token = params_.index[row_index * params_.slots + entry];
        const int32_t first = row.arrivals.begin[entry];
        const int32_t arrivals = row.arrivals.begin[entry + 1] - first;
        const int32_t* arriving = row.arrivals.tokens.data() + first;
        float sum = weight_of(row_index, token);
        for (int32_t i = 0; i < arrivals; ++i) sum += weight_of(row_index, arriving[i]);
        out_weight[slot] = std::min(sum, FLT_MAX);
        if (params_.width == 0) return;
        const T* x = static_cast<const T*>(params_.x) + row_index * params_.x_row_stride;
        merge_row(x, params_.x_token_stride, params_.width, token, arriving, arrivals,
                  weight(row_index), params_.eps, out + slot * params_.width);
    }

    const MergePairsParams& params_;
    std::vector<Row> rows_;
};

}  // namespace

Status merge_pairs_cpu(const MergePairsParams& params) { return Pairs(params).run(); }

}  // namespace lightvlm
