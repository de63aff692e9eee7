// How launchers cut chains into slices, for compact_kv_ and compact_paged_kv_.
#pragma once

#include <algorithm>

#include "compaction/compact_chain.cuh"
#include "compaction/compact_kv.h"

namespace lightvlm {

// A slice of a row: wide enough for whole memory sectors, narrow enough to occupy the device.
constexpr int64_t kWidestSlice = 256;
constexpr int64_t kNarrowestSlice = 64;
constexpr int64_t kBlocksPerMultiprocessor = 3;
// With fewer, a block has a multiprocessor's shared memory to itself, or half of it.
constexpr int64_t kManyBlocksPerMultiprocessor = 2;

// How the rows of one tensor are cut: `slices` blocks to a chain, `lanes` vectors to a slice.
struct CompactSlices {
    int64_t vector_bytes = kCompactVectorBytes;  // what pointer, strides and row are multiples of
    int64_t row_vectors = 0;
    int64_t slices = 0;
    int64_t lanes = 0;
    int64_t blocks = 0;  // of the tensor's chains

    CompactSlices(const CompactTensor& tensor, int64_t slice_bytes) {
        const auto all = reinterpret_cast<uintptr_t>(tensor.data) |
                         static_cast<uintptr_t>(tensor.row_bytes | tensor.batch_stride |
                                                tensor.head_stride | tensor.token_stride);
        while (all % vector_bytes != 0) vector_bytes /= 2;
        row_vectors = tensor.row_bytes / vector_bytes;
        // Slices of even width; never more vectors than threads.
        const int64_t most = std::min<int64_t>(slice_bytes / vector_bytes, kCompactThreads);
        slices = (row_vectors + most - 1) / most;
        lanes = (row_vectors + slices - 1) / slices;
        slices = (row_vectors + lanes - 1) / lanes;
        blocks = tensor.by->batch * tensor.heads * slices;
    }
};

// Bytes to a slice, so that there are blocks for the whole device where the tensors allow it, and
// whether they are few all the same.
struct CompactShape {
    int64_t slice_bytes = kWidestSlice;
    bool few = false;
};

inline int64_t count_blocks(const CompactTensor* tensors, int64_t count, int64_t slice_bytes) {
    int64_t blocks = 0;
    for (int64_t t = 0; t < count; ++t) blocks += CompactSlices(tensors[t], slice_bytes).blocks;
    return blocks;
}

inline cudaError_t choose_shape(const CompactTensor* tensors, int64_t count, CompactShape* shape) {
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    int multiprocessors = 0;
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    const int64_t wanted = kBlocksPerMultiprocessor * multiprocessors;
    int64_t blocks = count_blocks(tensors, count, shape->slice_bytes);
    while (shape->slice_bytes > kNarrowestSlice && blocks < wanted) {
        shape->slice_bytes /= 2;
        blocks = count_blocks(tensors, count, shape->slice_bytes);
    }
    shape->few = blocks <= kManyBlocksPerMultiprocessor * multiprocessors;
    return cudaSuccess;
}

}  // namespace lightvlm
