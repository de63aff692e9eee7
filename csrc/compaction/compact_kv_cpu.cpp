// CPU twin of compact_kv.cuh: chains that share an index advance in lockstep, a few to a thread.
//
// At a third of the rows kept, hardware prefetchers fetch most of the others too. Several streams
// side by side, and fetching ahead what comes next, keep them from that; storing past the caches
// saves reading each destination line first. Rows that stay are skipped, long runs of kept rows
// are left to memmove.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/multiversion.h"
#include "common/parallel.h"
#include "compaction/compact_kv.h"

namespace lightvlm {

namespace {

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

struct Ascends {
    template <CpuLevel level>
    static LIGHTVLM_INLINE bool run(const int32_t* index, int64_t n) {
        int32_t wrong = 0;
        for (int64_t j = 1; j < n; ++j) wrong |= index[j - 1] >= index[j] ? 1 : 0;
        return wrong == 0;
    }
};

// Which slot is wrong, once it is known that one is.
CompactIndexError find_error(const int32_t* index, int64_t count, int64_t tokens) {
    CompactIndexError error;
    for (int64_t j = 0; j < count; ++j) {
        error.slot = j;
        error.value = index[j];
        error.bit = index[j] < 0 || index[j] >= tokens ? kErrorIndexRange : kErrorIndexOrder;
        if (error.bit == kErrorIndexRange || (j > 0 && index[j] <= index[j - 1])) break;
    }
    return error;
}

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

void finish_streaming() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// A chain, or a slice of its columns.
struct Lane {
    char* data;  // of row 0
    int64_t row_bytes;
    int64_t token_stride;
    bool stream;

    LIGHTVLM_INLINE void move(int64_t slot, int64_t row, int64_t rows) const {
        char* to = data + slot * token_stride;
        const char* from = data + row * token_stride;
        const int64_t bytes = rows * row_bytes;
        stream ? stream_down(to, from, bytes) : copy_down(to, from, bytes);
    }
};

// Lanes that share an index.
struct Bundle {
    const int32_t* index;
    int64_t count;
    int lanes = 0;
    Lane lane[kMaxLanes];

    void move() const {
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
                while (slot + run < count && index[slot + run] == row + run) ++run;
            }
            if (run * row_bytes >= kMemmoveBytes * lanes && run > 1) {
                for (int l = 0; l < lanes; ++l) {
                    std::memmove(lane[l].data + slot * lane[l].token_stride,
                                 lane[l].data + row * lane[l].token_stride,
                                 static_cast<size_t>(run * lane[l].row_bytes));
                }
                slot += run;
                continue;
            }
            for (const int64_t end = slot + run; slot < end; ++slot) {
                const int64_t next = slot + ahead < count ? index[slot + ahead] : -1;
                for (int l = 0; l < lanes; ++l) {
                    if (next >= 0) {
                        prefetch(lane[l].data + next * lane[l].token_stride, lane[l].row_bytes);
                    }
                    lane[l].move(slot, index[slot], 1);
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
        lane.data = tensor->data + batch * tensor->batch_stride +
                    (head + number / parts) * tensor->head_stride + column;
        lane.row_bytes = std::min(width(*tensor), tensor->row_bytes - column);
        lane.token_stride = tensor->token_stride;
        const auto all = reinterpret_cast<uintptr_t>(lane.data) |
                         static_cast<uintptr_t>(lane.token_stride | lane.row_bytes);
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
        bundle.move();
    }
};

}  // namespace

CompactIndexError check_compact_index(const CompactIndex& by) {
    for (int64_t b = 0; b < by.batch; ++b) {
        for (int64_t h = 0; h < by.heads; ++h) {
            const int32_t* index = by.index + b * by.index_batch_stride + h * by.index_head_stride;
            const int32_t count = by.count[b * by.count_batch_stride + h * by.count_head_stride];
            CompactIndexError error;
            if (count < 0 || count > by.slots) {
                error.bit = kErrorCount;
                error.value = count;
            } else if (count > 0 && (index[0] < 0 || index[count - 1] >= by.tokens ||
                                     !multiversion<Ascends>(index, int64_t{count}))) {
                error = find_error(index, count, by.tokens);
            }
            if (error.bit == 0) continue;
            error.batch = b;
            error.head = h;
            return error;
        }
    }
    return {};
}

Status compact_kv_cpu(const CompactKvParams& params) {
    const int64_t threads = torch::stable::get_num_threads();
    int64_t chains = 0;
    int64_t bytes = 0;  // at most
    for (int64_t t = 0; t < params.tensor_count; ++t) {
        const CompactTensor& tensor = params.tensors[t];
        const int64_t here = tensor.by->batch * tensor.heads;
        chains += here;
        bytes += here * std::min(tensor.by->slots, tensor.by->tokens) * tensor.row_bytes;
    }
    if (chains == 0) return {};
    // Too few chains to share out evenly are cut into columns.
    const bool enough = chains % threads == 0 || chains >= 4 * threads;
    const int64_t slices = enough ? 1 : (4 * threads + chains - 1) / chains;

    std::vector<Group> groups;
    int64_t lanes = 0;
    for (int64_t t = 0; t < params.tensor_count; ++t) {
        if (t == 0 || params.tensors[t].by != params.tensors[t - 1].by) {
            groups.push_back({params.tensors + t, 0, slices});
        }
        Group& group = groups.back();
        ++group.tensor_count;
        group.lanes += group.lanes_of(params.tensors[t]);
        lanes += group.index_rows() * group.lanes_of(params.tensors[t]);
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
    return {};
}

}  // namespace lightvlm
