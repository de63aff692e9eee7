// Instantiations and launch of compact_paged_kv.cuh: fills the parameters, layer by layer.
#include "compaction/compact_paged_kv.cuh"

#include <algorithm>
#include <vector>

#include "compaction/compact_slices.h"

namespace lightvlm {

namespace {

constexpr int kFewLayers = 16;
constexpr int kManyLayers = 124;
static_assert(sizeof(PagedLaunch<kFewLayers>) <= 4096, "what every launch carries anyway");
static_assert(sizeof(PagedLaunch<kManyLayers>) <= 32764, "the limit of kernel parameters");
static_assert(kMaxIndexesOfTable <= kManyLayers, "a table's indexes are in one launch");

// Consecutive tables with all their indexes, and some of the tensors that move by them.
struct Part {
    int64_t first_table, tables;
    int64_t first_index, indexes;
    std::vector<const CompactTensor*> tensors;
    bool keeps_books;  // one part of those with the same tables does
};

// As few parts as the parameters of a launch allow.
std::vector<Part> divide(const CompactPagedKvParams& params) {
    std::vector<Part> parts;
    int64_t table = 0;
    int64_t index = 0;
    while (table < params.table_count) {
        Part part{table, 0, index, 0, {}, true};
        while (table < params.table_count && part.tables < kManyLayers) {
            int64_t end = index;
            while (end < params.index_count && params.indexes[end].paged == &params.tables[table]) {
                ++end;
            }
            if (end - part.first_index > kManyLayers) break;
            index = end;
            ++table;
            ++part.tables;
        }
        part.indexes = index - part.first_index;
        for (int64_t t = 0; t < params.tensor_count; ++t) {
            const int64_t by = params.tensors[t].by - params.indexes;
            if (by < part.first_index || by >= index) continue;
            if (part.tensors.size() == 2 * kManyLayers) {
                parts.push_back(part);
                part.tensors.clear();
                part.keeps_books = false;
            }
            part.tensors.push_back(&params.tensors[t]);
        }
        if (part.keeps_books || !part.tensors.empty()) parts.push_back(part);
    }
    return parts;
}

PagedTableEntry make_table(const PagedTable& table) {
    PagedTableEntry entry{};
    entry.table = table.table;
    entry.lens = table.lens;
    entry.refcount = table.refcount;
    entry.row_pages = table.row_pages;
    entry.freed = table.freed;
    entry.freed_count = table.freed_count;
    entry.page_tokens = Divisor(static_cast<int32_t>(table.page_tokens));
    entry.batch = static_cast<int32_t>(table.batch);
    entry.blocks = static_cast<int32_t>(table.blocks);
    entry.pages = static_cast<int32_t>(table.pages);
    return entry;
}

PagedTensorEntry make_tensor(const CompactTensor& tensor, int64_t slice_bytes) {
    const CompactSlices cut(tensor, slice_bytes);
    PagedTensorEntry entry{};
    entry.data = tensor.data;
    entry.page_stride = tensor.batch_stride;
    entry.head_stride = tensor.head_stride;
    entry.token_stride = tensor.token_stride;
    entry.heads = static_cast<int32_t>(tensor.heads);
    entry.row_vectors = static_cast<int32_t>(cut.row_vectors);
    entry.vector_bytes = static_cast<int32_t>(cut.vector_bytes);
    entry.slices = static_cast<int32_t>(cut.slices);
    entry.lanes = static_cast<int32_t>(cut.lanes);
    return entry;
}

template <int kLayers, typename Ring>
cudaError_t launch_part(const CompactPagedKvParams& params, const Part& part, int64_t slice_bytes,
                        cudaStream_t stream) {
    PagedLaunch<kLayers> all;
    all.error = params.error;
    all.tensor_count = static_cast<int32_t>(part.tensors.size());
    all.index_count = static_cast<int32_t>(part.indexes);
    all.table_count = static_cast<int32_t>(part.tables);
    int64_t blocks = 0;
    for (int64_t t = 0; t < part.tables; ++t) {
        all.tables[t] = make_table(params.tables[part.first_table + t]);
        all.tables[t].first_block = static_cast<int32_t>(blocks);
        if (part.keeps_books) blocks += all.tables[t].batch;
    }
    all.bookkeepers = static_cast<int32_t>(blocks);
    for (int64_t i = part.indexes - 1; i >= 0; --i) {
        const CompactIndex& by = params.indexes[part.first_index + i];
        const auto table = static_cast<int32_t>(by.paged - params.tables - part.first_table);
        all.indexes[i] = {
            by.index, by.count, static_cast<int32_t>(by.heads), static_cast<int32_t>(by.slots),
            table,    0};
        all.tables[table].first_index = static_cast<int32_t>(i);
    }
    for (size_t t = 0; t < part.tensors.size(); ++t) {
        const CompactTensor& tensor = *part.tensors[t];
        PagedTensorEntry& entry = all.tensors[t];
        entry = make_tensor(tensor, slice_bytes);
        entry.by = static_cast<int32_t>(tensor.by - params.indexes - part.first_index);
        entry.first_block = blocks;
        blocks += tensor.by->batch * tensor.heads * entry.slices;
    }
    return launch("compact_paged_kv", compact_paged_kv_kernel<kLayers, Ring>, make_grid(blocks),
                  dim3(kCompactThreads), sizeof(PagedShared<Ring>), stream, all);
}

}  // namespace

cudaError_t launch_compact_paged_kv_cuda(const CompactPagedKvParams& params, cudaStream_t stream) {
    CompactShape shape;
    cudaError_t status = choose_shape(params.tensors, params.tensor_count, &shape);
    if (status != cudaSuccess) return status;
    for (const Part& part : divide(params)) {
        const bool fits = part.tables <= kFewLayers && part.indexes <= kFewLayers &&
                          part.tensors.size() <= 2 * kFewLayers;
        const auto launch_fitting = !fits       ? launch_part<kManyLayers, CompactShallowRing>
                                    : shape.few ? launch_part<kFewLayers, CompactDeepRing>
                                                : launch_part<kFewLayers, CompactShallowRing>;
        status = launch_fitting(params, part, shape.slice_bytes, stream);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

}  // namespace lightvlm
