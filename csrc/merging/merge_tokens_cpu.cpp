// CPU twin of merge_tokens.cuh. For each row: tokens are listed by group, each dropped one finds
// its kept one (nearest_kept_cpu.h), and each kept one sums its list in token order.
#include "merging/merge_tokens.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "common/parallel.h"
#include "merging/merge_numbers.h"
#include "merging/nearest_kept_cpu.h"

namespace lightvlm {

namespace {

struct AllWeights {
    template <CpuLevel level>
    static LIGHTVLM_INLINE bool run(const float* weight, int64_t n) {
        int32_t wrong = 0;
        for (int64_t i = 0; i < n; ++i) wrong |= is_weight(weight[i]) ? 0 : 1;
        return wrong == 0;
    }
};

// Largest magnitude, as the bits of a float: those of infinity and NaN are above all others.
template <typename T>
struct LargestBits {
    template <CpuLevel level>
    static LIGHTVLM_INLINE uint32_t run(const T* vector, int64_t n) {
        uint32_t largest = 0;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bits = float16_detail::float_bits(to_float(vector[i])) & 0x7fffffffu;
            largest = bits > largest ? bits : largest;
        }
        return largest;
    }
};

template <typename T>
struct SumOfSquares {
    template <CpuLevel level>
    static LIGHTVLM_INLINE float run(const T* vector, float scale, int64_t n) {
        constexpr int kLanes = 32;
        float sums[kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            for (int l = 0; l < kLanes; ++l) {
                const float value = to_float(vector[i + l]) * scale;
                sums[l] += value * value;
            }
        }
        for (int l = 0; i < n; ++i, ++l) {
            const float value = to_float(vector[i]) * scale;
            sums[l] += value * value;
        }
        for (int half = kLanes / 2; half > 0; half /= 2) {
            for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
        }
        return sums[0];
    }
};

// out = (sum of weights[i] * rows[i]) / total, columns [0, n), in the order of the rows.
template <typename T>
struct WeightedMean {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const T* x, int64_t stride, const int32_t* tokens,
                                    const float* weights, int64_t count, float total, T* out,
                                    int64_t n) {
        constexpr int64_t kColumns = 1024;
        float sums[kColumns];
        for (int64_t first = 0; first < n; first += kColumns) {
            const int64_t columns = n - first < kColumns ? n - first : kColumns;
            for (int64_t c = 0; c < columns; ++c) sums[c] = 0.0f;
            for (int64_t i = 0; i < count; ++i) {
                const T* row = x + tokens[i] * stride + first;
                const float weight = weights[i];
                for (int64_t c = 0; c < columns; ++c) sums[c] += weight * to_float(row[c]);
            }
            for (int64_t c = 0; c < columns; ++c) {
                out[first + c] = from_float<T>(sums[c] / total);
            }
        }
    }
};

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
    // Dropped tokens by entry, ascending: entry j has [begin[j], begin[j + 1]).
    std::vector<int32_t> begin;
    std::vector<int32_t> arriving;
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
    void measure(int64_t row, int32_t token, bool is_kept) {
        const T* vector = metric<T>(row) + token * params_.metric_token_stride;
        const int64_t n = params_.metric_width;
        const float scale =
            metric_scale(float16_detail::float_of(multiversion<LargestBits<T>>(vector, n)));
        rows_[row].scale[token] = scale;
        if (!is_kept) return;
        rows_[row].inverse[token] =
            scale == 0.0f ? 0.0f : inverse_length(multiversion<SumOfSquares<T>>(vector, scale, n));
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
            parallel_items(kept + dropped, params_.metric_width, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                    const bool is_kept = i < kept;
                    measure<T>(row, is_kept ? members.kept[i] : members.dropped[i - kept], is_kept);
                }
            });
            find_nearest_kept(
                NearestKept<T>{metric<T>(row), params_.metric_token_stride, params_.metric_width,
                               rows_[row].scale.data(), rows_[row].inverse.data(),
                               members.kept.data(), members.dropped.data(), kept, dropped},
                nearest.data());
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
        row.begin.assign(static_cast<size_t>(count(row_index)) + 1, 0);
        for (int64_t t = 0; t < params_.tokens; ++t) {
            if (weight(row_index)[t] == 0.0f) row.target[t] = -1;
            if (row.target[t] >= 0) ++row.begin[row.target[t]];
        }
        int32_t total = 0;
        for (int32_t& begin : row.begin) {
            const int32_t here = begin;
            begin = total;
            total += here;
        }
        row.arriving.resize(static_cast<size_t>(total));
        for (int64_t t = 0; t < params_.tokens; ++t) {
            if (row.target[t] >= 0) {
                row.arriving[row.begin[row.target[t]]++] = static_cast<int32_t>(t);
            }
        }
        // Each begin stands at its end now, which is where the next one began.
        for (size_t j = row.begin.size() - 1; j > 0; --j) row.begin[j] = row.begin[j - 1];
        row.begin[0] = 0;
    }

    template <typename T>
    void write_slot(int64_t row_index, int64_t entry) const {
        const Row& row = rows_[row_index];
        const int64_t entries = count(row_index);
        T* out = static_cast<T*>(params_.out) + row_index * params_.slots * params_.width;
        const auto bytes = static_cast<size_t>(params_.width) * sizeof(T);
        if (entry >= entries) {
            const int64_t slot = params_.right ? entry - entries : entry;
            std::memset(out + slot * params_.width, 0, bytes);
            return;
        }
        out += params_.slot_of(entry, entries) * params_.width;
        const T* x = static_cast<const T*>(params_.x) + row_index * params_.x_row_stride;
        const int32_t token = index(row_index)[entry];
        const int32_t first = row.begin[entry];
        const int32_t arrivals = row.begin[entry + 1] - first;
        if (arrivals == 0) {
            std::memcpy(out, x + token * params_.x_token_stride, bytes);
            return;
        }
        std::vector<int32_t> tokens;
        std::vector<float> weights;
        const auto add = [&](int32_t t) {
            if (weight(row_index)[t] == 0.0f) return;
            tokens.push_back(t);
            weights.push_back(weight(row_index)[t]);
        };
        add(token);
        for (int32_t i = 0; i < arrivals; ++i) add(row.arriving[first + i]);
        const float highest = *std::max_element(weights.begin(), weights.end());
        const float scale = weight_scale(highest, arrivals + 1);
        float total = 0.0f;
        for (float& one : weights) {
            one *= scale;
            total += one;
        }
        multiversion<WeightedMean<T>>(
            x, params_.x_token_stride, static_cast<const int32_t*>(tokens.data()),
            static_cast<const float*>(weights.data()), static_cast<int64_t>(tokens.size()), total,
            out, params_.width);
    }

    const MergeTokensParams& params_;
    std::vector<Row> rows_;
};

}  // namespace

Status merge_tokens_cpu(const MergeTokensParams& params) { return Merge(params).run(); }

}  // namespace lightvlm
