// compact_paged_kv_: kept rows of paged caches to the front of their block tables, every layer in
// one launch.
//
// Formula   row(j) <- row(index[j]) for j = 0, 1, ..., count - 1, in each chain (tensor, b, h);
//           row n lies in page table[b, n / page_tokens].
// Owner     Blocks come in two kinds. A mover owns one slice of the columns of one chain, as in
//           compact_kv_ (compact_chain.cuh). A bookkeeper owns one row of one table: the number of
//           pages that the row has afterwards. Whichever bookkeeper of a table is last (a count in
//           freed_count says so) writes the list of pages that came free, row by row.
// Verdict   A mover first looks at the whole index row of its chain, at the row's pages and at
//           their users: one that is wrong, or would write into a shared page, moves nothing. Every
//           mover of the chain, and the bookkeeper, come to the same verdict, since nothing that
//           they read is written. A row with a wrong index, of whatever head, gives up no page.
// Hazard    As in compact_chain.cuh: slots and rows are ordered by their place in the sequence, and
//           a page stands once in the tables of a call or is not written.
// Shared    A CompactShallowRing or CompactDeepRing, and 36 bytes.
// Bound     Bytes: each row that moves is read once and written once; each slice of a chain reads
//           its index twice, 8 bytes for every 64 and more that move.
#pragma once

#include "common/block.cuh"
#include "common/device_error.cuh"
#include "common/divisor.h"
#include "common/host_device.h"
#include "common/launch.h"
#include "compaction/compact_chain.cuh"
#include "compaction/compact_paged_kv.h"

namespace lightvlm {

struct PagedTableEntry {
    const int32_t* table;
    const int32_t* lens;
    const int32_t* refcount;
    int32_t* row_pages;
    int32_t* freed;
    int32_t* freed_count;
    Divisor page_tokens;
    int32_t batch;
    int32_t blocks;
    int32_t pages;
    int32_t first_index;  // its indexes are [first_index, the next table's)
    int32_t first_block;  // its bookkeepers likewise
};

struct PagedIndexEntry {
    const int32_t* index;
    const int32_t* count;
    int32_t heads;
    int32_t slots;
    int32_t table;
    int32_t unused;
};

struct PagedTensorEntry {
    char* data;
    int64_t page_stride;  // bytes
    int64_t head_stride;
    int64_t token_stride;
    int64_t first_block;
    int32_t heads;
    int32_t by;  // its index
    int32_t row_vectors;
    int32_t vector_bytes;
    int32_t slices;
    int32_t lanes;
};

template <int kLayers>
struct PagedLaunch {
    int32_t* error;
    int32_t tensor_count;
    int32_t index_count;
    int32_t table_count;
    int32_t bookkeepers;  // blocks before the first mover
    PagedTensorEntry tensors[2 * kLayers];
    PagedIndexEntry indexes[kLayers];
    PagedTableEntry tables[kLayers];
};

template <typename Ring>
struct PagedShared {
    Ring ring;
    int32_t scratch[kCompactThreads / kWarpThreads];
    int32_t is_last;
};

// Where the rows of one chain lie. The verdict has found all of it right.
struct PagedRows {
    const int32_t* index_;
    const int32_t* table;
    Divisor page_tokens;
    int32_t count;
    int64_t page_stride;
    int64_t token_stride;

    using Index = int32_t;
    struct Place {
        int32_t row;
        int32_t from;  // pages
        int32_t to;
    };

    __device__ __forceinline__ Index index(int64_t j) const { return j < count ? index_[j] : -1; }

    __device__ __forceinline__ Place place(int64_t j, Index row) const {
        if (row < 0) return {-1, 0, 0};
        return {row, table[page_tokens.quotient(row)],
                table[page_tokens.quotient(static_cast<int32_t>(j))]};
    }

    __device__ __forceinline__ int64_t offset(int32_t page, int32_t row) const {
        return page * page_stride + page_tokens.remainder(row) * token_stride;
    }
    __device__ __forceinline__ CompactMove move(int64_t j, const Place& place) const {
        if (place.row < 0 || place.row == j) return {-1, 0};
        return {offset(place.from, place.row), offset(place.to, static_cast<int32_t>(j))};
    }
};

__device__ __forceinline__ int32_t pages_of(const PagedTableEntry& in, int32_t tokens) {
    return tokens == 0 ? 0 : in.page_tokens.quotient(tokens - 1) + 1;
}

// One row of a table, and how many tokens and pages it has on entry.
struct PagedRow {
    const int32_t* table;
    int32_t length;  // -1: out of range
    int32_t pages;
};

__device__ __forceinline__ PagedRow paged_row(const PagedTableEntry& in, int32_t batch) {
    const int32_t most = in.blocks * in.page_tokens.divisor;
    const int32_t length = in.lens == nullptr ? most : in.lens[batch];
    const bool right = length >= 0 && length <= most;
    return {in.table + static_cast<int64_t>(batch) * in.blocks, right ? length : -1,
            right ? pages_of(in, length) : 0};
}

struct PagedVerdict {
    int32_t error;  // bits; 0: the rows may move
    int32_t count;
    int32_t first;  // slot from which on all rows move
};

// The verdict on one index row. All threads of the block call it and get the same.
__device__ inline PagedVerdict paged_verdict(const PagedTableEntry& in, const PagedIndexEntry& by,
                                             const PagedRow& row, int64_t index_row,
                                             int32_t* scratch) {
    const int32_t* index = by.index + index_row * by.slots;
    const int32_t count = by.count[index_row];
    if (row.length < 0) return {kErrorLens, 0, 0};
    if (count < 0 || count > by.slots) return {kErrorCount, 0, 0};

    int32_t error = 0;
    int32_t first = count;
    for (int32_t j = threadIdx.x; j < count; j += kCompactThreads) {
        const int32_t here = index[j];
        const int32_t before = j > 0 ? index[j - 1] : -1;
        if (here < 0 || here >= row.length) {
            error |= kErrorIndexRange;
        } else if (here <= before) {
            error |= kErrorIndexOrder;
        }
        if (here != j) first = min(first, j);
    }
    const auto smaller = [](int32_t a, int32_t b) { return a < b ? a : b; };
    first = block_reduce<kCompactThreads>(first, scratch, smaller);

    const int32_t first_written = in.page_tokens.quotient(first);
    const int32_t last_written = first < count ? in.page_tokens.quotient(count - 1) : -1;
    for (int32_t p = threadIdx.x; p < row.pages; p += kCompactThreads) {
        const int32_t page = row.table[p];
        if (page < 0 || page >= in.pages) {
            error |= kErrorPageRange;
        } else if (in.refcount != nullptr && p >= first_written && p <= last_written &&
                   in.refcount[page] > 1) {
            error |= kErrorSharedPage;
        }
    }
    error =
        block_reduce<kCompactThreads>(error, scratch, [](int32_t a, int32_t b) { return a | b; });
    return {error, count, first};
}

// The list of one table, by its last bookkeeper. What the others wrote is visible to it.
__device__ inline void list_freed(const PagedTableEntry& in) {
    int32_t freed = 0;
    for (int32_t b = 0; b < in.batch; ++b) {
        const PagedRow row = paged_row(in, b);
        const int32_t after = __ldcg(in.row_pages + b);
        for (int32_t begin = after; begin < row.pages; begin += kCompactThreads) {
            const int32_t p = begin + static_cast<int32_t>(threadIdx.x);
            if (p < row.pages) in.freed[freed + p - after] = row.table[p];
        }
        freed += max(row.pages - after, 0);
    }
    const int64_t most = static_cast<int64_t>(in.batch) * in.blocks;
    for (int64_t i = freed + static_cast<int64_t>(threadIdx.x); i < most; i += kCompactThreads) {
        in.freed[i] = -1;
    }
    if (threadIdx.x == 0) in.freed_count[0] = freed;
}

template <int kLayers, typename Ring>
__device__ void keep_books(const PagedLaunch<kLayers>& all, int which, int32_t batch,
                           PagedShared<Ring>* shared) {
    const PagedTableEntry& in = all.tables[which];
    const int32_t end =
        which + 1 < all.table_count ? all.tables[which + 1].first_index : all.index_count;
    const PagedRow row = paged_row(in, batch);
    int32_t error = 0;
    int32_t after = 0;
    for (int32_t i = in.first_index; i < end; ++i) {
        const PagedIndexEntry& by = all.indexes[i];
        for (int32_t h = 0; h < by.heads; ++h) {
            const int64_t index_row = static_cast<int64_t>(batch) * by.heads + h;
            const PagedVerdict verdict = paged_verdict(in, by, row, index_row, shared->scratch);
            error |= verdict.error;
            after = max(after, pages_of(in, verdict.count));
        }
    }
    if (threadIdx.x == 0) {
        if (error != 0) report_device_error(all.error, error);
        in.row_pages[batch] = error != 0 ? row.pages : after;
        __threadfence();
        const int32_t before = atomicAdd(in.freed_count, 1);
        __threadfence();
        shared->is_last = before == in.batch - 1;
    }
    __syncthreads();
    if (shared->is_last) list_freed(in);
}

// Registers: three blocks a multiprocessor with the shallow ring (72 KiB of loads under way; at
// four the compiler spills), two with the deep.
template <int kLayers, typename Ring>
__global__ void __launch_bounds__(kCompactThreads, Ring::kStages == 4 ? 3 : 2)
    compact_paged_kv_kernel(const __grid_constant__ PagedLaunch<kLayers> all) {
    auto* shared = shared_memory<PagedShared<Ring>>();
    const int64_t block = blockIdx.x;
    if (block < all.bookkeepers) {
        const int which = find_entry(all.table_count, block,
                                     [&](int i) { return int64_t{all.tables[i].first_block}; });
        const auto batch = static_cast<int32_t>(block - all.tables[which].first_block);
        return keep_books(all, which, batch, shared);
    }

    const int which =
        find_entry(all.tensor_count, block, [&](int i) { return all.tensors[i].first_block; });
    const PagedTensorEntry& entry = all.tensors[which];
    const PagedIndexEntry& by = all.indexes[entry.by];
    const PagedTableEntry& in = all.tables[by.table];
    const int64_t within = block - entry.first_block;
    const int64_t chain = within / entry.slices;
    const int first_vector = static_cast<int>(within % entry.slices) * entry.lanes;
    const auto batch = static_cast<int32_t>(chain / entry.heads);
    const int64_t head = chain % entry.heads;
    const int64_t index_row = by.heads == 1 ? batch : chain;

    const PagedRow row = paged_row(in, batch);
    const PagedVerdict verdict = paged_verdict(in, by, row, index_row, shared->scratch);
    if (verdict.error != 0 || verdict.first == verdict.count) return;

    PagedRows rows;
    rows.index_ = by.index + index_row * by.slots;
    rows.table = row.table;
    rows.page_tokens = in.page_tokens;
    rows.count = verdict.count;
    rows.page_stride = entry.page_stride;
    rows.token_stride = entry.token_stride;
    char* data = entry.data + head * entry.head_stride +
                 static_cast<int64_t>(first_vector) * entry.vector_bytes;
    compact_any_chain(entry.vector_bytes, &shared->ring, rows, data,
                      min(entry.lanes, entry.row_vectors - first_vector), verdict.first,
                      verdict.count);
}

}  // namespace lightvlm
