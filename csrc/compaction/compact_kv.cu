// Instantiations and launch of compact_kv.cuh: fills the table of tensors, cuts chains into slices.
#include "compaction/compact_kv.cuh"

#include <algorithm>

#include "compaction/compact_slices.h"

namespace lightvlm {

namespace {

constexpr int kSmallTable = 32;
constexpr int kMediumTable = 112;  // K and V of 48 layers, and 16 more
constexpr int kLargeTable = 256;
static_assert(sizeof(CompactTable<kSmallTable>) <= 4096, "what every launch carries anyway");
static_assert(sizeof(CompactTable<kLargeTable>) <= 32764, "the limit of kernel parameters");

CompactEntry make_entry(const CompactTensor& tensor, int64_t slice_bytes, int64_t first_block) {
    const CompactIndex& by = *tensor.by;
    const CompactSlices cut(tensor, slice_bytes);
    CompactEntry entry{};
    entry.data = tensor.data;
    entry.index = by.index;
    entry.count = by.count;
    entry.batch_stride = tensor.batch_stride;
    entry.head_stride = tensor.head_stride;
    entry.token_stride = tensor.token_stride;
    entry.index_batch_stride = by.index_batch_stride;
    entry.index_head_stride = by.index_head_stride;
    entry.count_batch_stride = by.count_batch_stride;
    entry.count_head_stride = by.count_head_stride;
    entry.first_block = first_block;
    entry.heads = static_cast<int32_t>(tensor.heads);
    entry.slots = static_cast<int32_t>(by.slots);
    entry.tokens = static_cast<int32_t>(by.tokens);
    entry.row_vectors = static_cast<int32_t>(cut.row_vectors);
    entry.vector_bytes = static_cast<int32_t>(cut.vector_bytes);
    entry.slices = static_cast<int32_t>(cut.slices);
    entry.lanes = static_cast<int32_t>(cut.lanes);
    return entry;
}

template <int kCapacity, typename Ring>
cudaError_t launch_table(const CompactTensor* tensors, int64_t count, int64_t slice_bytes,
                         int32_t* error, cudaStream_t stream) {
    CompactTable<kCapacity> table;
    table.error = error;
    table.count = static_cast<int32_t>(count);
    table.unused = 0;
    int64_t blocks = 0;
    for (int64_t t = 0; t < count; ++t) {
        const CompactEntry entry = make_entry(tensors[t], slice_bytes, blocks);
        table.entries[t] = entry;
        blocks += tensors[t].by->batch * tensors[t].heads * entry.slices;
    }
    return launch("compact_kv", compact_kv_kernel<kCapacity, Ring>, make_grid(blocks),
                  dim3(kCompactThreads), sizeof(Ring), stream, table);
}

}  // namespace

cudaError_t launch_compact_kv_cuda(const CompactKvParams& params, cudaStream_t stream) {
    CompactShape shape;
    cudaError_t status = choose_shape(params.tensors, params.tensor_count, &shape);
    if (status != cudaSuccess) return status;
    for (int64_t first = 0; first < params.tensor_count; first += kLargeTable) {
        const CompactTensor* tensors = params.tensors + first;
        const int64_t count = std::min<int64_t>(params.tensor_count - first, kLargeTable);
        const auto launch_fitting =
            count > kMediumTable  ? launch_table<kLargeTable, CompactShallowRing>
            : count > kSmallTable ? launch_table<kMediumTable, CompactShallowRing>
            : shape.few           ? launch_table<kSmallTable, CompactDeepRing>
                                  : launch_table<kSmallTable, CompactShallowRing>;
        status = launch_fitting(tensors, count, shape.slice_bytes, params.error, stream);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

}  // namespace lightvlm
