// CPU twin of importance: what a batch row's lens, leftpad and row_pos amount to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "importance/importance.h"

namespace lightvlm::importance_detail {

// One batch row: its keys, and the probe rows that count.
struct BatchRow {
    int64_t begin = 0;
    int64_t end = 0;
    std::vector<int32_t> rows;
    std::vector<int32_t> positions;
    // Of each target: a probe sees it where the probe's limit is as large.
    std::vector<int32_t> threshold;

    int64_t keys() const { return end - begin; }
    int64_t used() const { return static_cast<int64_t>(rows.size()); }
};

inline BatchRow plan_row(const ImportanceParams& params, int64_t b, FirstError& error) {
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

inline void count_visible(const ImportanceParams& params, int64_t b, const BatchRow& row) {
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

}  // namespace lightvlm::importance_detail
