// CPU twin of select.cuh, a row a thread: score keys, the key at which the budget is met
// (threshold_cpu.h), marks, numbers (marks_cpu.h). Sweeps over the row are vectorised.
#include <algorithm>
#include <vector>

#include "common/multiversion.h"
#include "common/parallel.h"
#include "selection/rows_cpu.h"
#include "selection/score_order.h"
#include "selection/select.h"
#include "selection/threshold_cpu.h"

namespace lightvlm {

namespace {

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

// Returns the sum of the masses.
struct FixedMasses {
    template <CpuLevel level>
    static LIGHTVLM_INLINE uint64_t run(const uint32_t* keys, double highest, uint64_t* masses,
                                        int64_t n) {
        uint64_t total = 0;
        for (int64_t i = 0; i < n; ++i) {
            const float score = keys[i] > kKeyZero ? positive_key_score(keys[i]) : 0.0f;
            masses[i] = fixed_mass(score, highest);
            total += masses[i];
        }
        return total;
    }
};

struct CountKeys {
    template <CpuLevel level>
    static LIGHTVLM_INLINE int64_t run(const uint32_t* keys, int64_t n) {
        int32_t found = 0;  // tokens are fewer than 2^31
        for (int64_t i = 0; i < n; ++i) found += keys[i] != kKeyNone ? 1 : 0;
        return found;
    }
};

struct MarkFrom {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const uint32_t* keys, uint32_t lowest, uint8_t* kept,
                                    int64_t n) {
        for (int64_t i = 0; i < n; ++i) kept[i] |= keys[i] >= lowest ? 1 : 0;
    }
};

// What one thread needs for one row; grows once and is used again for the next row.
struct Scratch {
    std::vector<uint32_t> keys;
    std::vector<uint64_t> masses;
    std::vector<uint8_t> kept;
    ThresholdScratch threshold;
    // One segment, gathered.
    std::vector<uint32_t> segment_keys;
    std::vector<uint8_t> segment_kept;
};

// The chosen among n tokens: keys from `lowest` on, of the tokens at and past `border` one more.
struct Chosen {
    uint32_t lowest;
    int64_t border;
};

// keep counts where mass is 0. all_candidates: no key is kKeyNone.
Chosen choose_among(const uint32_t* keys, int64_t n, bool all_candidates, int64_t keep, double mass,
                    Scratch& scratch) {
    const Chosen none{0xffffffffu, n};  // no score has this key
    const int64_t candidates = all_candidates ? n : multiversion<CountKeys>(keys, n);
    if (candidates == 0) return none;
    uint64_t wanted = static_cast<uint64_t>(std::min(keep, candidates));
    const uint64_t* masses = nullptr;
    if (mass > 0.0) {
        const uint32_t highest = multiversion<HighestKey>(keys, n);
        // Where nothing weighs anything, one token, the highest, stands for the segment.
        wanted = 1;
        if (highest > kKeyZero) {
            scratch.masses.resize(std::max<size_t>(scratch.masses.size(), n));
            const uint64_t total = multiversion<FixedMasses>(
                keys, static_cast<double>(positive_key_score(highest)), scratch.masses.data(), n);
            wanted = mass_target(mass, total);
            masses = scratch.masses.data();
        }
    }
    if (wanted == 0) return none;
    const Threshold threshold = find_threshold(keys, masses, n, wanted, scratch.threshold);
    if (threshold.ties_kept == threshold.ties) return {threshold.key, n};
    // Some of the equals only: the first ones.
    int64_t left = threshold.ties_kept;
    int64_t border = 0;
    for (; left > 0; ++border) left -= keys[border] == threshold.key ? 1 : 0;
    return {threshold.key, border};
}

// Sets kept[i] for them.
void mark_chosen(const uint32_t* keys, int64_t n, const Chosen& chosen, uint8_t* kept) {
    multiversion<MarkFrom>(keys, chosen.lowest, kept, chosen.border);
    multiversion<MarkFrom>(keys + chosen.border, chosen.lowest + 1, kept + chosen.border,
                           n - chosen.border);
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
        const Chosen chosen = choose_among(keys, n, false, keep, mass, scratch);
        mark_chosen(keys, n, chosen, scratch.segment_kept.data());
        for (int64_t j = 0; j < n; ++j) scratch.kept[tokens[j]] |= scratch.segment_kept[j];
    }
    return true;
}

void select_row(CpuRow row, double mass, Scratch& scratch) {
    const int64_t n = row.tokens();
    // Grows only: what a vector sets to zero on the way costs as much as a sweep.
    if (scratch.keys.size() < static_cast<size_t>(n)) scratch.keys.resize(n);
    uint32_t* keys = scratch.keys.data();
    multiversion<ScoreKeys>(row.scores(), keys, n);
    const bool all_candidates = row.candidates() == nullptr && row.forced() == nullptr;
    if (row.candidates() != nullptr) {
        multiversion<ClearKeys>(row.candidates(), uint8_t{0}, keys, n);
    }
    if (row.forced() != nullptr) multiversion<ClearKeys>(row.forced(), uint8_t{1}, keys, n);
    const auto start_marks = [&] {
        scratch.kept.assign(n, 0);
        if (row.forced() == nullptr) return;
        for (int64_t i = 0; i < n; ++i) scratch.kept[i] = row.forced()[i] != 0;
    };
    if (row.has_segments()) {
        start_marks();
        if (select_segments(row, mass, scratch)) row.write(scratch.kept.data());
        return;
    }
    int64_t keep = 0;
    if (mass == 0.0 && !row.budget(0, &keep)) return;
    if (mass > 0.0 && !check_finite(keys, n, nullptr, row)) return;
    const Chosen chosen = choose_among(keys, n, all_candidates, keep, mass, scratch);
    if (row.forced() == nullptr) {
        row.write(KeptKeys{keys, chosen.lowest}, KeptKeys{keys, chosen.lowest + 1}, chosen.border);
        return;
    }
    start_marks();
    mark_chosen(keys, n, chosen, scratch.kept.data());
    row.write(scratch.kept.data());
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
