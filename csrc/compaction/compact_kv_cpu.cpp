// CPU twin of compact_kv.cuh: checks the index; how rows move is compact_rows_cpu.h.
#include "common/multiversion.h"
#include "compaction/compact_kv.h"
#include "compaction/compact_rows_cpu.h"

namespace lightvlm {

namespace {

struct Ascends {
    template <CpuLevel level>
    static LIGHTVLM_INLINE bool run(const int32_t* index, int64_t n) {
        int32_t wrong = 0;
        for (int64_t j = 1; j < n; ++j) wrong |= index[j - 1] >= index[j] ? 1 : 0;
        return wrong == 0;
    }
};

// Which slot is wrong, once it is known that one is.
CompactIndexError find_error(const int32_t* index, int64_t count, int64_t tokens) {
    CompactIndexError error;
    for (int64_t j = 0; j < count; ++j) {
        error.slot = j;
        error.value = index[j];
        error.bit = index[j] < 0 || index[j] >= tokens ? kErrorIndexRange : kErrorIndexOrder;
        if (error.bit == kErrorIndexRange || (j > 0 && index[j] <= index[j - 1])) break;
    }
    return error;
}

}  // namespace

CompactIndexError check_compact_indices(const int32_t* index, int64_t count, int64_t tokens) {
    if (count == 0 || (index[0] >= 0 && index[count - 1] < tokens &&
                       multiversion<Ascends>(index, int64_t{count}))) {
        return {};
    }
    return find_error(index, count, tokens);
}

CompactIndexError check_compact_index(const CompactIndex& by) {
    for (int64_t b = 0; b < by.batch; ++b) {
        for (int64_t h = 0; h < by.heads; ++h) {
            const int32_t* index = by.index + b * by.index_batch_stride + h * by.index_head_stride;
            const int32_t count = by.count[b * by.count_batch_stride + h * by.count_head_stride];
            CompactIndexError error;
            if (count < 0 || count > by.slots) {
                error.bit = kErrorCount;
                error.value = count;
            } else {
                error = check_compact_indices(index, count, by.tokens);
            }
            if (error.bit == 0) continue;
            error.batch = b;
            error.head = h;
            return error;
        }
    }
    return {};
}

Status compact_kv_cpu(const CompactKvParams& params) {
    compact_cpu::compact_rows(params.tensors, params.tensor_count);
    return {};
}

}  // namespace lightvlm
