// gather_tokens: kept rows of several tensors, in one launch.
//
// Formula   target[r, s] = source[r, index[r, j]], j = s, or s - (slots - count[r]) flush right;
//           0 where 0 <= j < count[r] does not hold.
// Owner     One warp owns one slot of one tensor: blockIdx.y names the tensor, blockIdx.x a
//           group of kGatherWarps slots. Lanes take consecutive pieces of access_bytes.
// Errors    An entry out of range, or not above the one before, leaves zeros in its slot; a count
//           out of range leaves a row of zeros.
// Shared    None.
// Bound     Bytes: each kept row is read once and written once. Accesses are 16 bytes wide where
//           alignment allows, kGatherUnroll of them under way in each lane.
#pragma once

#include "common/block.cuh"
#include "common/device_error.cuh"
#include "common/launch.h"
#include "merging/gather_tokens.h"

namespace lightvlm {

constexpr int kGatherWarps = 4;
constexpr int kGatherUnroll = 4;

// The token that goes to a slot, or -1.
__device__ __forceinline__ int64_t gather_source(const GatherTokensParams& params, int64_t row,
                                                 int64_t slot, bool report) {
    int64_t count = params.count[row];
    if (count < 0 || count > params.slots) {
        if (report) report_device_error(params.error, kErrorCount);
        count = 0;
    }
    const int64_t entry = params.right ? slot - (params.slots - count) : slot;
    if (entry < 0 || entry >= count) return -1;
    const int32_t* index = params.index + row * params.index_stride;
    const int32_t token = index[entry];
    if (token < 0 || token >= params.tokens) {
        if (report) report_device_error(params.error, kErrorIndexRange);
        return -1;
    }
    // An entry before that is itself out of range says nothing about this one.
    const int32_t before = entry > 0 ? index[entry - 1] : -1;
    if (before < params.tokens && token <= before) {
        if (report) report_device_error(params.error, kErrorIndexOrder);
        return -1;
    }
    return token;
}

// Byte offset in a token of its piece number `piece`, counted in the target's order.
template <typename Piece>
__device__ __forceinline__ int64_t piece_offset(const GatherTensor& tensor, int64_t piece) {
    if (tensor.outer_dims == 0) return piece * static_cast<int64_t>(sizeof(Piece));
    const int64_t inner = tensor.inner_bytes / static_cast<int64_t>(sizeof(Piece));
    int64_t outer = piece / inner;
    int64_t offset = (piece - outer * inner) * static_cast<int64_t>(sizeof(Piece));
    for (int d = tensor.outer_dims - 1; d >= 0; --d) {
        const int64_t rest = outer / tensor.outer_size[d];
        offset += (outer - rest * tensor.outer_size[d]) * tensor.outer_stride[d];
        outer = rest;
    }
    return offset;
}

// source: the token, or null for zeros.
template <typename Piece>
__device__ void gather_slot(const GatherTensor& tensor, const char* source, char* target) {
    const int64_t pieces = tensor.token_bytes / static_cast<int64_t>(sizeof(Piece));
    auto* out = reinterpret_cast<Piece*>(target);
    const int lane = threadIdx.x % kWarpThreads;
    int64_t piece = lane;
    if (source == nullptr) {
        for (; piece < pieces; piece += kWarpThreads) out[piece] = Piece{};
        return;
    }
    for (; piece + (kGatherUnroll - 1) * kWarpThreads < pieces;
         piece += kGatherUnroll * kWarpThreads) {
        Piece moved[kGatherUnroll];
        for (int u = 0; u < kGatherUnroll; ++u) {
            moved[u] = *reinterpret_cast<const Piece*>(
                source + piece_offset<Piece>(tensor, piece + u * kWarpThreads));
        }
        for (int u = 0; u < kGatherUnroll; ++u) out[piece + u * kWarpThreads] = moved[u];
    }
    for (; piece < pieces; piece += kWarpThreads) {
        out[piece] = *reinterpret_cast<const Piece*>(source + piece_offset<Piece>(tensor, piece));
    }
}

__global__ void __launch_bounds__(kGatherWarps* kWarpThreads)
    gather_tokens_kernel(const __grid_constant__ GatherTokensParams params) {
    const GatherTensor& tensor = params.tensors[blockIdx.y];
    const int64_t slot_index =
        static_cast<int64_t>(blockIdx.x) * kGatherWarps + threadIdx.x / kWarpThreads;
    if (slot_index >= params.rows * params.slots) return;
    const int64_t row = slot_index / params.slots;
    const int64_t slot = slot_index - row * params.slots;
    const bool report = blockIdx.y == 0 && threadIdx.x % kWarpThreads == 0;
    const int64_t token = gather_source(params, row, slot, report);

    const char* source =
        token < 0 ? nullptr : tensor.source + row * tensor.row_stride + token * tensor.token_stride;
    char* target = tensor.target + slot_index * tensor.token_bytes;
    switch (tensor.access_bytes) {
        case 16:
            return gather_slot<uint4>(tensor, source, target);
        case 8:
            return gather_slot<uint2>(tensor, source, target);
        case 4:
            return gather_slot<uint32_t>(tensor, source, target);
        case 2:
            return gather_slot<uint16_t>(tensor, source, target);
        default:
            return gather_slot<uint8_t>(tensor, source, target);
    }
}

}  // namespace lightvlm
