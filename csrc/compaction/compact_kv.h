// compact_kv_: kept rows of caches to the front, in place. See lightvlm_ext/ops/compact_kv.py.
#pragma once

#include <cstdint>

#include "common/cuda_types.h"
#include "common/error_word.h"

namespace lightvlm {

// Where the tokens of each row of a batch lie: token n in page table[b, n / page_tokens], at
// n % page_tokens. Everything contiguous.
struct PagedTable {
    const int32_t* table = nullptr;     // [batch, blocks]
    const int32_t* lens = nullptr;      // [batch] tokens; null: as many as the blocks hold
    const int32_t* refcount = nullptr;  // [pages] users of each page; null: one each
    int32_t* row_pages = nullptr;       // [batch] out: pages that each row has afterwards
    int32_t* freed = nullptr;           // [batch * blocks] out: pages that rows gave up, then -1
    int32_t* freed_count = nullptr;     // [1] out; zero on entry
    int64_t batch = 0;
    int64_t blocks = 0;
    int64_t page_tokens = 0;
    int64_t pages = 0;
};

// Which rows are kept: index[b, h, j] for j < count[b, h]. Strides in elements; heads is 1, with
// head strides 0, where all heads keep the same rows.
struct CompactIndex {
    const int32_t* index = nullptr;  // [batch, heads, slots], the last dimension contiguous
    const int32_t* count = nullptr;  // [batch, heads]
    int64_t batch = 0;
    int64_t heads = 1;
    int64_t slots = 0;
    int64_t tokens = 0;  // rows of the tensors that move by it
    int64_t index_batch_stride = 0;
    int64_t index_head_stride = 0;
    int64_t count_batch_stride = 0;
    int64_t count_head_stride = 0;
    const PagedTable* paged = nullptr;  // null: row n of a tensor is its n-th
};

// Bytes that move: row (b, h, n) is the row_bytes bytes at data + b * batch_stride +
// h * head_stride + n * token_stride, all in bytes; of a paged tensor batch_stride is a page's, and
// n counts within one. Rows of one tensor, and tensors, are disjoint.
struct CompactTensor {
    char* data = nullptr;
    const CompactIndex* by = nullptr;  // by->heads is 1 or heads
    int64_t heads = 1;
    int64_t row_bytes = 0;
    int64_t batch_stride = 0;
    int64_t head_stride = 0;
    int64_t token_stride = 0;
};

// One chain is one (tensor, b, h): its rows move one after another, in the order of the index.
//     row(j) <- row(index[j]),  j = 0, 1, ..., count - 1
// The index ascends, so index[j] >= j: no row is overwritten before it was read.
struct CompactKvParams {
    const CompactTensor* tensors = nullptr;
    int64_t tensor_count = 0;
    int32_t* error = nullptr;  // device error word
};

// The first bad value of an index; count is checked first.
struct CompactIndexError {
    int32_t bit = 0;  // 0: none
    int64_t batch = 0;
    int64_t head = 0;
    int64_t slot = -1;  // -1: count itself
    int32_t value = 0;
};

// Of the first `count` entries of one row.
CompactIndexError check_compact_indices(const int32_t* index, int64_t count, int64_t tokens);
CompactIndexError check_compact_index(const CompactIndex& by);

// Every index must have passed check_compact_index().
Status compact_kv_cpu(const CompactKvParams& params);

#if LIGHTVLM_HAS_DEVICE
// More tensors than fit into a kernel's parameters take several launches.
cudaError_t launch_compact_kv_cuda(const CompactKvParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
