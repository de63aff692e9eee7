// One block moves one slice of the columns of one chain through a ring of tiles in shared memory.
// compact_kv_ and compact_paged_kv_ differ in where a row lies, and in nothing else.
//
//            slots   first .. t-1      t        t+1 .. t+S-1        t+S ...
//   tile             stored       landed      on their way      addresses known
//                                    |
//                                    +--> stored now
//
// Owner     A thread stores the very vectors that it loaded. Thread r of the block works out the
//           addresses of row r of a tile, for all threads.
// Hazard    The index ascends, so index[j] >= j: storing tile t overwrites the rows of its own
//           slots, which no slot of a later tile reads. A barrier stands between the landing of
//           all loads of tiles <= t, of all threads, and the stores of tile t; loads of later tiles
//           may be under way meanwhile, since what they read is not overwritten before they land.
// Shared    CompactRing: S stages of kThreads * kUnroll vectors of 16 bytes, and S + 1 lists of
//           addresses (the one being stored, S - 1 under way, and the one being written).
#pragma once

#include "common/launch.h"
#include "common/ptx.cuh"

namespace lightvlm {

constexpr int kCompactThreads = 256;
constexpr int kCompactVectorBytes = 16;

// Byte offsets of a row's old and new place from the chain's begin; source -1: it does not move.
struct CompactMove {
    int64_t source;
    int64_t target;
};

// kStages tiles of at most kRows rows (a row of 64 bytes or less, as wide as a memory sector pair,
// fills a tile with as many).
template <int kStages_, int kUnroll_>
struct CompactRing {
    static constexpr int kStages = kStages_;
    static constexpr int kUnroll = kUnroll_;
    static constexpr int kVectors = kCompactThreads * kUnroll;
    static constexpr int kRows = kVectors / 4;
    static_assert(kRows <= kCompactThreads, "a thread works out one row of a tile");

    uint4 vectors[kStages][kVectors];
    CompactMove moves[kStages + 1][kRows];
};

// Many chains: several blocks to a multiprocessor, 24 KiB of loads under way in each.
using CompactShallowRing = CompactRing<4, 2>;
// A chain or two to a multiprocessor or fewer: 60 KiB under way in each.
using CompactDeepRing = CompactRing<6, 3>;
static_assert(sizeof(CompactShallowRing) == 42 * 1024);
static_assert(sizeof(CompactDeepRing) <= 99 * 1024, "what sm_86, sm_89 and sm_120 have");

template <typename Vector>
__device__ __forceinline__ void compact_load(uint4* shared, const char* global) {
    // Never through the read-only path: these rows are written, too.
    if constexpr (sizeof(Vector) == kCompactVectorBytes) {
        ptx::cp_async_16(shared, global);
    } else {
        *reinterpret_cast<Vector*>(shared) = __ldcg(reinterpret_cast<const Vector*>(global));
    }
}

// How many slots from `first` on stay where they are, in whole chunks, so that long prefixes cost
// next to nothing. stays(j) is a slot's own answer; only slots that all gave it are skipped.
template <typename Stays>
__device__ __forceinline__ int64_t compact_skip(int64_t count, const Stays& stays) {
    constexpr int kAtOnce = 8;
    constexpr int64_t kChunk = kCompactThreads * kAtOnce;
    int64_t first = 0;
    while (first < count) {
        // A glance at the chunk's end, the same for all threads, spares most calls the scan.
        const int64_t end = min(first + kChunk, count);
        if (!stays(end - 1)) break;
        bool all = true;
        LIGHTVLM_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
            const int64_t j = first + u * kCompactThreads + threadIdx.x;
            if (j < end) all = all && stays(j);
        }
        if (!__syncthreads_and(all)) break;
        first = end;
    }
    return first;
}

// Moves slots [first, count) of the chain whose row 0, at the slice's first column, is at `data`;
// the slice is `lanes` vectors wide. Rows says where rows lie, in three steps, a tile apart each,
// so that the latency of one step is hidden behind a tile:
//     Rows::Index  index(j)            loads the index
//     Rows::Place  place(j, Index)     loads what else it takes
//     CompactMove  move(j, Place)      the addresses
// j may lie past count in each; move() then says -1.
template <typename Vector, typename Ring, typename Rows>
__device__ __forceinline__ void compact_chain(Ring* ring, const Rows& rows, char* data, int lanes,
                                              int64_t first, int64_t count) {
    constexpr int kStages = Ring::kStages;
    constexpr int kUnroll = Ring::kUnroll;
    const int thread = static_cast<int>(threadIdx.x);
    const int tile_rows = min(Ring::kRows, Ring::kVectors / lanes);
    const bool has_row = thread < tile_rows;
    const auto slot = [&](int64_t tile) { return first + tile * tile_rows + thread; };

    int row[kUnroll];
    LIGHTVLM_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
        row[u] = (u * kCompactThreads + thread) / lanes;
        if (row[u] >= tile_rows) row[u] = -1;
    }
    char* own_column[kUnroll];
    LIGHTVLM_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
        own_column[u] = data + (u * kCompactThreads + thread) % lanes * sizeof(Vector);
    }
    const auto load = [&](int tile) {
        const CompactMove* moves = ring->moves[tile % (kStages + 1)];
        uint4* vectors = ring->vectors[tile % kStages];
        LIGHTVLM_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            if (row[u] < 0) continue;
            const int64_t source = moves[row[u]].source;
            if (source < 0) continue;
            compact_load<Vector>(vectors + u * kCompactThreads + thread, own_column[u] + source);
        }
        ptx::cp_async_commit();
    };
    const auto store = [&](int tile) {
        const CompactMove* moves = ring->moves[tile % (kStages + 1)];
        const uint4* vectors = ring->vectors[tile % kStages];
        LIGHTVLM_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
            if (row[u] < 0) continue;
            const CompactMove move = moves[row[u]];
            if (move.source < 0) continue;
            const uint4* own = vectors + u * kCompactThreads + thread;
            __stcs(reinterpret_cast<Vector*>(own_column[u] + move.target),
                   *reinterpret_cast<const Vector*>(own));
        }
    };

    // Addresses of the first S tiles, and the loads of the next two steps.
    typename Rows::Index index[kStages + 2];
    typename Rows::Place place[kStages + 1];
    LIGHTVLM_UNROLL
    for (int s = 0; s < kStages + 2; ++s) index[s] = rows.index(has_row ? slot(s) : count);
    LIGHTVLM_UNROLL
    for (int s = 0; s < kStages + 1; ++s) {
        place[s] = rows.place(has_row ? slot(s) : count, index[s]);
    }
    LIGHTVLM_UNROLL
    for (int s = 0; s < kStages; ++s) {
        if (has_row) ring->moves[s][thread] = rows.move(slot(s), place[s]);
    }
    typename Rows::Place next_place = place[kStages];
    typename Rows::Index next_index = index[kStages + 1];
    __syncthreads();
    LIGHTVLM_UNROLL
    for (int s = 0; s < kStages - 1; ++s) load(s);

    const int tiles = static_cast<int>((count - first + tile_rows - 1) / tile_rows);
    for (int t = 0; t < tiles; ++t) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();
        load(t + kStages - 1);
        store(t);
        const int64_t j = has_row ? slot(t + kStages) : count;
        if (has_row) ring->moves[(t + kStages) % (kStages + 1)][thread] = rows.move(j, next_place);
        next_place = rows.place(j + tile_rows, next_index);
        next_index = rows.index(j + 2 * tile_rows);
    }
}

// The widest vector that an address, a stride and a row are all multiples of.
template <typename Ring, typename Rows>
__device__ __forceinline__ void compact_any_chain(int vector_bytes, Ring* ring, const Rows& rows,
                                                  char* data, int lanes, int64_t first,
                                                  int64_t count) {
    switch (vector_bytes) {
        case 16:
            return compact_chain<uint4>(ring, rows, data, lanes, first, count);
        case 8:
            return compact_chain<uint2>(ring, rows, data, lanes, first, count);
        case 4:
            return compact_chain<unsigned>(ring, rows, data, lanes, first, count);
        case 2:
            return compact_chain<unsigned short>(ring, rows, data, lanes, first, count);
        default:
            return compact_chain<unsigned char>(ring, rows, data, lanes, first, count);
    }
}

// The last of `count` entries that begins at or before `block`; begin(i) ascends.
template <typename Begin>
__device__ __forceinline__ int find_entry(int count, int64_t block, const Begin& begin) {
    int low = 0;
    int high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (begin(middle) <= block) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

}  // namespace lightvlm
