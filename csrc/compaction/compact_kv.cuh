// compact_kv_: kept rows to the front, in place, every layer in one launch.
//
// Formula   row(j) <- row(index[j]) for j = 0, 1, ..., count - 1, in each chain (tensor, b, h).
// Owner     One block owns one slice of the columns of one chain; columns do not depend on each
//           other. It walks the slots in tiles: load tile k + 1, barrier, store tile k.
// Hazard    The index ascends, so index[j] >= j. Storing tile k overwrites rows of its own slots
//           only, which no later slot reads, and the barrier stands between the loads of tiles
//           <= k and those stores. Loading one tile ahead is therefore safe.
// Table     The tensors come by value in the kernel's parameters (up to 32 KiB of them), so that a
//           CUDA graph replays without a copy from the host.
// Shared    None. Registers: two tiles of 4 vectors and three of 4 indices a thread.
// Bound     Bytes: each row that moves is read once and written once.
#pragma once

#include "common/device_error.cuh"
#include "common/host_device.h"
#include "common/launch.h"
#include "compaction/compact_kv.h"

namespace lightvlm {

constexpr int kCompactThreads = 256;
constexpr int kCompactUnroll = 4;

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

// What one block moves.
struct CompactSlice {
    char* data;  // of row 0, at the slice's first column
    const int32_t* index;
    int32_t* error;
    int64_t token_stride;
    int32_t count;
    int32_t tokens;
    int32_t lanes;
};

// The row that moves to slot j; -1 where none does: past count, in its place already, or bad.
__device__ __forceinline__ int32_t compact_source(const CompactSlice& slice, int64_t j) {
    if (j >= slice.count) return -1;
    const int32_t row = slice.index[j];
    const int32_t before = j > 0 ? slice.index[j - 1] : -1;
    if (row == j && before < row && row < slice.tokens) return -1;
    if (row < 0 || row >= slice.tokens) {
        report_device_error(slice.error, kErrorIndexRange);
        return -1;
    }
    // A row below its slot may have been overwritten; it comes after an entry out of order.
    if (row <= before || row < j) {
        report_device_error(slice.error, kErrorIndexOrder);
        return -1;
    }
    return row;
}

template <typename Vector>
__device__ __forceinline__ void compact_rows(const CompactSlice& slice) {
    const int rows_at_once = kCompactThreads / slice.lanes;
    const int own_row = static_cast<int>(threadIdx.x) / slice.lanes;
    const int64_t column = static_cast<int64_t>(threadIdx.x) % slice.lanes * sizeof(Vector);
    const bool active = own_row < rows_at_once;
    const int tile = rows_at_once * kCompactUnroll;
    const int tiles = (slice.count + tile - 1) / tile;

    const auto slot_of = [&](int64_t t, int u) { return t * tile + u * rows_at_once + own_row; };
    const auto find = [&](int64_t t, int32_t* sources) {
        LIGHTVLM_UNROLL
        for (int u = 0; u < kCompactUnroll; ++u) {
            sources[u] = active ? compact_source(slice, slot_of(t, u)) : -1;
        }
    };
    const auto load = [&](const int32_t* sources, Vector* held) {
        LIGHTVLM_UNROLL
        for (int u = 0; u < kCompactUnroll; ++u) {
            if (sources[u] < 0) continue;
            // Not through L1, nor the read-only path: these rows are written, too.
            held[u] = __ldcg(reinterpret_cast<const Vector*>(
                slice.data + sources[u] * slice.token_stride + column));
        }
    };

    int32_t sources[kCompactUnroll];
    int32_t next_sources[kCompactUnroll];
    int32_t after_sources[kCompactUnroll];
    Vector held[kCompactUnroll] = {};
    Vector next_held[kCompactUnroll] = {};
    find(0, sources);
    find(1, next_sources);
    load(sources, held);
    for (int t = 0; t < tiles; ++t) {
        load(next_sources, next_held);
        find(t + 2, after_sources);
        __syncthreads();
        LIGHTVLM_UNROLL
        for (int u = 0; u < kCompactUnroll; ++u) {
            if (sources[u] < 0) continue;
            __stcs(
                reinterpret_cast<Vector*>(slice.data + slot_of(t, u) * slice.token_stride + column),
                held[u]);
        }
        LIGHTVLM_UNROLL
        for (int u = 0; u < kCompactUnroll; ++u) {
            held[u] = next_held[u];
            sources[u] = next_sources[u];
            next_sources[u] = after_sources[u];
        }
    }
}

template <int kCapacity>
__global__ void __launch_bounds__(kCompactThreads, 4)
    compact_kv_kernel(const __grid_constant__ CompactTable<kCapacity> table) {
    // The last entry that begins at or before this block.
    const int64_t block = blockIdx.x;
    int low = 0;
    int high = table.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.entries[middle].first_block <= block) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const CompactEntry& entry = table.entries[low];

    const int64_t within = block - entry.first_block;
    const int64_t chain = within / entry.slices;
    const int first = static_cast<int>(within % entry.slices) * entry.lanes;
    const int64_t batch = chain / entry.heads;
    const int64_t head = chain % entry.heads;

    CompactSlice slice;
    slice.data = entry.data + batch * entry.batch_stride + head * entry.head_stride +
                 static_cast<int64_t>(first) * entry.vector_bytes;
    slice.index = entry.index + batch * entry.index_batch_stride + head * entry.index_head_stride;
    slice.error = table.error;
    slice.token_stride = entry.token_stride;
    slice.count = entry.count[batch * entry.count_batch_stride + head * entry.count_head_stride];
    slice.tokens = entry.tokens;
    slice.lanes = min(entry.lanes, entry.row_vectors - first);
    if (slice.count < 0 || slice.count > entry.slots) {
        if (threadIdx.x == 0) report_device_error(slice.error, kErrorCount);
        return;
    }
    switch (entry.vector_bytes) {
        case 16:
            return compact_rows<uint4>(slice);
        case 8:
            return compact_rows<uint2>(slice);
        case 4:
            return compact_rows<unsigned>(slice);
        case 2:
            return compact_rows<unsigned short>(slice);
        default:
            return compact_rows<unsigned char>(slice);
    }
}

}  // namespace lightvlm
