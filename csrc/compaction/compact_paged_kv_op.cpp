// compact_paged_kv_: checks, parameters, registration.
#include "compaction/compact_paged_kv.h"

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/registration.h"
#include "compaction/moved_tensors.h"

namespace lightvlm {

namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

const int32_t* ints(const Tensor& tensor, const std::string& name, const Tensor& other,
                    std::initializer_list<int64_t> sizes) {
    check_dtype(tensor, name.c_str(), ScalarType::Int);
    check_shape(tensor, name.c_str(), sizes);
    check_contiguous(tensor, name.c_str());
    check_device(tensor, name.c_str(), other);
    return tensor.const_data_ptr<int32_t>();
}

// Everything about table t but page_tokens and pages, which its tensors say.
PagedTable table_of(int64_t t, const Tensors& block_table, const OptionalTensors& lens,
                    const Tensors& row_pages, const Tensors& freed, const Tensors& freed_count,
                    const Tensor& other) {
    const Tensor& table = block_table[t];
    PagedTable in;
    in.table = ints(table, numbered("block_table", t), other, {-1, -1});
    in.batch = table.size(0);
    in.blocks = table.size(1);
    in.page_tokens = -1;
    if (lens[t].has_value()) in.lens = ints(*lens[t], numbered("lens", t), other, {in.batch});
    ints(row_pages[t], numbered("row_pages", t), other, {in.batch});
    ints(freed[t], numbered("freed", t), other, {in.batch * in.blocks});
    ints(freed_count[t], numbered("freed_count", t), other, {1});
    in.row_pages = row_pages[t].mutable_data_ptr<int32_t>();
    in.freed = freed[t].mutable_data_ptr<int32_t>();
    in.freed_count = freed_count[t].mutable_data_ptr<int32_t>();
    return in;
}

CompactIndex index_of(int64_t i, const Tensor& index, const Tensor& count, const PagedTable& in,
                      const Tensor& other) {
    const std::string name = numbered("index", i);
    check(index.dim() == 2 || index.dim() == 3, name, ": has shape ", shape_text(index),
          ", must be (B, M) or (B, Hkv, M)");
    CompactIndex by;
    by.paged = &in;
    by.batch = in.batch;
    by.slots = index.size(index.dim() - 1);
    if (index.dim() == 3) {
        by.heads = index.size(1);
        by.index = ints(index, name, other, {in.batch, -1, -1});
        by.count = ints(count, numbered("count", i), other, {in.batch, by.heads});
        by.index_head_stride = by.slots;
        by.count_head_stride = 1;
    } else {
        by.index = ints(index, name, other, {in.batch, -1});
        by.count = ints(count, numbered("count", i), other, {in.batch});
    }
    by.index_batch_stride = by.heads * by.slots;
    by.count_batch_stride = by.heads;
    check(by.slots <= kMaxInt32 && by.heads <= kMaxInt32, name, ": has shape ", shape_text(index),
          ", no dimension may exceed ", kMaxInt32);
    return by;
}

// The rows of one tensor, of which a page is what compact_kv_ takes for a batch row.
void add_pages(const Tensor& pages, const std::string& name, bool per_head, const CompactIndex& by,
               PagedTable* in, std::vector<CompactTensor>* tensors) {
    check(pages.dim() > (per_head ? 2 : 1), name, ": has shape ", shape_text(pages),
          ", too few dimensions");
    check(!per_head || pages.size(2) == by.heads, name, ": has shape ", shape_text(pages),
          ", index has ", by.heads, " heads");
    if (in->page_tokens < 0) {
        in->pages = pages.size(0);
        in->page_tokens = pages.size(1);
        check(in->page_tokens > 0, name, ": has shape ", shape_text(pages),
              ", a page must hold a token");
        check(in->pages <= kMaxInt32 && in->blocks <= kMaxInt32 / in->page_tokens, name,
              ": has shape ", shape_text(pages), ", more than ", kMaxInt32,
              " pages, or tokens in a row of block_table");
    }
    check(pages.size(0) == in->pages && pages.size(1) == in->page_tokens, name, ": has shape ",
          shape_text(pages), ", must begin with (", in->pages, ", ", in->page_tokens,
          ") as the others of its table");
    if (pages.numel() > 0) add_rows(pages, name, 1, per_head, by, tensors);
}

template <Backend backend>
void compact_paged_kv_op(
    const Tensors& pages,             // [P, page_tokens, ...] each, changed in place
    const std::vector<int64_t>& by,   // which index moves each
    const Tensors& index,             // [B, M] or [B, Hkv, M] int32
    const Tensors& count,             // [B] or [B, Hkv] int32
    const std::vector<int64_t>& of,   // which table each index belongs to, ascending
    const Tensors& block_table,       // [B, blocks] int32
    const OptionalTensors& lens,      // [B] int32 for each table
    const OptionalTensors& refcount,  // [P] int32 for each table
    const Tensors& row_pages,         // [B] int32 for each table, out
    const Tensors& freed,             // [B * blocks] int32 for each table, out
    const Tensors& freed_count,       // [1] int32 for each table, out; zero on entry
    const std::optional<Tensor>& error) {
    const auto indexes = static_cast<int64_t>(index.size());
    const auto tables = static_cast<int64_t>(block_table.size());
    check(by.size() == pages.size(), "by: must have an entry for each of the ", pages.size(),
          " tensors");
    check(count.size() == index.size() && of.size() == index.size(),
          "count, of: must have an entry for each of the ", indexes, " indexes");
    for (const size_t size :
         {lens.size(), refcount.size(), row_pages.size(), freed.size(), freed_count.size()}) {
        check(size == block_table.size(),
              "lens, refcount, row_pages, freed, freed_count: must have an entry for each of the ",
              tables, " block tables");
    }
    if (pages.empty()) return;
    const Tensor& other = pages[0];

    std::vector<PagedTable> in;
    for (int64_t t = 0; t < tables; ++t) {
        in.push_back(table_of(t, block_table, lens, row_pages, freed, freed_count, other));
    }
    std::vector<CompactIndex> rows;
    for (int64_t i = 0; i < indexes; ++i) {
        check(of[i] >= (i > 0 ? of[i - 1] : 0) && of[i] < tables,
              "of: must ascend and name one of the ", tables, " block tables");
        check(i < kMaxIndexesOfTable || of[i - kMaxIndexesOfTable] < of[i], "index: more than ",
              kMaxIndexesOfTable, " share one block table");
        rows.push_back(index_of(i, index[i], count[i], in[of[i]], other));
    }
    std::vector<CompactTensor> tensors;
    std::vector<NamedTensor> all;
    for (size_t i = 0; i < pages.size(); ++i) {
        const std::string name = numbered("pages", static_cast<int64_t>(i));
        check(by[i] >= 0 && by[i] < indexes, "by: got ", by[i], ", must be in [0, ", indexes, ")");
        check_device(pages[i], name.c_str(), other);
        const int64_t table = of[by[i]];
        add_pages(pages[i], name, index[by[i]].dim() == 3, rows[by[i]], &in[table], &tensors);
        all.push_back({&pages[i], name, true});
    }
    for (int64_t t = 0; t < tables; ++t) {
        check(in[t].page_tokens > 0, "block_table: nothing is paged by table ", t);
        if (refcount[t].has_value()) {
            in[t].refcount = ints(*refcount[t], numbered("refcount", t), other, {in[t].pages});
            all.push_back({&*refcount[t], numbered("refcount", t), false});
        }
        all.push_back({&block_table[t], numbered("block_table", t), false});
        if (lens[t].has_value()) all.push_back({&*lens[t], numbered("lens", t), false});
        all.push_back({&row_pages[t], numbered("row_pages", t), true});
        all.push_back({&freed[t], numbered("freed", t), true});
        all.push_back({&freed_count[t], numbered("freed_count", t), true});
    }
    for (int64_t i = 0; i < indexes; ++i) {
        rows[i].tokens = in[of[i]].blocks * in[of[i]].page_tokens;
        all.push_back({&index[i], numbered("index", i), false});
        all.push_back({&count[i], numbered("count", i), false});
    }
    check_disjoint("compact_paged_kv_", all);

    CompactPagedKvParams params;
    params.tensors = tensors.data();
    params.tensor_count = static_cast<int64_t>(tensors.size());
    params.indexes = rows.data();
    params.index_count = indexes;
    params.tables = in.data();
    params.table_count = tables;
    params.error = error_word_pointer(error, other);
    LIGHTVLM_RUN(compact_paged_kv, backend, other, params);
}

}  // namespace

LIGHTVLM_REGISTER(compact_paged_kv, compact_paged_kv_op)

}  // namespace lightvlm
