// How rows move on a CPU, for compact_kv_ and compact_paged_kv_: chains that share an index advance
// in lockstep, a few to a thread.
//
// At a third of the rows kept, hardware prefetchers fetch most of the others too. Several streams
// side by side, and fetching ahead what comes next, keep them from that; storing past the caches
// saves reading each destination line first. Rows that stay are skipped, long runs of kept rows
// are left to memmove.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/multiversion.h"
#include "common/parallel.h"
#include "compaction/compact_kv.h"

namespace lightvlm::compact_cpu {

constexpr int64_t kLineBytes = 64;
constexpr int kMaxLanes = 8;
// Bytes of sources under way, over all lanes; at least a row of each.
constexpr int64_t kPrefetchBytes = 4096;
// Runs from here on are left to memmove.
constexpr int64_t kMemmoveBytes = 4096;
// Moves from here on bypass the caches: their results would not stay there anyway.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
// No slice of a row is narrower: a few lines in a row are what memory likes.
constexpr int64_t kSliceBytes = 256;

LIGHTVLM_INLINE void prefetch(const char* row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(row + at, 0, 2);
}

// from > to, and both may overlap: each piece is read before a later one is written.
LIGHTVLM_INLINE void copy_down(char* to, const char* from, int64_t bytes) {
    int64_t at = 0;
    for (; at + kLineBytes <= bytes; at += kLineBytes) {
        char line[kLineBytes];
        std::memcpy(line, from + at, kLineBytes);
        std::memcpy(to + at, line, kLineBytes);
    }
    if (at < bytes) std::memmove(to + at, from + at, static_cast<size_t>(bytes - at));
}

// As copy_down, past the caches. to is aligned to 16 bytes, and bytes are a multiple of 64.
LIGHTVLM_INLINE void stream_down(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
    for (int64_t at = 0; at < bytes; at += kLineBytes) {
        const auto* source = reinterpret_cast<const __m128i*>(from + at);
        auto* target = reinterpret_cast<__m128i*>(to + at);
        const __m128i a = _mm_loadu_si128(source);
        const __m128i b = _mm_loadu_si128(source + 1);
        const __m128i c = _mm_loadu_si128(source + 2);
        const __m128i d = _mm_loadu_si128(source + 3);
        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
#else
    copy_down(to, from, bytes);
#endif
}

inline void finish_streaming() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Where rows lie: row n of a lane at n * token_stride.
struct DensePlaces {
    using Place = int64_t;

    LIGHTVLM_INLINE Place at(int64_t row) const { return row; }
    LIGHTVLM_INLINE int64_t longest_run(Place, Place) const {
        return std::numeric_limits<int64_t>::max();
    }
};

// Row n in page table[n / page_tokens], at n % page_tokens.
struct PagedPlaces {
    struct Place {
        int64_t page;
        int64_t within;
    };
    const int32_t* table;
    uint32_t page_tokens;

    LIGHTVLM_INLINE Place at(int64_t row) const {
        const uint32_t block = static_cast<uint32_t>(row) / page_tokens;
        return {table[block], static_cast<uint32_t>(row) - block * page_tokens};
    }
    LIGHTVLM_INLINE int64_t longest_run(const Place& a, const Place& b) const {
        return page_tokens - std::max(a.within, b.within);
    }
};

// A chain, or a slice of its columns.
struct Lane {
    char* data;  // of row 0, or of page 0
    int64_t row_bytes;
    int64_t token_stride;
    int64_t page_stride;
    bool stream;

    LIGHTVLM_INLINE char* at(int64_t row) const { return data + row * token_stride; }
    LIGHTVLM_INLINE char* at(const PagedPlaces::Place& place) const {
        return data + place.page * page_stride + place.within * token_stride;
    }
    LIGHTVLM_INLINE void move(char* to, const char* from) const {
        stream ? stream_down(to, from, row_bytes) : copy_down(to, from, row_bytes);
    }
};

// Lanes that share an index.
struct Bundle {
    const int32_t* index;
    int64_t count;
    int lanes = 0;
    Lane lane[kMaxLanes];

    template <typename Places>
    void move(const Places& places) const {
        int64_t row_bytes = 0;
        bool adjacent = true;  // rows that follow each other are one piece, in each lane
        for (int l = 0; l < lanes; ++l) {
            row_bytes += lane[l].row_bytes;
            adjacent = adjacent && lane[l].row_bytes == lane[l].token_stride;
        }
        const int64_t ahead = std::clamp<int64_t>(kPrefetchBytes / row_bytes, 1, 16);
        int64_t slot = 0;
        while (slot < count && index[slot] == slot) ++slot;
        while (slot < count) {
            const int64_t row = index[slot];
            int64_t run = 1;
            if (adjacent) {
                const int64_t longest =
                    std::min(count - slot, places.longest_run(places.at(slot), places.at(row)));
                while (run < longest && index[slot + run] == row + run) ++run;
            }
            if (run * row_bytes >= kMemmoveBytes * lanes && run > 1) {
                const auto to = places.at(slot);
                const auto from = places.at(row);
                for (int l = 0; l < lanes; ++l) {
                    std::memmove(lane[l].at(to), lane[l].at(from),
                                 static_cast<size_t>(run * lane[l].row_bytes));
                }
                slot += run;
                continue;
            }
            for (const int64_t end = slot + run; slot < end; ++slot) {
                const bool more = slot + ahead < count;
                const auto next = places.at(index[more ? slot + ahead : slot]);
                const auto from = places.at(index[slot]);
                const auto to = places.at(slot);
                for (int l = 0; l < lanes; ++l) {
                    if (more) prefetch(lane[l].at(next), lane[l].row_bytes);
                    lane[l].move(lane[l].at(to), lane[l].at(from));
                }
            }
        }
        finish_streaming();
    }
};

// Consecutive tensors that move by one index; what they bundle up to.
struct Group {
    const CompactTensor* tensors;
    int64_t tensor_count;
    int64_t slices;       // of each chain, where its rows are wide enough
    int64_t lanes = 0;    // that share a row of the index
    int64_t bundles = 0;  // for a row of the index
    int64_t first = 0;    // number of its first bundle, over all groups

    const CompactIndex& by() const { return *tensors->by; }
    int64_t index_rows() const { return by().batch * by().heads; }

    int64_t width(const CompactTensor& tensor) const {
        const int64_t parts = std::clamp<int64_t>(tensor.row_bytes / kSliceBytes, 1, slices);
        const int64_t lines = (tensor.row_bytes / parts + kLineBytes - 1) / kLineBytes;
        return lines * kLineBytes;
    }
    int64_t lanes_of(const CompactTensor& tensor) const {
        const int64_t parts = (tensor.row_bytes + width(tensor) - 1) / width(tensor);
        // With an index for each head a lane is one of its tensors.
        return parts * (tensor.heads / by().heads);
    }

    Lane lane(int64_t number, int64_t batch, int64_t head, bool may_stream) const {
        const CompactTensor* tensor = tensors;
        for (; number >= lanes_of(*tensor); ++tensor) number -= lanes_of(*tensor);
        const int64_t parts = lanes_of(*tensor) / (tensor->heads / by().heads);
        const int64_t column = number % parts * width(*tensor);
        Lane lane;
        lane.data = tensor->data + (head + number / parts) * tensor->head_stride + column;
        lane.row_bytes = std::min(width(*tensor), tensor->row_bytes - column);
        lane.token_stride = tensor->token_stride;
        lane.page_stride = 0;
        if (by().paged == nullptr) {
            lane.data += batch * tensor->batch_stride;
        } else {
            lane.page_stride = tensor->batch_stride;
        }
        const auto all =
            reinterpret_cast<uintptr_t>(lane.data) |
            static_cast<uintptr_t>(lane.page_stride | lane.token_stride | lane.row_bytes);
        lane.stream = may_stream && all % kLineBytes == 0;
        return lane;
    }

    void move(int64_t number, bool may_stream) const {
        const int64_t index_row = (number - first) / bundles;
        const int64_t which = (number - first) % bundles;
        const int64_t batch = index_row / by().heads;
        const int64_t head = index_row % by().heads;
        Bundle bundle;
        bundle.index = by().index + batch * by().index_batch_stride + head * by().index_head_stride;
        bundle.count = by().count[batch * by().count_batch_stride + head * by().count_head_stride];
        const int64_t end = (which + 1) * lanes / bundles;
        for (int64_t l = which * lanes / bundles; l < end; ++l) {
            bundle.lane[bundle.lanes++] = lane(l, batch, head, may_stream);
        }
        if (by().paged == nullptr) return bundle.move(DensePlaces{});
        const PagedTable& paged = *by().paged;
        bundle.move(PagedPlaces{paged.table + batch * paged.blocks,
                                static_cast<uint32_t>(paged.page_tokens)});
    }
};

// Moves all rows. Every index must be known to be right.
inline void compact_rows(const CompactTensor* all_tensors, int64_t tensor_count) {
    const int64_t threads = torch::stable::get_num_threads();
    int64_t chains = 0;
    int64_t bytes = 0;  // at most
    for (int64_t t = 0; t < tensor_count; ++t) {
        const CompactTensor& tensor = all_tensors[t];
        const int64_t here = tensor.by->batch * tensor.heads;
        chains += here;
        bytes += here * std::min(tensor.by->slots, tensor.by->tokens) * tensor.row_bytes;
    }
    if (chains == 0) return;
    // Too few chains to share out evenly are cut into columns.
    const bool enough = chains % threads == 0 || chains >= 4 * threads;
    const int64_t slices = enough ? 1 : (4 * threads + chains - 1) / chains;

    std::vector<Group> groups;
    int64_t lanes = 0;
    for (int64_t t = 0; t < tensor_count; ++t) {
        if (t == 0 || all_tensors[t].by != all_tensors[t - 1].by) {
            groups.push_back({all_tensors + t, 0, slices});
        }
        Group& group = groups.back();
        ++group.tensor_count;
        group.lanes += group.lanes_of(all_tensors[t]);
        lanes += group.index_rows() * group.lanes_of(all_tensors[t]);
    }
    const int64_t most_lanes = std::clamp<int64_t>(lanes / threads, 1, kMaxLanes);
    int64_t total = 0;
    for (Group& group : groups) {
        group.bundles = (group.lanes + most_lanes - 1) / most_lanes;
        group.first = total;
        total += group.index_rows() * group.bundles;
    }
    const auto move = [&](int64_t number) {
        const auto after =
            std::upper_bound(groups.begin(), groups.end(), number,
                             [](int64_t value, const Group& one) { return value < one.first; });
        std::prev(after)->move(number, bytes >= kStreamBytes);
    };
    parallel_dynamic(total, bytes / kLineBytes / std::max<int64_t>(1, total), move);
}

}  // namespace lightvlm::compact_cpu
