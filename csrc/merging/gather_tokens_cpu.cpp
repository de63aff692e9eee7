// CPU twin of gather_tokens.cuh: threads share the slots of each tensor; memcpy moves a piece.
#include <cstring>

#include "common/parallel.h"
#include "merging/gather_tokens.h"

namespace lightvlm {

namespace {

// Reports what is wrong with a row of index and count.
void check_row(const GatherTokensParams& params, int64_t row, FirstError& error) {
    const int64_t count = params.count[row];
    if (count < 0 || count > params.slots) {
        error.report(kErrorCount, row, -1, static_cast<double>(count));
        return;
    }
    const int32_t* index = params.index + row * params.index_stride;
    int64_t before = -1;
    for (int64_t j = 0; j < count; ++j) {
        const bool in_range = index[j] >= 0 && index[j] < params.tokens;
        if (!in_range || index[j] <= before) {
            error.report(in_range ? kErrorIndexOrder : kErrorIndexRange, row, j,
                         static_cast<double>(index[j]));
            return;
        }
        before = index[j];
    }
}

// A constant size turns memcpy into one or two moves, where a call would cost more than they do.
void copy_piece(char* target, const char* source, int64_t bytes) {
    switch (bytes) {
        case 4:
            std::memcpy(target, source, 4);
            return;
        case 8:
            std::memcpy(target, source, 8);
            return;
        case 16:
            std::memcpy(target, source, 16);
            return;
        default:
            std::memcpy(target, source, static_cast<size_t>(bytes));
    }
}

void copy_token(const GatherTensor& tensor, const char* source, char* target) {
    int64_t at[kGatherMaxOuter] = {};
    while (true) {
        copy_piece(target, source, tensor.inner_bytes);
        target += tensor.inner_bytes;
        // The next piece: counts up the innermost dimension, and carries.
        int d = tensor.outer_dims - 1;
        for (; d >= 0; --d) {
            source += tensor.outer_stride[d];
            if (++at[d] < tensor.outer_size[d]) break;
            source -= tensor.outer_size[d] * tensor.outer_stride[d];
            at[d] = 0;
        }
        if (d < 0) return;
    }
}

void gather_slots(const GatherTokensParams& params, const GatherTensor& tensor, int64_t begin,
                  int64_t end) {
    if (tensor.token_bytes == 0) return;
    int64_t row = begin / params.slots;
    int64_t slot = begin - row * params.slots;
    char* target = tensor.target + begin * tensor.token_bytes;
    for (int64_t i = begin; i < end; ++i, target += tensor.token_bytes) {
        const int64_t count = params.count[row];
        const int64_t entry = params.right ? slot - (params.slots - count) : slot;
        if (entry < 0 || entry >= count) {
            std::memset(target, 0, static_cast<size_t>(tensor.token_bytes));
        } else {
            const int64_t token = params.index[row * params.index_stride + entry];
            copy_token(tensor,
                       tensor.source + row * tensor.row_stride + token * tensor.token_stride,
                       target);
        }
        if (++slot == params.slots) {
            slot = 0;
            ++row;
        }
    }
}

}  // namespace

Status gather_tokens_cpu(const GatherTokensParams& params) {
    FirstError error;
    parallel_items(params.rows, params.slots, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) check_row(params, row, error);
    });
    if (!error.status().ok()) return error.status();

    // One parallel loop for all tensors: a thread waits for the others once.
    int64_t bytes = 0;
    for (int t = 0; t < params.tensor_count; ++t) bytes += params.tensors[t].token_bytes;
    parallel_items(params.rows * params.slots, 8 + bytes / 8, [&](int64_t begin, int64_t end) {
        for (int t = 0; t < params.tensor_count; ++t) {
            gather_slots(params, params.tensors[t], begin, end);
        }
    });
    return error.status();
}

}  // namespace lightvlm
