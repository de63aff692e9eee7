// What the ops of this room share on the way from tensors to parameters: rows out of strided
// tensors, and the check that nothing that moves shares memory.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "common/checks.h"
#include "compaction/compact_kv.h"
#include "compaction/footprint.h"

namespace lightvlm {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

inline std::string numbered(std::string name, int64_t i) {
    return name.append("[").append(std::to_string(i)).append("]");
}

inline Footprint footprint_of(const Tensor& tensor) {
    Footprint footprint;
    footprint.begin = static_cast<const char*>(tensor.const_data_ptr());
    const auto bytes = static_cast<int64_t>(tensor.element_size());
    footprint.unit = bytes;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
        if (tensor.size(d) > 1)
            footprint.dims.push_back({tensor.size(d), tensor.stride(d) * bytes});
    }
    std::sort(footprint.dims.begin(), footprint.dims.end(),
              [](const auto& a, const auto& b) { return a.stride > b.stride; });
    // Dimensions that continue each other are one run of bytes.
    while (!footprint.dims.empty() && footprint.dims.back().stride == footprint.unit) {
        footprint.unit *= footprint.dims.back().size;
        footprint.dims.pop_back();
    }
    return footprint;
}

struct RowDim {
    int64_t size;
    int64_t stride;  // bytes
};

// Appends the rows of `cache` that its index moves. Dimensions of a row that lie in one run of
// bytes are merged; one that does not becomes the heads, and further ones make a tensor each.
inline void add_rows(const Tensor& cache, const std::string& name, int64_t token_dim, bool per_head,
                     const CompactIndex& by, std::vector<CompactTensor>* tensors) {
    const auto bytes = static_cast<int64_t>(cache.element_size());
    const int64_t head_dim = token_dim == 1 ? 2 : 1;
    CompactTensor rows;
    rows.data = static_cast<char*>(cache.mutable_data_ptr());
    rows.by = &by;
    rows.batch_stride = cache.stride(0) * bytes;
    rows.token_stride = cache.stride(token_dim) * bytes;
    rows.row_bytes = bytes;
    if (per_head) {
        rows.heads = cache.size(head_dim);
        rows.head_stride = cache.stride(head_dim) * bytes;
    }

    std::vector<RowDim> outer;
    for (int64_t d = 1; d < cache.dim(); ++d) {
        if (d == token_dim || (per_head && d == head_dim) || cache.size(d) == 1) continue;
        outer.push_back({cache.size(d), cache.stride(d) * bytes});
    }
    std::sort(outer.begin(), outer.end(),
              [](const RowDim& a, const RowDim& b) { return a.stride > b.stride; });
    while (!outer.empty() && outer.back().stride == rows.row_bytes) {
        rows.row_bytes *= outer.back().size;
        outer.pop_back();
    }
    if (!per_head && !outer.empty()) {
        rows.heads = outer.front().size;
        rows.head_stride = outer.front().stride;
        outer.erase(outer.begin());
    }
    check(rows.row_bytes <= kMaxInt32 && rows.heads <= kMaxInt32, name, ": has shape ",
          shape_text(cache), ", a row may have at most ", kMaxInt32, " bytes and heads");

    // One tensor for each position of the remaining dimensions.
    std::vector<int64_t> position(outer.size(), 0);
    while (true) {
        CompactTensor here = rows;
        for (size_t d = 0; d < outer.size(); ++d) here.data += position[d] * outer[d].stride;
        tensors->push_back(here);
        size_t d = outer.size();
        while (d > 0 && ++position[d - 1] == outer[d - 1].size) position[--d] = 0;
        if (d == 0) break;
    }
}

// A tensor for check_disjoint(), by the name that messages give it.
struct NamedTensor {
    const Tensor* tensor;
    std::string name;
    bool moves;  // two that only are read may share memory
};

inline void check_disjoint(const char* op, const std::vector<NamedTensor>& tensors) {
    struct Owner {
        Footprint footprint;
        const NamedTensor* of;
    };
    std::vector<Owner> owners;
    for (const NamedTensor& one : tensors) {
        if (one.tensor->numel() > 0) owners.push_back({footprint_of(*one.tensor), &one});
    }
    std::sort(owners.begin(), owners.end(),
              [](const Owner& a, const Owner& b) { return a.footprint.begin < b.footprint.begin; });
    for (size_t i = 0; i < owners.size(); ++i) {
        const Owner& a = owners[i];
        check(!a.of->moves || !overlaps_itself(a.footprint), op, ": ", a.of->name,
              ": rows share memory (an expanded tensor?), must be disjoint");
        const char* end = a.footprint.end();
        for (size_t j = i + 1; j < owners.size() && owners[j].footprint.begin < end; ++j) {
            const Owner& b = owners[j];
            if (!a.of->moves && !b.of->moves) continue;
            check(!overlap(a.footprint, b.footprint), op, ": ", a.of->name, ", ", b.of->name,
                  ": share memory, all that moves must be disjoint");
        }
    }
}

}  // namespace lightvlm
