// compact_kv_: kept rows to the front, in place, every layer in one launch.
//
// Formula   row(j) <- row(index[j]) for j = 0, 1, ..., count - 1, in each chain (tensor, b, h).
// Owner     One block owns one slice of the columns of one chain; columns do not depend on each
//           other. How it moves it, and why nothing is overwritten before it was read:
//           compact_chain.cuh.
// Table     The tensors come by value in the kernel's parameters (up to 32 KiB of them), so that a
//           CUDA graph replays without a copy from the host.
// Shared    42 KiB (CompactShallowRing), or 93 KiB where chains are few (CompactDeepRing).
// Bound     Bytes: each row that moves is read once and written once; an index is read once by each
//           slice, 4 bytes for every 64 and more that move.
#pragma once

#include "common/device_error.cuh"
#include "common/host_device.h"
#include "common/launch.h"
#include "compaction/compact_chain.cuh"
#include "compaction/compact_kv.h"

namespace lightvlm {

// A CompactTensor with its CompactIndex, as a kernel parameter.
struct CompactEntry {
    char* data;
    const int32_t* index;
    const int32_t* count;
    int64_t batch_stride;  // of data, in bytes
    int64_t head_stride;
    int64_t token_stride;
    int64_t index_batch_stride;
    int64_t index_head_stride;
    int64_t count_batch_stride;
    int64_t count_head_stride;
    int64_t first_block;  // its blocks are [first_block, the next entry's)
    int32_t heads;
    int32_t slots;
    int32_t tokens;
    int32_t row_vectors;   // of vector_bytes
    int32_t vector_bytes;  // 16, 8, 4, 2 or 1: what pointer, strides and row are multiples of
    int32_t slices;        // blocks to a chain
    int32_t lanes;         // vectors to a slice
    int32_t unused;
};

template <int kCapacity>
struct CompactTable {
    int32_t* error;
    int32_t count;
    int32_t unused;
    CompactEntry entries[kCapacity];
};

// Where the rows of one chain lie: row j at j * token_stride.
struct DenseRows {
    const int32_t* index_;
    int32_t* error;
    int64_t token_stride;
    int32_t count;
    int32_t tokens;

    struct Index {
        int32_t row;
        int32_t before;
    };
    using Place = Index;

    __device__ __forceinline__ Index index(int64_t j) const {
        if (j >= count) return {-1, -1};
        return {index_[j], j > 0 ? index_[j - 1] : -1};
    }
    __device__ __forceinline__ Place place(int64_t, const Index& index) const { return index; }
    __device__ __forceinline__ bool stays(int64_t j) const { return index_[j] == j && j < tokens; }

    __device__ __forceinline__ CompactMove move(int64_t j, const Place& place) const {
        if (j >= count) return {-1, 0};
        const int32_t row = place.row;
        if (row < 0 || row >= tokens) {
            report_device_error(error, kErrorIndexRange);
            return {-1, 0};
        }
        // A row below its slot may have been overwritten; it comes after an entry out of order.
        if (row <= place.before || row < j) {
            report_device_error(error, kErrorIndexOrder);
            return {-1, 0};
        }
        if (row == j) return {-1, 0};
        return {row * token_stride, j * token_stride};
    }
};

// Registers: four blocks a multiprocessor, as the shallow ring allows on sm_90; two with the deep.
template <int kCapacity, typename Ring>
__global__ void __launch_bounds__(kCompactThreads, Ring::kStages == 4 ? 4 : 2)
    compact_kv_kernel(const __grid_constant__ CompactTable<kCapacity> table) {
    const int64_t block = blockIdx.x;
    const int which =
        find_entry(table.count, block, [&](int i) { return table.entries[i].first_block; });
    const CompactEntry& entry = table.entries[which];

    const int64_t within = block - entry.first_block;
    const int64_t chain = within / entry.slices;
    const int first = static_cast<int>(within % entry.slices) * entry.lanes;
    const int64_t batch = chain / entry.heads;
    const int64_t head = chain % entry.heads;

    DenseRows rows;
    rows.index_ = entry.index + batch * entry.index_batch_stride + head * entry.index_head_stride;
    rows.error = table.error;
    rows.token_stride = entry.token_stride;
    rows.count = entry.count[batch * entry.count_batch_stride + head * entry.count_head_stride];
    rows.tokens = entry.tokens;
    if (rows.count < 0 || rows.count > entry.slots) {
        if (threadIdx.x == 0) report_device_error(rows.error, kErrorCount);
        return;
    }
    const int64_t skip = compact_skip(rows.count, [&](int64_t j) { return rows.stays(j); });
    if (skip == rows.count) return;

    char* data = entry.data + batch * entry.batch_stride + head * entry.head_stride +
                 static_cast<int64_t>(first) * entry.vector_bytes;
    compact_any_chain(entry.vector_bytes, shared_memory<Ring>(), rows, data,
                      min(entry.lanes, entry.row_vectors - first), skip, rows.count);
}

}  // namespace lightvlm
