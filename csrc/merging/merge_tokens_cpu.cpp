// CPU twin of merge_tokens.cuh. For each row: tokens are listed by group, each dropped one finds
// its kept one (nearest_kept_cpu.h), and each kept one sums its list in token order.
#include "merging/merge_tokens.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "common/parallel.h"
#include "merging/merge_rows_cpu.h"
#include "merging/nearest_kept_cpu.h"

namespace lightvlm {

namespace {

struct Group {
    std::vector<int32_t> kept;
    std::vector<int32_t> dropped;
};

// What is known of one row.
struct Row {
    std::vector<int32_t> target;  // by token: the entry of index it goes to, or -1
    std::vector<Group> groups;    // those with kept and dropped tokens
    std::vector<float> scale;     // by token, for tokens of those groups
    std::vector<float> inverse;
    ArrivalLists arrivals;
};

class Merge {
  public:
    explicit Merge(const MergeTokensParams& params)
        : params_(params), rows_(static_cast<size_t>(params.rows)) {}

    Status run() {
        FirstError error;
        parallel_items(params_.rows, 8 * params_.tokens, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                if (check_row(row, error)) plan_row(row);
            }
        });
        if (!error.status().ok()) return error.status();
        dispatch_dtype(params_.metric_dtype,
                       [&](auto tag) { find_targets<typename decltype(tag)::type>(); });
        parallel_items(params_.rows, 4 * params_.tokens, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) list_arrivals(row);
        });
        if (params_.width == 0) return {};
        dispatch_dtype(params_.dtype, [&](auto tag) {
            parallel_dynamic(params_.rows * params_.slots, 4 * params_.width, [&](int64_t item) {
                write_slot<typename decltype(tag)::type>(item / params_.slots,
                                                         item % params_.slots);
            });
        });
        return {};
    }

  private:
    const int32_t* index(int64_t row) const { return params_.index + row * params_.index_stride; }
    const int32_t* group(int64_t row) const { return params_.group + row * params_.group_stride; }
    const float* weight(int64_t row) const { return params_.weight + row * params_.weight_stride; }
    int64_t count(int64_t row) const { return params_.count[row * params_.count_stride]; }

    // False and reported if a value of the row is out of its range.
    bool check_row(int64_t row, FirstError& error) const {
        if (count(row) < 0 || count(row) > params_.slots) {
            error.report(kErrorCount, row, -1, static_cast<double>(count(row)));
            return false;
        }
        int64_t before = -1;
        for (int64_t j = 0; j < count(row); ++j) {
            const int64_t token = index(row)[j];
            const bool inside = token >= 0 && token < params_.tokens;
            if (!inside || token <= before) {
                error.report(inside ? kErrorIndexOrder : kErrorIndexRange, row, j,
                             static_cast<double>(token));
                return false;
            }
            before = token;
        }
        if (!multiversion<AllWeights>(weight(row), params_.tokens)) {
            const float* wrong =
                std::find_if_not(weight(row), weight(row) + params_.tokens, is_weight);
            error.report(kErrorWeight, row, wrong - weight(row), *wrong);
            return false;
        }
        return true;
    }

    void plan_row(int64_t row_index) {
        Row& row = rows_[row_index];
        row.target.assign(static_cast<size_t>(params_.tokens), -1);
        for (int64_t j = 0; j < count(row_index); ++j) {
            row.target[index(row_index)[j]] = static_cast<int32_t>(j);
        }
        std::unordered_map<int32_t, size_t> group_of;
        int32_t last_id = -1;
        size_t last_group = 0;
        for (int32_t token = 0; token < params_.tokens; ++token) {
            const int32_t id = group(row_index)[token];
            if (id < 0) continue;
            if (id != last_id) {
                const auto [entry, is_new] = group_of.try_emplace(id, row.groups.size());
                if (is_new) row.groups.emplace_back();
                last_id = id;
                last_group = entry->second;
            }
            Group& members = row.groups[last_group];
            (row.target[token] >= 0 ? members.kept : members.dropped).push_back(token);
        }
        std::erase_if(row.groups,
                      [](const Group& one) { return one.kept.empty() || one.dropped.empty(); });
    }

    template <typename T>
    const T* metric(int64_t row) const {
        return static_cast<const T*>(params_.metric) + row * params_.metric_row_stride;
    }

    template <typename T>
    void find_targets() {
        struct Job {
            int64_t row;
            const Group* group;
        };
        std::vector<Job> jobs;
        for (int64_t r = 0; r < params_.rows; ++r) {
            rows_[r].scale.resize(static_cast<size_t>(params_.tokens));
            rows_[r].inverse.resize(static_cast<size_t>(params_.tokens));
            for (const Group& one : rows_[r].groups) jobs.push_back({r, &one});
        }
        const auto find = [&](const Job& job) { find_targets_of<T>(job.row, *job.group); };
        // Many groups share out the threads; few of them are shared out themselves.
        if (static_cast<int64_t>(jobs.size()) >= 2 * torch::stable::get_num_threads()) {
            parallel_dynamic(static_cast<int64_t>(jobs.size()), kParallelGrain,
                             [&](int64_t job) { find(jobs[job]); });
        } else {
            for (const Job& job : jobs) find(job);
        }
    }

    template <typename T>
    void find_targets_of(int64_t row, const Group& members) {
        const auto kept = static_cast<int64_t>(members.kept.size());
        const auto dropped = static_cast<int64_t>(members.dropped.size());
        std::vector<int32_t> nearest(members.dropped.size(), 0);
        if (kept > 1 && params_.metric_width > 0) {
            find_nearest_kept(
                NearestKept<T>{metric<T>(row), params_.metric_token_stride, params_.metric_width,
                               rows_[row].scale.data(), rows_[row].inverse.data(),
                               members.kept.data(), members.dropped.data(), kept, dropped},
                nearest.data(), nullptr);
        }
        std::vector<int32_t>& target = rows_[row].target;
        for (int64_t d = 0; d < dropped; ++d) {
            target[members.dropped[d]] = target[members.kept[nearest[d]]];
        }
    }

    void list_arrivals(int64_t row_index) {
        Row& row = rows_[row_index];
        if (params_.target != nullptr) {
            std::copy(row.target.begin(), row.target.end(),
                      params_.target + row_index * params_.tokens);
        }
        // Kept tokens do not arrive at themselves, and what weighs nothing changes nothing.
        for (int64_t j = 0; j < count(row_index); ++j) row.target[index(row_index)[j]] = -1;
        for (int64_t t = 0; t < params_.tokens; ++t) {
            if (!weighs(weight(row_index)[t])) row.target[t] = -1;
        }
        row.arrivals.build(row.target.data(), params_.tokens, count(row_index));
    }

    template <typename T>
    void write_slot(int64_t row_index, int64_t entry) const {
        const Row& row = rows_[row_index];
        const int64_t entries = count(row_index);
        T* out = static_cast<T*>(params_.out) + row_index * params_.slots * params_.width;
        if (entry >= entries) {
            const int64_t slot = params_.right ? entry - entries : entry;
            std::memset(out + slot * params_.width, 0,
                        static_cast<size_t>(params_.width) * sizeof(T));
            return;
        }
        out += params_.slot_of(entry, entries) * params_.width;
        const T* x = static_cast<const T*>(params_.x) + row_index * params_.x_row_stride;
        const int32_t token = index(row_index)[entry];
        const int32_t first = row.arrivals.begin[entry];
        merge_row(x, params_.x_token_stride, params_.width, token,
                  row.arrivals.tokens.data() + first, row.arrivals.begin[entry + 1] - first,
                  weight(row_index), 0.0, out);
    }

    const MergeTokensParams& params_;
    std::vector<Row> rows_;
};

}  // namespace

Status merge_tokens_cpu(const MergeTokensParams& params) { return Merge(params).run(); }

}  // namespace lightvlm
