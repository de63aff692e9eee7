// CPU twin of compact_paged_kv.cuh: checks everything, notes the pages that come free, then moves
// (compact_rows_cpu.h).
#include "compaction/compact_paged_kv.h"

#include <algorithm>
#include <vector>

#include "compaction/compact_rows_cpu.h"

namespace lightvlm {

namespace {

int64_t pages_of(const PagedTable& in, int64_t tokens) {
    return (tokens + in.page_tokens - 1) / in.page_tokens;
}

int64_t length_of(const PagedTable& in, int64_t row) {
    return in.lens == nullptr ? in.blocks * in.page_tokens : in.lens[row];
}

// How many rows' tables name each page; a page that a row names twice counts twice.
Status count_users(const PagedTable& in, std::vector<int32_t>* users) {
    users->assign(static_cast<size_t>(in.pages), 0);
    for (int64_t b = 0; b < in.batch; ++b) {
        const int64_t length = length_of(in, b);
        if (length < 0 || length > in.blocks * in.page_tokens) {
            return {kErrorLens, b, -1, static_cast<double>(length)};
        }
        for (int64_t p = 0; p < pages_of(in, length); ++p) {
            const int32_t page = in.table[b * in.blocks + p];
            if (page < 0 || page >= in.pages) {
                return {kErrorPageRange, b, p, static_cast<double>(page)};
            }
            ++(*users)[page];
        }
    }
    return {};
}

// One row of an index, of one head: its values, and that all pages it writes to have one user.
Status check_row(const PagedTable& in, const CompactIndex& by, const std::vector<int32_t>& users,
                 int64_t batch, int64_t head) {
    const int64_t row = batch * by.heads + head;
    const int32_t count = by.count[row];
    const int32_t* index = by.index + row * by.slots;
    if (count < 0 || count > by.slots) {
        return {kErrorCount, batch, -1, static_cast<double>(count)};
    }
    const CompactIndexError error = check_compact_indices(index, count, length_of(in, batch));
    if (error.bit != 0) return {error.bit, batch, error.slot, static_cast<double>(error.value)};
    int64_t first = 0;
    while (first < count && index[first] == first) ++first;
    if (first == count) return {};
    // From the first row that moves on, all do.
    for (int64_t p = first / in.page_tokens; p < pages_of(in, count); ++p) {
        const int32_t page = in.table[batch * in.blocks + p];
        const bool shared = in.refcount != nullptr && in.refcount[page] > 1;
        if (shared || users[page] > 1) {
            return {kErrorSharedPage, batch, p, static_cast<double>(page)};
        }
    }
    return {};
}

void note_freed(const PagedTable& in, const CompactIndex* indexes, int64_t index_count) {
    int64_t freed = 0;
    for (int64_t b = 0; b < in.batch; ++b) {
        int64_t after = 0;
        for (int64_t i = 0; i < index_count; ++i) {
            for (int64_t h = 0; h < indexes[i].heads; ++h) {
                after = std::max(after, pages_of(in, indexes[i].count[b * indexes[i].heads + h]));
            }
        }
        in.row_pages[b] = static_cast<int32_t>(after);
        for (int64_t p = after; p < pages_of(in, length_of(in, b)); ++p) {
            in.freed[freed++] = in.table[b * in.blocks + p];
        }
    }
    in.freed_count[0] = static_cast<int32_t>(freed);
    std::fill(in.freed + freed, in.freed + in.batch * in.blocks, -1);
}

}  // namespace

Status compact_paged_kv_cpu(const CompactPagedKvParams& params) {
    std::vector<int32_t> users;
    const CompactIndex* end = params.indexes + params.index_count;
    const CompactIndex* by = params.indexes;
    for (int64_t t = 0; t < params.table_count; ++t) {
        const PagedTable& in = params.tables[t];
        const Status status = count_users(in, &users);
        if (!status.ok()) return status;
        for (; by != end && by->paged == &in; ++by) {
            for (int64_t b = 0; b < in.batch; ++b) {
                for (int64_t h = 0; h < by->heads; ++h) {
                    const Status found = check_row(in, *by, users, b, h);
                    if (!found.ok()) return found;
                }
            }
        }
    }
    by = params.indexes;
    for (int64_t t = 0; t < params.table_count; ++t) {
        const CompactIndex* first = by;
        while (by != end && by->paged == &params.tables[t]) ++by;
        note_freed(params.tables[t], first, by - first);
    }
    compact_cpu::compact_rows(params.tensors, params.tensor_count);
    return {};
}

}  // namespace lightvlm
