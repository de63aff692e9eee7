// CPU twin of select.cuh: the same radix search over score keys, a row a thread. Sweeps over the
// row are vectorised; each round of the search keeps only the tokens of the digit it chose.
#include <algorithm>
#include <array>
#include <vector>

#include "common/multiversion.h"
#include "common/parallel.h"
#include "selection/rows_cpu.h"
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

// False where a candidate is +inf, which has no place in a sum; reported.
// tokens: position of each key in the row; null: its own.
bool check_finite(const uint32_t* keys, int64_t n, const int32_t* tokens, CpuRow& row) {
    if (multiversion<HighestKey>(keys, n) != kKeyInfinity) return true;
    const int64_t j = std::find(keys, keys + n, kKeyInfinity) - keys;
    row.report(kErrorInfiniteScore, tokens != nullptr ? tokens[j] : j,
               static_cast<double>(positive_key_score(kKeyInfinity)));
    return false;
}

// Marks the chosen of each segment; false where an error was reported.
bool select_segments(CpuRow& row, double mass, Scratch& scratch) {
    std::vector<CpuRow::Segment> segments;
    if (!row.segments(&segments)) return false;
    for (const auto& [id, tokens] : segments) {
        int64_t keep = 0;
        if (mass == 0.0 && !row.budget(id, &keep)) return false;
        const int64_t n = static_cast<int64_t>(tokens.size());
        scratch.segment_keys.resize(n);
        scratch.segment_kept.assign(n, 0);
        for (int64_t j = 0; j < n; ++j) scratch.segment_keys[j] = scratch.keys[tokens[j]];
        const uint32_t* keys = scratch.segment_keys.data();
        if (mass > 0.0 && !check_finite(keys, n, tokens.data(), row)) return false;
        select_among(keys, n, keep, mass, scratch.segment_kept.data(), scratch);
        for (int64_t j = 0; j < n; ++j) scratch.kept[tokens[j]] |= scratch.segment_kept[j];
    }
    return true;
}

void select_row(CpuRow row, double mass, Scratch& scratch) {
    const int64_t n = row.tokens();
    scratch.keys.resize(n);
    scratch.kept.assign(n, 0);
    uint32_t* keys = scratch.keys.data();
    multiversion<ScoreKeys>(row.scores(), keys, n);
    if (row.candidates() != nullptr) {
        multiversion<ClearKeys>(row.candidates(), uint8_t{0}, keys, n);
    }
    if (row.forced() != nullptr) {
        multiversion<ClearKeys>(row.forced(), uint8_t{1}, keys, n);
        for (int64_t i = 0; i < n; ++i) scratch.kept[i] = row.forced()[i] != 0;
    }
    if (row.has_segments()) {
        if (!select_segments(row, mass, scratch)) return;
    } else {
        int64_t keep = 0;
        if (mass == 0.0 && !row.budget(0, &keep)) return;
        if (mass > 0.0 && !check_finite(keys, n, nullptr, row)) return;
        select_among(keys, n, keep, mass, scratch.kept.data(), scratch);
    }
    row.write(scratch.kept.data(), scratch.slots);
}

}  // namespace

Status select_cpu(const SelectParams& params) {
    FirstError error;
    parallel_items(params.rows.rows, 8 * params.rows.tokens, [&](int64_t begin, int64_t end) {
        Scratch scratch;
        for (int64_t row = begin; row < end; ++row) {
            select_row(CpuRow(params.rows, row, error), params.mass, scratch);
        }
    });
    return error.status();
}

}  // namespace lightvlm
