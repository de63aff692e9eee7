// Device side of rows.h: one block works on one row. Marks go to `inverse`, 0 for kept and -1 for
// not, until write_selection() numbers them.
#pragma once

#include "common/block.cuh"
#include "common/device_error.cuh"
#include "common/launch.h"
#include "selection/rows.h"
#include "selection/score_order.h"

namespace lightvlm {

// Scratch of the functions below.
template <int kThreads>
struct RowScratch {
    uint32_t words[kThreads / kWarpThreads];
};

// The row of a block, narrowed to one segment.
struct SelectionRow {
    const float* scores;
    const bool* forced;
    const bool* candidates;
    const int32_t* segment;
    int32_t* inverse;
    int64_t row;
    int32_t segment_id;
    int32_t begin;  // the segment's tokens lie in [begin, end)
    int32_t end;

    __device__ __forceinline__ bool in_segment(int64_t i) const {
        return segment == nullptr || segment[i] == segment_id;
    }
    __device__ __forceinline__ bool is_forced(int64_t i) const {
        return forced != nullptr && forced[i];
    }
    __device__ __forceinline__ bool is_candidate(int64_t i) const {
        return in_segment(i) && !is_forced(i) && (candidates == nullptr || candidates[i]);
    }
};

// All of a row.
__device__ __forceinline__ SelectionRow selection_row(const SelectionRows& rows,
                                                      int64_t row_index) {
    SelectionRow row;
    row.scores = rows.scores + row_index * rows.scores_stride;
    row.forced = rows.forced ? rows.forced + row_index * rows.forced_stride : nullptr;
    row.candidates =
        rows.candidates ? rows.candidates + row_index * rows.candidates_stride : nullptr;
    row.segment = rows.segment ? rows.segment + row_index * rows.segment_stride : nullptr;
    row.inverse = rows.inverse + row_index * rows.tokens;
    row.row = row_index;
    row.segment_id = 0;
    row.begin = 0;
    row.end = static_cast<int32_t>(rows.tokens);
    return row;
}

// The segment's budget; what is negative is none.
__device__ __forceinline__ int64_t segment_budget(const SelectionRows& rows,
                                                  const SelectionRow& row) {
    int64_t budget = rows.keep_each;
    if (rows.keep != nullptr) {
        budget =
            rows.keep[row.row * rows.keep_stride + (rows.keep_per_segment ? row.segment_id : 0)];
    }
    if (budget < 0) report_device_error(rows.error, kErrorNegativeKeep);
    return budget > 0 ? budget : 0;
}

// Marks the forced tokens, then calls body(row) for each segment by ascending id. Ids may be
// sparse: each round finds its segment's extent and the next id.
template <int kThreads, typename Body>
__device__ void for_each_segment(const SelectionRows& rows, int64_t row_index,
                                 RowScratch<kThreads>& scratch, Body body) {
    const int64_t tokens = rows.tokens;
    SelectionRow row = selection_row(rows, row_index);
    constexpr uint32_t kNoSegment = 1u << 31;  // above all ids
    // Read anew wherever it is needed: what lives across the body costs it registers.
    const auto limit = [&] {
        return rows.keep_per_segment && rows.keep_columns < kNoSegment
                   ? static_cast<uint32_t>(rows.keep_columns)
                   : kNoSegment;
    };
    const auto lower = [](uint32_t a, uint32_t b) { return a < b ? a : b; };
    uint32_t next = kNoSegment;
    for (int64_t i = threadIdx.x; i < tokens; i += kThreads) {
        row.inverse[i] = row.is_forced(i) ? 0 : -1;
        if (row.segment == nullptr) continue;
        const int32_t id = row.segment[i];
        if (id < 0) continue;
        if (static_cast<uint32_t>(id) >= limit()) {
            report_device_error(rows.error, kErrorSegmentRange);
        } else {
            next = lower(next, static_cast<uint32_t>(id));
        }
    }
    __syncthreads();
    const bool segmented = row.segment != nullptr;
    if (segmented) next = block_reduce<kThreads>(next, scratch.words, lower);
    // One call of the body, which is inlined: a row without segments is a segment.
    for (bool more = !segmented || next < limit(); more; more = segmented && next < limit()) {
        if (segmented) {
            const uint32_t id = next;
            uint32_t first = static_cast<uint32_t>(tokens);
            uint32_t behind_last = 0;
            next = kNoSegment;
            for (int64_t i = threadIdx.x; i < tokens; i += kThreads) {
                // A negative id is above all others.
                const uint32_t other = static_cast<uint32_t>(row.segment[i]);
                if (other == id) {
                    first = lower(first, static_cast<uint32_t>(i));
                    behind_last = static_cast<uint32_t>(i) + 1;
                } else if (other > id && other < limit()) {
                    next = lower(next, other);
                }
            }
            row.segment_id = static_cast<int32_t>(id);
            row.begin = static_cast<int32_t>(block_reduce<kThreads>(first, scratch.words, lower));
            row.end = static_cast<int32_t>(block_reduce<kThreads>(
                behind_last, scratch.words, [](uint32_t a, uint32_t b) { return a > b ? a : b; }));
            next = block_reduce<kThreads>(next, scratch.words, lower);
        }
        body(row);
        __syncthreads();
    }
}

// Numbers the marks of the row in token order.
template <int kThreads>
__device__ void write_selection(const SelectionRows& rows, int64_t row_index,
                                RowScratch<kThreads>& scratch) {
    int32_t* index = rows.index + row_index * rows.capacity;
    int32_t* inverse = rows.inverse + row_index * rows.tokens;
    int64_t kept = 0;
    for (int64_t tile = 0; tile < rows.tokens; tile += kThreads) {
        const int64_t i = tile + threadIdx.x;
        const bool keep = i < rows.tokens && inverse[i] >= 0;
        uint32_t kept_here;
        const int64_t slot = kept + block_rank<kThreads>(keep, scratch.words, &kept_here);
        if (keep) {
            const bool fits = slot < rows.capacity;
            if (fits) index[slot] = static_cast<int32_t>(i);
            inverse[i] = fits ? static_cast<int32_t>(slot) : -1;
        }
        kept += kept_here;
    }
    if (kept > rows.capacity) {
        kept = rows.capacity;
        report_device_error(rows.error, kErrorCapacity);
    }
    if (threadIdx.x == 0) rows.count[row_index] = static_cast<int32_t>(kept);
    for (int64_t slot = kept + threadIdx.x; slot < rows.capacity; slot += kThreads) {
        index[slot] = -1;
    }
}

}  // namespace lightvlm
