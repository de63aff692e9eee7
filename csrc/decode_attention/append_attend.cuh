// append_attend's first launch: new keys and values to their places in the cache. The second is
// decode_attention's.
//
// Formula   key[b, lens[b] + t] = new_key[b, t], and values likewise; in pages as the table says.
// Owner     One warp owns a head of one new token: its key, then its value. Lanes take pieces of
//           access_bytes.
// Errors    A token without a place is left out: before 0, past the capacity, in a page that is
//           none. Pages are reported here, as leftpad may hide them from the second launch;
//           lens there.
// Shared    None.
// Bound     The launch.
#pragma once

#include "common/block.cuh"
#include "common/device_error.cuh"
#include "common/launch.h"
#include "decode_attention/append_attend.h"

namespace lightvlm {

constexpr int kAppendWarps = 4;

template <typename Piece>
__device__ __forceinline__ void append_row(char* to, const char* from, int64_t bytes) {
    const auto pieces = static_cast<int32_t>(bytes / static_cast<int64_t>(sizeof(Piece)));
    for (int32_t i = threadIdx.x % kWarpThreads; i < pieces; i += kWarpThreads) {
        reinterpret_cast<Piece*>(to)[i] = reinterpret_cast<const Piece*>(from)[i];
    }
}

__global__ void __launch_bounds__(kAppendWarps* kWarpThreads)
    append_kernel(const __grid_constant__ AppendParams params) {
    const int64_t index =
        static_cast<int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / kWarpThreads;
    if (index >= params.batch * params.added * params.heads) return;
    const int64_t head = index % params.heads;
    const int64_t token = index / params.heads % params.added;
    const int64_t b = index / params.heads / params.added;

    const int64_t before = params.first(b);
    int64_t row = b;
    int64_t slot = before + token;
    if (before < 0 || slot >= params.capacity) return;
    if (params.block_table != nullptr) {
        const int32_t block = params.page_size.quotient(static_cast<int32_t>(slot));
        row = params.block_table[b * params.block_table_stride + block];
        if (row < 0 || row >= params.pages) {
            if (threadIdx.x % kWarpThreads == 0) report_device_error(params.error, kErrorPageRange);
            return;
        }
        slot -= int64_t{block} * params.page_size.divisor;
    }
    for (int i = 0; i < 2; ++i) {
        const AppendedRows& rows = params.rows[i];
        char* to = rows.target(row, slot, head);
        const char* from = rows.source(b, token, head);
        switch (params.access_bytes) {
            case 16:
                append_row<uint4>(to, from, params.row_bytes);
                break;
            case 8:
                append_row<uint2>(to, from, params.row_bytes);
                break;
            case 4:
                append_row<uint32_t>(to, from, params.row_bytes);
                break;
            default:
                append_row<uint16_t>(to, from, params.row_bytes);
        }
    }
}

}  // namespace lightvlm
