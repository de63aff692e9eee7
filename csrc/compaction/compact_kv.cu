// Instantiations and launch of compact_kv.cuh: fills the table of tensors, cuts chains into slices.
#include "compaction/compact_kv.cuh"

#include <algorithm>

namespace lightvlm {

namespace {

constexpr int64_t kWidestVector = 16;
// A slice of a row: wide enough for whole memory sectors, narrow enough to occupy the device.
constexpr int64_t kWidestSlice = 256;
constexpr int64_t kNarrowestSlice = 64;
constexpr int64_t kBlocksPerMultiprocessor = 3;
// With fewer, a block has a multiprocessor's shared memory to itself, or half of it.
constexpr int64_t kManyBlocksPerMultiprocessor = 2;

constexpr int kSmallTable = 32;
constexpr int kMediumTable = 112;  // K and V of 48 layers, and 16 more
constexpr int kLargeTable = 256;
static_assert(sizeof(CompactTable<kSmallTable>) <= 4096, "what every launch carries anyway");
static_assert(sizeof(CompactTable<kLargeTable>) <= 32764, "the limit of kernel parameters");

int64_t vector_bytes(const CompactTensor& tensor) {
    const auto all = reinterpret_cast<uintptr_t>(tensor.data) |
                     static_cast<uintptr_t>(tensor.row_bytes | tensor.batch_stride |
                                            tensor.head_stride | tensor.token_stride);
    int64_t bytes = kWidestVector;
    while (all % bytes != 0) bytes /= 2;
    return bytes;
}

int64_t count_blocks(const CompactKvParams& params, int64_t slice_bytes) {
    int64_t blocks = 0;
    for (int64_t t = 0; t < params.tensor_count; ++t) {
        const CompactTensor& tensor = params.tensors[t];
        const int64_t slices = (tensor.row_bytes + slice_bytes - 1) / slice_bytes;
        blocks += tensor.by->batch * tensor.heads * slices;
    }
    return blocks;
}

// Bytes to a slice, so that there are blocks for the whole device where the tensors allow it.
int64_t choose_slice(const CompactKvParams& params, int64_t wanted_blocks) {
    int64_t slice_bytes = kWidestSlice;
    while (slice_bytes > kNarrowestSlice && count_blocks(params, slice_bytes) < wanted_blocks) {
        slice_bytes /= 2;
    }
    return slice_bytes;
}

CompactEntry make_entry(const CompactTensor& tensor, int64_t slice_bytes, int64_t first_block) {
    const CompactIndex& by = *tensor.by;
    const int64_t vector = vector_bytes(tensor);
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
    entry.row_vectors = static_cast<int32_t>(tensor.row_bytes / vector);
    entry.vector_bytes = static_cast<int32_t>(vector);
    // Slices of even width; never more vectors than threads.
    const int64_t most_lanes = std::min<int64_t>(slice_bytes / vector, kCompactThreads);
    const int64_t slices = (entry.row_vectors + most_lanes - 1) / most_lanes;
    entry.lanes = static_cast<int32_t>((entry.row_vectors + slices - 1) / slices);
    entry.slices = static_cast<int32_t>((entry.row_vectors + entry.lanes - 1) / entry.lanes);
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
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    int multiprocessors = 0;
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    const int64_t slice_bytes = choose_slice(params, kBlocksPerMultiprocessor * multiprocessors);
    const bool few =
        count_blocks(params, slice_bytes) <= kManyBlocksPerMultiprocessor * multiprocessors;

    for (int64_t first = 0; first < params.tensor_count; first += kLargeTable) {
        const CompactTensor* tensors = params.tensors + first;
        const int64_t count = std::min<int64_t>(params.tensor_count - first, kLargeTable);
        const auto launch_fitting =
            count > kMediumTable  ? launch_table<kLargeTable, CompactShallowRing>
            : count > kSmallTable ? launch_table<kMediumTable, CompactShallowRing>
            : few                 ? launch_table<kSmallTable, CompactDeepRing>
                                  : launch_table<kSmallTable, CompactShallowRing>;
        status = launch_fitting(tensors, count, slice_bytes, params.error, stream);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

}  // namespace lightvlm
