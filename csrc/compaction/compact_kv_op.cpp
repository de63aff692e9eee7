// compact_kv_: checks, parameters, registration.
#include "compaction/compact_kv.h"

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/registration.h"
#include "compaction/moved_tensors.h"

namespace lightvlm {

namespace {

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
    std::vector<NamedTensor> all;
    for (size_t i = 0; i < caches.size(); ++i) all.push_back({&caches[i], names[i], true});
    for (size_t l = 0; l < index.size(); ++l) {
        all.push_back({&index[l], numbered("index", l), false});
        all.push_back({&count[l], numbered("count", l), false});
    }
    check_disjoint("compact_kv_", all);
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
