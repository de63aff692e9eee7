// compact_paged_kv_: kept rows of paged caches to the front of their block tables, in place. See
// lightvlm_ext/ops/compact_paged_kv.py.
#pragma once

#include <cstdint>

#include "compaction/compact_kv.h"

namespace lightvlm {

// Row (b, h, n) of a tensor is the row_bytes bytes at
//     data + table[b, n / page_tokens] * batch_stride + h * head_stride
//          + (n % page_tokens) * token_stride
// and moves as in compact_kv.h. Each index stands for one (table, set of layers) and is contiguous:
// [batch, heads, slots], count [batch, heads].
//
// A row's pages are its first ceil(len / page_tokens) blocks; afterwards it has
// ceil(count / page_tokens), by the largest count of its indexes and their heads, and gave up the
// rest. A page is written where a slot of it receives another row; it then must have one user.
struct CompactPagedKvParams {
    const CompactTensor* tensors = nullptr;
    int64_t tensor_count = 0;
    const CompactIndex* indexes = nullptr;  // in the order of their tables
    int64_t index_count = 0;
    const PagedTable* tables = nullptr;
    int64_t table_count = 0;
    int32_t* error = nullptr;  // device error word
};

// At most so many indexes may share one table.
constexpr int64_t kMaxIndexesOfTable = 124;

Status compact_paged_kv_cpu(const CompactPagedKvParams& params);

#if LIGHTVLM_HAS_DEVICE
// More layers than fit into a kernel's parameters take several launches.
cudaError_t launch_compact_paged_kv_cuda(const CompactPagedKvParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
