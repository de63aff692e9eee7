// What a block of the tensor-core kernels of importance knows of its batch row and slot, in shared
// memory.
#pragma once

#include <new>

#include "importance/importance_tensor_tile.cuh"
#include "importance/importance_view.cuh"

namespace lightvlm {

constexpr int kListedRows = 512;  // rows of row_pos that a block lists by itself

struct ListedRows {
    int32_t rows[kListedRows];
    int32_t positions[kListedRows];
    uint32_t scratch[kTensorThreads / kWarpThreads];
};

// Lies in shared memory, as registers are short: it is asked once for each streamed tile.
template <typename T>
class SharedSlot {
  public:
    // The block calls it, with the same arguments.
    __device__ __forceinline__ const ImportanceSlot<T>& set(const ImportanceArguments& arguments,
                                                            const ImportanceRows& rows, int64_t b,
                                                            int64_t head, int64_t heads,
                                                            int32_t first_target) {
        __syncthreads();
        if (threadIdx.x == 0) {
            auto* slot = new (slot_) ImportanceSlot<T>(arguments, rows, b, head, heads);
            slot->skip_rows_before(first_target);
        }
        __syncthreads();
        return *reinterpret_cast<const ImportanceSlot<T>*>(slot_);
    }

  private:
    alignas(ImportanceSlot<T>) unsigned char slot_[sizeof(ImportanceSlot<T>)];
};

template <typename T, int kWidth>
struct TensorKernelShared {
    TensorShared<T, kWidth> tile;
    SharedSlot<T> slot;
    alignas(ImportanceRows) unsigned char rows[sizeof(ImportanceRows)];
    ListedRows listed;
};

// Batch row b and its rows that count, from the workspace or listed here. The block calls it.
template <typename T, int kWidth>
__device__ __forceinline__ const ImportanceRows& take_rows(const ImportanceArguments& arguments,
                                                           int64_t b, bool planned,
                                                           TensorKernelShared<T, kWidth>& shared) {
    ImportanceRows rows(arguments.params, b);
    if (planned) {
        rows.take_list(arguments.workspace, b);
    } else if (arguments.params.row_pos != nullptr) {
        ListedRows& listed = shared.listed;
        rows.used = list_importance_rows<kTensorThreads>(arguments.params, b, rows, listed.scratch,
                                                         listed.rows, listed.positions);
        rows.rows = listed.rows;
        rows.positions = listed.positions;
    }
    if (threadIdx.x == 0) new (shared.rows) ImportanceRows(rows);
    __syncthreads();
    return *reinterpret_cast<const ImportanceRows*>(shared.rows);
}

// Blocks a multiprocessor, for the registers: kWidth / 2 for the stationary vectors and 16 for
// products, of 128, 168 or 255.
template <int kWidth>
constexpr int kTensorBlocks = kWidth <= 64 ? 4 : (kWidth <= 128 ? 3 : 2);

}  // namespace lightvlm
