// CPU twin of select_diverse.cuh: the same rounds over a pool of the highest upper bounds. A
// segment's features are turned into fp32 unit vectors once (diverse_cosine_cpu.h). Rows are shared
// out among threads; where there are few, the products of a row are.
#include "selection/select_diverse.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/multiversion.h"
#include "common/parallel.h"
#include "selection/diverse_cosine_cpu.h"
#include "selection/diverse_value.h"
#include "selection/rows_cpu.h"
#include "selection/score_order.h"
#include "selection/threshold_cpu.h"

namespace lightvlm {

namespace {

// Tokens in the pool: more make more choices a round, but have to stay in the cache.
constexpr int64_t kPoolMost = 64;
constexpr int64_t kPoolLeast = 16;
constexpr int64_t kPoolFloats = 1 << 18;

// Products below this many are not worth waking a thread for.
constexpr int64_t kParallelProducts = 1 << 18;

struct Scratch {
    std::vector<uint8_t> kept;
    std::vector<int32_t> all_tokens;
    std::vector<float> units;  // [places, padded channels]

    // Of the places of a segment, ascending as its tokens are.
    std::vector<uint32_t> keys;  // score_key(value as far as it is known), kKeyNone: not free
    std::vector<float> worth;
    std::vector<float> nearest;
    std::vector<int32_t> seen;     // choices that `nearest` knows
    std::vector<int32_t> choices;  // in their order
    ThresholdScratch threshold;

    // Of the pool.
    std::vector<int32_t> pool;
    std::vector<int32_t> stale;
    std::vector<int32_t> stale_seen;
    std::vector<float> cosines;
};

template <typename T>
class DiverseRow {
  public:
    DiverseRow(const SelectDiverseParams& params, int64_t row, FirstError& error, Scratch& scratch)
        : params_(params),
          row_(params.rows, row, error),
          features_(static_cast<const T*>(params.features) + row * params.features_row_stride),
          padded_((params.channels + kCosineLanes - 1) / kCosineLanes * kCosineLanes),
          pool_size_(
              std::clamp(kPoolFloats / std::max<int64_t>(padded_, 1), kPoolLeast, kPoolMost)),
          s_(scratch) {}

    void run() {
        const int64_t n = row_.tokens();
        s_.kept.assign(n, 0);
        if (row_.forced() != nullptr) {
            for (int64_t i = 0; i < n; ++i) s_.kept[i] = row_.forced()[i] != 0;
        }
        if (row_.has_segments()) {
            std::vector<CpuRow::Segment> segments;
            if (!row_.segments(&segments)) return;
            for (const auto& segment : segments) {
                if (!choose(segment.id, segment.tokens)) return;
            }
        } else {
            s_.all_tokens.resize(n);
            for (int64_t i = 0; i < n; ++i) s_.all_tokens[i] = static_cast<int32_t>(i);
            if (!choose(0, s_.all_tokens)) return;
        }
        row_.write(s_.kept.data());
    }

  private:
    // False where an error was reported.
    bool choose(int32_t segment_id, const std::vector<int32_t>& tokens) {
        int64_t budget = 0;
        if (!row_.budget(segment_id, &budget)) return false;
        if (budget == 0) return true;
        int64_t free = start(tokens);
        if (budget >= free) {  // whatever resembles whatever
            for (size_t place = 0; place < tokens.size(); ++place) {
                if (s_.keys[place] != kKeyNone) s_.kept[tokens[place]] = 1;
            }
            return true;
        }
        measure(tokens);
        while (budget > 0) {
            const Cut cut = fill_pool(free);
            refresh_pool();
            const int64_t taken = take_from_pool(cut, budget, tokens);
            budget -= taken;
            free -= taken;
        }
        return true;
    }

    // Bounds before anything is compared; the forced tokens are the first choices. Returns how many
    // tokens are free.
    int64_t start(const std::vector<int32_t>& tokens) {
        const int64_t n = static_cast<int64_t>(tokens.size());
        s_.keys.assign(n, kKeyNone);
        s_.worth.resize(n);
        s_.nearest.assign(n, 0.0f);
        s_.seen.assign(n, 0);
        s_.choices.clear();
        int64_t free = 0;
        for (int64_t place = 0; place < n; ++place) {
            const int32_t i = tokens[place];
            if (row_.forced() != nullptr && row_.forced()[i]) {
                s_.choices.push_back(static_cast<int32_t>(place));
            } else if (row_.candidates() == nullptr || row_.candidates()[i]) {
                s_.worth[place] = diverse_worth(row_.scores()[i]);
                s_.keys[place] = score_key(s_.worth[place]);
                ++free;
            }
        }
        return free;
    }

    // The unit vectors of a segment.
    void measure(const std::vector<int32_t>& tokens) {
        const int64_t n = static_cast<int64_t>(tokens.size());
        if (s_.units.size() < static_cast<size_t>(n * padded_)) s_.units.resize(n * padded_);
        parallel_items(n, padded_, [&](int64_t begin, int64_t end) {
            for (int64_t place = begin; place < end; ++place) {
                multiversion<UnitVector<T>>(
                    features_ + tokens[place] * params_.features_token_stride, params_.channels,
                    s_.units.data() + place * padded_, padded_);
            }
        });
    }

    // What the tokens outside the pool do not exceed: keys below `key`, or equal from `place` on.
    struct Cut {
        uint32_t key;
        int32_t place;
    };

    // The highest bounds, in the order of the places.
    Cut fill_pool(int64_t free) {
        const int64_t n = static_cast<int64_t>(s_.keys.size());
        Cut cut{kKeyNone + 1, static_cast<int32_t>(n)};
        if (free > pool_size_) {
            const Threshold threshold =
                find_threshold(s_.keys.data(), nullptr, n, pool_size_, s_.threshold);
            cut.key = threshold.key;
            if (threshold.ties_kept < threshold.ties) {
                int64_t left = threshold.ties_kept;
                cut.place = 0;
                for (; left > 0; ++cut.place) left -= s_.keys[cut.place] == cut.key ? 1 : 0;
            }
        }
        s_.pool.resize(n + 1);  // a place is written before it is known to stay
        int64_t count = 0;
        for (int64_t place = 0; place < n; ++place) {
            s_.pool[count] = static_cast<int32_t>(place);
            count += s_.keys[place] >= cut.key + (place >= cut.place ? 1 : 0) ? 1 : 0;
        }
        s_.pool.resize(count);
        return cut;
    }

    // Compares the pool with the choices it has not seen.
    void refresh_pool() {
        const int32_t count = static_cast<int32_t>(s_.choices.size());
        s_.stale.clear();
        int64_t products = 0;
        for (int32_t place : s_.pool) {
            // Nothing times any similarity is nothing.
            if (s_.seen[place] == count || s_.worth[place] == 0.0f) continue;
            s_.stale.push_back(place);
            products += (count - s_.seen[place]) * padded_;
        }
        if (s_.stale.empty()) return;
        // Tokens that have seen about as many share tiles.
        std::sort(s_.stale.begin(), s_.stale.end(), [&](int32_t a, int32_t b) {
            return s_.seen[a] != s_.seen[b] ? s_.seen[a] < s_.seen[b] : a < b;
        });
        const int64_t stale = static_cast<int64_t>(s_.stale.size());
        s_.stale_seen.resize(stale);
        s_.cosines.resize(std::max(stale, pool_size_));
        for (int64_t k = 0; k < stale; ++k) {
            s_.stale_seen[k] = s_.seen[s_.stale[k]];
            s_.cosines[k] = s_.nearest[s_.stale[k]];
        }
        const auto compare = [&](int64_t begin, int64_t end) {
            multiversion<LargestCosines>(
                static_cast<const float*>(s_.units.data()), int64_t{padded_},
                static_cast<const int32_t*>(s_.stale.data() + begin),
                static_cast<const int32_t*>(s_.stale_seen.data() + begin), end - begin,
                static_cast<const int32_t*>(s_.choices.data()), int64_t{count},
                s_.cosines.data() + begin);
        };
        if (products < kParallelProducts) {
            compare(0, stale);
        } else {
            parallel_items(stale, kParallelGrain, compare);
        }
        for (int64_t k = 0; k < stale; ++k) update(s_.stale[k], s_.cosines[k], count);
    }

    void update(int32_t place, float cosine, int32_t choices) {
        s_.nearest[place] = std::max(s_.nearest[place], cosine);
        s_.seen[place] = choices;
        s_.keys[place] =
            score_key(diverse_value(s_.worth[place], params_.strength, s_.nearest[place]));
    }

    // Chooses from the pool as long as its best exceeds all that is outside; returns how many.
    int64_t take_from_pool(const Cut& cut, int64_t budget, const std::vector<int32_t>& tokens) {
        s_.cosines.resize(std::max<size_t>(s_.cosines.size(), s_.pool.size()));
        for (int64_t taken = 0;; ++taken) {
            // Whoever is below the cut stays below it: it leaves the pool.
            int32_t best = -1;
            uint32_t best_key = kKeyNone;
            size_t left = 0;
            for (int32_t place : s_.pool) {
                const uint32_t key = s_.keys[place];
                if (key < cut.key + (place >= cut.place ? 1 : 0)) continue;
                if (key > best_key) {
                    best_key = key;
                    best = place;
                }
                s_.pool[left++] = place;
            }
            s_.pool.resize(left);
            if (best < 0 || taken == budget) return taken;

            s_.kept[tokens[best]] = 1;
            s_.keys[best] = kKeyNone;
            s_.choices.push_back(best);
            const int32_t count = static_cast<int32_t>(s_.choices.size());
            s_.stale.clear();
            left = 0;
            for (int32_t place : s_.pool) {
                if (place == best) continue;
                s_.pool[left++] = place;
                if (s_.worth[place] != 0.0f) s_.stale.push_back(place);
            }
            s_.pool.resize(left);
            const int64_t others = static_cast<int64_t>(s_.stale.size());
            multiversion<CosineRow>(static_cast<const float*>(s_.units.data()), int64_t{padded_},
                                    best, static_cast<const int32_t*>(s_.stale.data()), others,
                                    s_.cosines.data());
            for (int64_t k = 0; k < others; ++k) update(s_.stale[k], s_.cosines[k], count);
        }
    }

    const SelectDiverseParams& params_;
    CpuRow row_;
    const T* features_;
    const int64_t padded_;
    const int64_t pool_size_;
    Scratch& s_;
};

}  // namespace

Status select_diverse_cpu(const SelectDiverseParams& params) {
    FirstError error;
    dispatch_dtype(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const int64_t steps = params.rows.tokens * (params.channels + 1);
        parallel_items(params.rows.rows, steps, [&](int64_t begin, int64_t end) {
            Scratch scratch;
            for (int64_t row = begin; row < end; ++row) {
                DiverseRow<T>(params, row, error, scratch).run();
            }
        });
    });
    return error.status();
}

}  // namespace lightvlm
