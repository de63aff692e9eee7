// CPU twin of select.cuh: the same radix search over score keys, a row a thread. Sweeps over the
// row are vectorised; each round of the search keeps only the tokens of the digit it chose.
#include <algorithm>
#include <array>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "common/multiversion.h"
#include "common/parallel.h"
#include "selection/score_order.h"
#include "selection/select.h"

namespace lightvlm {

namespace {

constexpr int kDigitBits = 11;
constexpr uint32_t kDigits = 1u << kDigitBits;

struct ScoreKeys {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const float* scores, uint32_t* keys, int64_t n) {
        for (int64_t i = 0; i < n; ++i) keys[i] = score_key(scores[i]);
    }
};

// Takes the key from tokens whose flag equals `taken`.
struct ClearKeys {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const uint8_t* flags, uint8_t taken, uint32_t* keys,
                                    int64_t n) {
        for (int64_t i = 0; i < n; ++i)
            keys[i] = (flags[i] != 0) == (taken != 0) ? kKeyNone : keys[i];
    }
};

struct HighestKey {
    template <CpuLevel level>
    static LIGHTVLM_INLINE uint32_t run(const uint32_t* keys, int64_t n) {
        uint32_t highest = kKeyNone;
        for (int64_t i = 0; i < n; ++i) highest = keys[i] > highest ? keys[i] : highest;
        return highest;
    }
};

struct FixedMasses {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const uint32_t* keys, double highest, uint64_t* masses,
                                    int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            const float score = keys[i] > kKeyZero ? positive_key_score(keys[i]) : 0.0f;
            masses[i] = fixed_mass(score, highest);
        }
    }
};

struct MarkFrom {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const uint32_t* keys, uint32_t lowest, uint8_t* kept,
                                    int64_t n) {
        for (int64_t i = 0; i < n; ++i) kept[i] |= keys[i] >= lowest ? 1 : 0;
    }
};

struct Threshold {
    uint32_t key = 0xffffffffu;
    int64_t ties_kept = 0;  // of the tokens at the key
    int64_t ties = 0;
};

// What one thread needs for one row; grows once and is used again for the next row.
struct Scratch {
    std::vector<uint32_t> keys;
    std::vector<uint64_t> masses;
    std::vector<uint8_t> kept;
    std::vector<int32_t> slots;
    // The tokens that share the digits found so far.
    std::vector<uint32_t> level_keys;
    std::vector<uint64_t> level_masses;
    // One segment, gathered.
    std::vector<uint32_t> segment_keys;
    std::vector<uint8_t> segment_kept;
    std::array<uint32_t, kDigits> digit_counts;
    std::array<uint64_t, kDigits> digit_masses;
};

// The key at which `wanted` tokens (masses null), or that much mass, are reached.
Threshold find_threshold(const uint32_t* keys, const uint64_t* masses, int64_t n, uint64_t wanted,
                         Scratch& scratch) {
    uint32_t prefix = 0;
    int shift = 32;
    uint32_t digit = 0;
    while (shift > 0) {
        const int width = std::min(shift, kDigitBits);
        const bool first = shift == 32;
        shift -= width;
        const uint32_t mask = (1u << width) - 1u;

        scratch.digit_counts.fill(0);
        for (int64_t i = 0; i < n; ++i) ++scratch.digit_counts[(keys[i] >> shift) & mask];
        if (masses != nullptr) {
            scratch.digit_masses.fill(0);
            for (int64_t i = 0; i < n; ++i) {
                scratch.digit_masses[(keys[i] >> shift) & mask] += masses[i];
            }
        }
        // Tokens without a key all fall into the first round's digit 0, that no key has.
        const uint32_t lowest_digit = first ? 1 : 0;
        digit = mask;
        while (true) {
            const uint64_t here =
                masses != nullptr ? scratch.digit_masses[digit] : scratch.digit_counts[digit];
            if (wanted <= here || digit == lowest_digit) break;
            wanted -= here;
            --digit;
        }
        prefix = (prefix << width) | digit;
        if (shift == 0) break;

        const size_t kept = scratch.digit_counts[digit];
        // One slot more: the copy below writes before it knows whether to advance.
        scratch.level_keys.resize(std::max(scratch.level_keys.size(), kept + 1));
        if (masses != nullptr) {
            scratch.level_masses.resize(std::max(scratch.level_masses.size(), kept + 1));
        }
        // In place from the second round on: position `to` never passes i.
        size_t to = 0;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t key = keys[i];
            scratch.level_keys[to] = key;
            if (masses != nullptr) scratch.level_masses[to] = masses[i];
            to += ((key >> shift) & mask) == digit ? 1 : 0;
        }
        keys = scratch.level_keys.data();
        if (masses != nullptr) masses = scratch.level_masses.data();
        n = static_cast<int64_t>(kept);
    }
    Threshold threshold;
    threshold.key = prefix;
    threshold.ties = scratch.digit_counts[digit];
    threshold.ties_kept = static_cast<int64_t>(wanted);
    if (masses != nullptr) {
        const uint64_t each = scratch.digit_masses[digit] / scratch.digit_counts[digit];
        threshold.ties_kept = static_cast<int64_t>((wanted + each - 1) / each);
    }
    return threshold;
}

// Sets kept[i] for the chosen of n tokens. keep counts where mass is 0.
void select_among(const uint32_t* keys, int64_t n, int64_t keep, double mass, uint8_t* kept,
                  Scratch& scratch) {
    const int64_t candidates = n - std::count(keys, keys + n, kKeyNone);
    if (candidates == 0) return;
    uint64_t wanted = static_cast<uint64_t>(std::min(keep, candidates));
    const uint64_t* masses = nullptr;
    if (mass > 0.0) {
        const uint32_t highest = multiversion<HighestKey>(keys, n);
        // Where nothing weighs anything, one token, the highest, stands for the segment.
        wanted = 1;
        if (highest > kKeyZero) {
            scratch.masses.resize(std::max<size_t>(scratch.masses.size(), n));
            multiversion<FixedMasses>(keys, static_cast<double>(positive_key_score(highest)),
                                      scratch.masses.data(), n);
            uint64_t total = 0;
            for (int64_t i = 0; i < n; ++i) total += scratch.masses[i];
            wanted = mass_target(mass, total);
            masses = scratch.masses.data();
        }
    }
    if (wanted == 0) return;
    const Threshold threshold = find_threshold(keys, masses, n, wanted, scratch);
    if (threshold.ties_kept == threshold.ties) {
        multiversion<MarkFrom>(keys, threshold.key, kept, n);
        return;
    }
    // Some of the equals only: the first ones.
    multiversion<MarkFrom>(keys, threshold.key + 1, kept, n);
    int64_t left = threshold.ties_kept;
    for (int64_t i = 0; left > 0; ++i) {
        if (keys[i] == threshold.key) {
            kept[i] = 1;
            --left;
        }
    }
}

// The tokens of each segment, segments by ascending id, tokens in order.
std::vector<std::pair<int32_t, std::vector<int32_t>>> group_by_segment(const int32_t* segment,
                                                                       int64_t n) {
    std::vector<std::pair<int32_t, std::vector<int32_t>>> groups;
    std::unordered_map<int32_t, size_t> group_of;
    int32_t last_id = -1;
    size_t last_group = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int32_t id = segment[i];
        if (id < 0) continue;
        if (id != last_id) {
            const auto [entry, is_new] = group_of.try_emplace(id, groups.size());
            if (is_new) groups.emplace_back(id, std::vector<int32_t>());
            last_id = id;
            last_group = entry->second;
        }
        groups[last_group].second.push_back(static_cast<int32_t>(i));
    }
    return groups;
}

class RowSelection {
  public:
    RowSelection(const SelectParams& params, int64_t row, Scratch& scratch, FirstError& error)
        : params_(params), row_(row), scratch_(scratch), error_(error) {}

    void run() {
        const int64_t n = params_.tokens;
        scratch_.keys.resize(n);
        scratch_.kept.assign(n, 0);
        uint32_t* keys = scratch_.keys.data();
        const float* scores = params_.scores + row_ * params_.scores_stride;
        multiversion<ScoreKeys>(scores, keys, n);
        if (params_.candidates != nullptr) {
            multiversion<ClearKeys>(bytes(params_.candidates, params_.candidates_stride),
                                    uint8_t{0}, keys, n);
        }
        if (params_.forced != nullptr) {
            const uint8_t* forced = bytes(params_.forced, params_.forced_stride);
            multiversion<ClearKeys>(forced, uint8_t{1}, keys, n);
            for (int64_t i = 0; i < n; ++i) scratch_.kept[i] = forced[i] != 0;
        }
        const bool chosen = params_.segment == nullptr ? select_whole() : select_segments();
        if (chosen) write();
    }

  private:
    const uint8_t* bytes(const bool* flags, int64_t stride) const {
        return reinterpret_cast<const uint8_t*>(flags + row_ * stride);
    }

    bool select_whole() {
        const int64_t n = params_.tokens;
        if (!finite(scratch_.keys.data(), n, nullptr)) return false;
        int64_t keep = params_.keep_each;
        if (!budget(0, &keep)) return false;
        select_among(scratch_.keys.data(), n, keep, params_.mass, scratch_.kept.data(), scratch_);
        return true;
    }

    bool select_segments() {
        const int32_t* segment = params_.segment + row_ * params_.segment_stride;
        for (const auto& [id, tokens] : group_by_segment(segment, params_.tokens)) {
            if (params_.keep_per_segment && id >= params_.keep_columns) {
                error_.report(kErrorSegmentRange, row_, tokens.front(), id);
                return false;
            }
            int64_t keep = params_.keep_each;
            if (!budget(id, &keep)) return false;
            const int64_t n = static_cast<int64_t>(tokens.size());
            scratch_.segment_keys.resize(n);
            scratch_.segment_kept.assign(n, 0);
            for (int64_t j = 0; j < n; ++j) scratch_.segment_keys[j] = scratch_.keys[tokens[j]];
            if (!finite(scratch_.segment_keys.data(), n, tokens.data())) return false;
            select_among(scratch_.segment_keys.data(), n, keep, params_.mass,
                         scratch_.segment_kept.data(), scratch_);
            for (int64_t j = 0; j < n; ++j) {
                scratch_.kept[tokens[j]] |= scratch_.segment_kept[j];
            }
        }
        return true;
    }

    // Reads the budget of a segment; false and reported if it is negative.
    bool budget(int32_t segment_id, int64_t* keep) {
        if (params_.keep == nullptr || params_.mass > 0.0) return true;
        const int64_t column = params_.keep_per_segment ? segment_id : 0;
        *keep = params_.keep[row_ * params_.keep_stride + column];
        if (*keep >= 0) return true;
        error_.report(kErrorNegativeKeep, row_, params_.keep_per_segment ? column : -1,
                      static_cast<double>(*keep));
        return false;
    }

    // tokens: position of each key in the row; null: its own.
    bool finite(const uint32_t* keys, int64_t n, const int32_t* tokens) {
        if (params_.mass <= 0.0 || multiversion<HighestKey>(keys, n) != kKeyInfinity) return true;
        const int64_t j = std::find(keys, keys + n, kKeyInfinity) - keys;
        error_.report(kErrorInfiniteScore, row_, tokens != nullptr ? tokens[j] : j,
                      static_cast<double>(positive_key_score(kKeyInfinity)));
        return false;
    }

    void write() {
        const int64_t n = params_.tokens;
        int32_t* inverse = params_.inverse + row_ * n;
        // One slot more: each token writes its place before it knows whether it has one.
        scratch_.slots.resize(n + 1);
        int32_t* slots = scratch_.slots.data();
        int64_t count = 0;
        for (int64_t i = 0; i < n; ++i) {
            const bool kept = scratch_.kept[i] != 0;
            slots[count] = static_cast<int32_t>(i);
            inverse[i] = kept ? static_cast<int32_t>(count) : -1;
            count += kept;
        }
        if (count > params_.capacity) {
            error_.report(kErrorCapacity, row_, -1, static_cast<double>(count));
            return;
        }
        int32_t* index = params_.index + row_ * params_.capacity;
        std::copy(slots, slots + count, index);
        std::fill(index + count, index + params_.capacity, -1);
        params_.count[row_] = static_cast<int32_t>(count);
    }

    const SelectParams& params_;
    const int64_t row_;
    Scratch& scratch_;
    FirstError& error_;
};

}  // namespace

Status select_cpu(const SelectParams& params) {
    FirstError error;
    parallel_items(params.rows, 8 * params.tokens, [&](int64_t begin, int64_t end) {
        Scratch scratch;
        for (int64_t row = begin; row < end; ++row) {
            RowSelection(params, row, scratch, error).run();
        }
    });
    return error.status();
}

}  // namespace lightvlm
