// CPU twin of compact_kv.cuh: a chain (or a slice of its columns) a thread at a time, rows in the
// order of the index. Runs of kept rows that lie next to each other move as one. What is read next
// is prefetched, since hardware prefetchers do not foresee the gaps; large moves store past the
// caches, which saves reading each destination line first.
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

// Bytes of sources under way; below this the latency of memory shows.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kLineBytes = 64;
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
    for (int64_t at = 0; at < bytes; at += kLineBytes) __builtin_prefetch(row + at, 0, 3);
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

struct Chain {
    char* data;  // of row 0
    const int32_t* index;
    int64_t count;
    int64_t row_bytes;  // of the slice
    int64_t token_stride;
};

template <bool kStream>
void move_chain(const Chain& chain) {
    const bool adjacent = chain.row_bytes == chain.token_stride;
    const int64_t ahead = std::max<int64_t>(1, kPrefetchBytes / chain.row_bytes);
    // Rows that stay where they are.
    int64_t slot = 0;
    while (slot < chain.count && chain.index[slot] == slot) ++slot;
    int64_t prefetched = slot;
    while (slot < chain.count) {
        const int64_t row = chain.index[slot];
        int64_t run = 1;
        if (adjacent) {
            while (slot + run < chain.count && chain.index[slot + run] == row + run) ++run;
        }
        const int64_t bytes = run * chain.row_bytes;
        char* to = chain.data + slot * chain.token_stride;
        const char* from = chain.data + row * chain.token_stride;
        slot += run;
        if (bytes >= kMemmoveBytes && !kStream) {
            std::memmove(to, from, static_cast<size_t>(bytes));
            prefetched = std::max(prefetched, slot);
            continue;
        }
        const int64_t wanted = std::min(slot + ahead, chain.count);
        for (prefetched = std::max(prefetched, slot); prefetched < wanted; ++prefetched) {
            prefetch(chain.data + chain.index[prefetched] * chain.token_stride, chain.row_bytes);
        }
        kStream ? stream_down(to, from, bytes) : copy_down(to, from, bytes);
    }
    if (kStream) finish_streaming();
}

void move_slice(const CompactTensor& tensor, int64_t batch, int64_t head, int64_t first,
                int64_t bytes, bool may_stream) {
    const CompactIndex& by = *tensor.by;
    Chain chain;
    chain.data = tensor.data + batch * tensor.batch_stride + head * tensor.head_stride + first;
    chain.index = by.index + batch * by.index_batch_stride + head * by.index_head_stride;
    chain.count = by.count[batch * by.count_batch_stride + head * by.count_head_stride];
    chain.row_bytes = bytes;
    chain.token_stride = tensor.token_stride;
    const auto alignment = reinterpret_cast<uintptr_t>(chain.data) |
                           static_cast<uintptr_t>(chain.token_stride | bytes);
    if (may_stream && alignment % kLineBytes == 0) {
        move_chain<true>(chain);
    } else {
        move_chain<false>(chain);
    }
}

// The slices of one tensor: chains, each cut into columns of `width` bytes.
struct Slices {
    const CompactTensor* tensor;
    int64_t first;  // number of its first slice, over all tensors
    int64_t per_row;
    int64_t width;

    int64_t count() const { return tensor->by->batch * tensor->heads * per_row; }

    void move(int64_t number, bool may_stream) const {
        const int64_t chain = (number - first) / per_row;
        const int64_t column = (number - first) % per_row * width;
        move_slice(*tensor, chain / tensor->heads, chain % tensor->heads, column,
                   std::min(width, tensor->row_bytes - column), may_stream);
    }
};

Slices slices_of(const CompactTensor& tensor, int64_t wanted, int64_t first) {
    const int64_t parts = std::clamp<int64_t>(tensor.row_bytes / kSliceBytes, 1, wanted);
    const int64_t lines = (tensor.row_bytes / parts + kLineBytes - 1) / kLineBytes;
    const int64_t width = lines * kLineBytes;
    return {&tensor, first, (tensor.row_bytes + width - 1) / width, width};
}

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
    const int64_t wanted = enough ? 1 : (4 * threads + chains - 1) / chains;

    std::vector<Slices> slices;
    int64_t total = 0;
    for (int64_t t = 0; t < params.tensor_count; ++t) {
        slices.push_back(slices_of(params.tensors[t], wanted, total));
        total += slices.back().count();
    }
    const auto move = [&](int64_t number) {
        const auto after = std::upper_bound(
            slices.begin(), slices.end(), number,
            [](int64_t value, const Slices& candidate) { return value < candidate.first; });
        std::prev(after)->move(number, bytes >= kStreamBytes);
    };
    parallel_dynamic(total, bytes / kLineBytes / std::max<int64_t>(1, total), move);
    return {};
}

}  // namespace lightvlm
