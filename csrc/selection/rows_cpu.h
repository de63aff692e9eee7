// CPU side of rows.h: the candidates of a row, segment by segment, and its numbered marks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "common/error_word.h"
#include "common/multiversion.h"
#include "selection/marks_cpu.h"
#include "selection/rows.h"

namespace lightvlm {

// One row of a SelectionRows; `kept` starts as the forced tokens.
class CpuRow {
  public:
    CpuRow(const SelectionRows& rows, int64_t row, FirstError& error)
        : rows_(rows), row_(row), error_(error) {}

    int64_t tokens() const { return rows_.tokens; }
    const float* scores() const { return rows_.scores + row_ * rows_.scores_stride; }
    // [tokens], null: none is.
    const uint8_t* forced() const { return bytes(rows_.forced, rows_.forced_stride); }
    // [tokens], null: all are.
    const uint8_t* candidates() const { return bytes(rows_.candidates, rows_.candidates_stride); }

    void report(int32_t bit, int64_t position, double value) {
        error_.report(bit, row_, position, value);
    }

    struct Segment {
        int32_t id;
        std::vector<int32_t> tokens;  // ascending
    };

    bool has_segments() const { return rows_.segment != nullptr; }

    // The row's segments by first appearance. False, and reported, where an id has no budget.
    bool segments(std::vector<Segment>* found) {
        const int32_t* ids = rows_.segment + row_ * rows_.segment_stride;
        std::unordered_map<int32_t, size_t> place_of;
        int32_t last_id = -1;
        size_t place = 0;
        for (int64_t i = 0; i < rows_.tokens; ++i) {
            const int32_t id = ids[i];
            if (id < 0) continue;
            if (id != last_id) {  // segments mostly come in runs
                if (rows_.keep_per_segment && id >= rows_.keep_columns) {
                    report(kErrorSegmentRange, i, id);
                    return false;
                }
                const auto [entry, is_new] = place_of.try_emplace(id, found->size());
                if (is_new) found->push_back(Segment{id, {}});
                last_id = id;
                place = entry->second;
            }
            (*found)[place].tokens.push_back(static_cast<int32_t>(i));
        }
        return true;
    }

    // The budget of a segment. False, and reported, where it is negative.
    bool budget(int32_t segment_id, int64_t* keep) {
        *keep = rows_.keep_each;
        if (rows_.keep == nullptr) return true;
        const int64_t column = rows_.keep_per_segment ? segment_id : 0;
        *keep = rows_.keep[row_ * rows_.keep_stride + column];
        if (*keep >= 0) return true;
        report(kErrorNegativeKeep, rows_.keep_per_segment ? column : -1,
               static_cast<double>(*keep));
        return false;
    }

    // Numbers the kept tokens: `first` tells about those before `border`, `second` about the rest.
    template <typename Kept>
    void write(Kept first, Kept second, int64_t border) {
        KeptNumbers numbers{rows_.index + row_ * rows_.capacity, rows_.capacity,
                            rows_.inverse + row_ * rows_.tokens};
        multiversion<NumberKept<Kept>>(first, int64_t{0}, border, &numbers);
        multiversion<NumberKept<Kept>>(second, border, int64_t{rows_.tokens}, &numbers);
        if (numbers.count > rows_.capacity) {
            report(kErrorCapacity, -1, static_cast<double>(numbers.count));
            return;
        }
        std::fill(numbers.index + numbers.count, numbers.index + rows_.capacity, -1);
        rows_.count[row_] = static_cast<int32_t>(numbers.count);
    }

    // Numbers the tokens whose kept[i] is not 0.
    void write(const uint8_t* kept) { write(KeptFlags{kept}, KeptFlags{kept}, rows_.tokens); }

  private:
    const uint8_t* bytes(const bool* flags, int64_t stride) const {
        return flags == nullptr ? nullptr : reinterpret_cast<const uint8_t*>(flags + row_ * stride);
    }

    const SelectionRows& rows_;
    const int64_t row_;
    FirstError& error_;
};

}  // namespace lightvlm
