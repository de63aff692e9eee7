// compact_kv_: checks, parameters, registration.
#include "compaction/compact_kv.h"

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/registration.h"
#include "compaction/footprint.h"

namespace lightvlm {

namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

struct Dim {
    int64_t size;
    int64_t stride;  // bytes
};

std::string numbered(std::string name, int64_t i) {
    return name.append("[").append(std::to_string(i)).append("]");
}

// The wrapper's names: each layer brings its key, its value, and then its extras.
std::vector<std::string> cache_names(const std::vector<int64_t>& layer, int64_t layers) {
    std::vector<int64_t> seen(static_cast<size_t>(layers), 0);
    std::vector<std::string> names;
    for (int64_t of : layer) {
        check(of >= 0 && of < layers, "layer: got ", of, ", must be in [0, ", layers, ")");
        const int64_t role = seen[of]++;
        std::string name = role == 0 ? "key_cache" : role == 1 ? "value_cache" : "extras";
        if (layers > 1) name = numbered(name, of);
        names.push_back(role < 2 ? name : numbered(name, role - 2));
    }
    return names;
}

Footprint footprint_of(const Tensor& tensor) {
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

CompactIndex index_of(const Tensor& index, const Tensor& count, int64_t layer) {
    const std::string index_name = numbered("index", layer);
    const std::string count_name = numbered("count", layer);
    check_dtype(index, index_name.c_str(), ScalarType::Int);
    check_dtype(count, count_name.c_str(), ScalarType::Int);
    check_device(count, count_name.c_str(), index);
    check(index.dim() == 2 || index.dim() == 3, index_name, ": has shape ", shape_text(index),
          ", must be (B, M) or (B, Hkv, M)");
    check_last_contiguous(index, index_name.c_str());
    CompactIndex by;
    by.index = index.const_data_ptr<int32_t>();
    by.count = count.const_data_ptr<int32_t>();
    by.batch = index.size(0);
    by.slots = index.size(index.dim() - 1);
    by.index_batch_stride = index.stride(0);
    if (index.dim() == 3) {
        by.heads = index.size(1);
        check_shape(count, count_name.c_str(), {by.batch, by.heads});
        by.index_head_stride = index.stride(1);
        by.count_head_stride = count.stride(1);
    } else {
        check_shape(count, count_name.c_str(), {by.batch});
    }
    by.count_batch_stride = count.stride(0);
    check(by.batch <= kMaxInt32 && by.heads <= kMaxInt32 && by.slots <= kMaxInt32, index_name,
          ": has shape ", shape_text(index), ", no dimension may exceed ", kMaxInt32);
    return by;
}

// Appends the rows of `cache` that its index moves. Dimensions of a row that lie in one run of
// bytes are merged; one that does not becomes the heads, and further ones make a tensor each.
void add_rows(const Tensor& cache, const std::string& name, int64_t token_dim, bool per_head,
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

    std::vector<Dim> outer;
    for (int64_t d = 1; d < cache.dim(); ++d) {
        if (d == token_dim || (per_head && d == head_dim) || cache.size(d) == 1) continue;
        outer.push_back({cache.size(d), cache.stride(d) * bytes});
    }
    std::sort(outer.begin(), outer.end(),
              [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
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

void check_disjoint(const std::vector<Tensor>& caches, const std::vector<std::string>& names,
                    const std::vector<Tensor>& index, const std::vector<Tensor>& count) {
    struct Owner {
        Footprint footprint;
        std::string name;
        bool moves;
    };
    std::vector<Owner> owners;
    const auto add = [&](const Tensor& tensor, const std::string& name, bool moves) {
        if (tensor.numel() > 0) owners.push_back({footprint_of(tensor), name, moves});
    };
    for (size_t i = 0; i < caches.size(); ++i) add(caches[i], names[i], true);
    for (size_t l = 0; l < index.size(); ++l) {
        add(index[l], numbered("index", l), false);
        add(count[l], numbered("count", l), false);
    }
    std::sort(owners.begin(), owners.end(),
              [](const Owner& a, const Owner& b) { return a.footprint.begin < b.footprint.begin; });
    for (size_t i = 0; i < owners.size(); ++i) {
        const Owner& a = owners[i];
        check(!a.moves || !overlaps_itself(a.footprint), "compact_kv_: ", a.name,
              ": rows share memory (an expanded tensor?), must be disjoint");
        const char* end = a.footprint.end();
        for (size_t j = i + 1; j < owners.size() && owners[j].footprint.begin < end; ++j) {
            const Owner& b = owners[j];
            if (!a.moves && !b.moves) continue;
            check(!overlap(a.footprint, b.footprint), "compact_kv_: ", a.name, ", ", b.name,
                  ": share memory, all that moves must be disjoint");
        }
    }
}

#if !defined(LIGHTVLM_EMULATION)
void raise_index_error(const CompactIndex& by, int64_t layer, bool per_head) {
    const CompactIndexError error = check_compact_index(by);
    if (error.bit == 0) return;
    const std::string head = per_head ? ", head " + std::to_string(error.head) : "";
    const std::string slot = error.slot >= 0 ? ", position " + std::to_string(error.slot) : "";
    fail("compact_kv_: ", describe_error(error.bit), " (layer ", layer, ", row ", error.batch, head,
         slot, ", got ", error.value, "; ", by.tokens, " tokens, ", by.slots, " slots)");
}
#endif

template <Backend backend>
void compact_kv_op(const std::vector<Tensor>& caches,      // rows along token_dim, changed in place
                   const std::vector<int64_t>& layer,      // which index moves each
                   const std::vector<int64_t>& token_dim,  // 1 or 2; with an index per head the
                                                           // other of the two is the head
                   const std::vector<Tensor>& index,       // [B, M] or [B, Hkv, M] int32
                   const std::vector<Tensor>& count,       // [B] or [B, Hkv] int32
                   const std::optional<Tensor>& error) {   // [1] int32, device error word
    const auto layers = static_cast<int64_t>(index.size());
    check(index.size() == count.size(), "index, count: have ", index.size(), " and ", count.size(),
          " entries, must have as many");
    check(layer.size() == caches.size() && token_dim.size() == caches.size(),
          "layer, token_dim: must have an entry for each of the ", caches.size(), " caches");
    if (caches.empty()) return;

    std::vector<CompactIndex> by;
    for (int64_t l = 0; l < layers; ++l) {
        check_device(index[l], "index", caches[0]);
        by.push_back(index_of(index[l], count[l], l));
        by.back().tokens = -1;
    }
    const std::vector<std::string> names = cache_names(layer, layers);
    std::vector<CompactTensor> tensors;
    for (size_t i = 0; i < caches.size(); ++i) {
        const Tensor& cache = caches[i];
        const std::string& name = names[i];
        CompactIndex& rows = by[layer[i]];
        const bool per_head = index[layer[i]].dim() == 3;
        check_device(cache, name.c_str(), caches[0]);
        check(token_dim[i] == 1 || token_dim[i] == 2, "token_dim: got ", token_dim[i],
              ", must be 1 or 2");
        check(cache.dim() > token_dim[i] && (!per_head || cache.dim() > 2), name, ": has shape ",
              shape_text(cache), ", too few dimensions");
        const int64_t tokens = cache.size(token_dim[i]);
        check(cache.size(0) == rows.batch, name, ": has shape ", shape_text(cache), ", index has ",
              rows.batch, " rows");
        check(tokens <= kMaxInt32 && (rows.tokens < 0 || tokens == rows.tokens), name, ": has ",
              tokens, " tokens, must have ", rows.tokens, " as the others of its layer");
        check(!per_head || cache.size(token_dim[i] == 1 ? 2 : 1) == rows.heads, name,
              ": has shape ", shape_text(cache), ", index has ", rows.heads, " heads");
        rows.tokens = tokens;
        if (cache.numel() > 0) add_rows(cache, name, token_dim[i], per_head, rows, &tensors);
    }
    check_disjoint(caches, names, index, count);
#if !defined(LIGHTVLM_EMULATION)
    if constexpr (backend == Backend::kCpu) {
        for (int64_t l = 0; l < layers; ++l) {
            if (by[l].tokens >= 0) raise_index_error(by[l], l, index[l].dim() == 3);
        }
    }
#endif
    CompactKvParams params;
    params.tensors = tensors.data();
    params.tensor_count = static_cast<int64_t>(tensors.size());
    params.error = error_word_pointer(error, caches[0]);
    LIGHTVLM_RUN(compact_kv, backend, caches[0], params);
}

}  // namespace

LIGHTVLM_REGISTER(compact_kv, compact_kv_op)

}  // namespace lightvlm
