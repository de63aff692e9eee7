// Tiles of rows on their way from the cache to shared memory, in the background.
//
// A warp has a ring of its own, of kDecodeStages tiles: while it computes on one, the next is under
// way. Copies are 16 bytes wide where addresses and strides allow, else 8 or 4; below that they
// pass through registers, which is slower and waits.
#pragma once

#include "common/block.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "decode_attention/decode_run.cuh"

namespace lightvlm {

constexpr int kDecodeStages = 2;

// A tile's rows at a stride.
struct DecodeStridedTile {
    const unsigned char* first;
    int64_t stride;

    // Byte `at` of a row, or, where that is not valid, any of the tile.
    __device__ __forceinline__ const unsigned char* piece(int row, int at, bool valid) const {
        return first + (valid ? row * stride + at : 0);
    }
};

// A tile's rows in pages: lane `row` knows where that row begins.
struct DecodePagedTile {
    const unsigned char* data;
    int64_t offset;

    __device__ __forceinline__ const unsigned char* piece(int row, int at, bool valid) const {
        return data + __shfl_sync(kFullWarp, offset, valid ? row : 0) + (valid ? at : 0);
    }
};

// `count` rows of a tile, kRowBytes at a pitch, of which there are `bytes`; what is not there
// arrives as zeros.
template <int kUnit, int kTile, int kRowBytes, int kPitch, typename Tile>
__device__ __forceinline__ void copy_decode_pieces(const Tile& rows, int bytes, int count,
                                                   unsigned char* to) {
    constexpr int kPieces = kRowBytes / kUnit;
    LIGHTVLM_UNROLL_BY(1)
    for (int piece = threadIdx.x % kWarpThreads; piece < kTile * kPieces; piece += kWarpThreads) {
        const int row = piece / kPieces;
        const int at = (piece - row * kPieces) * kUnit;
        const bool valid = row < count && at < bytes;
        const unsigned char* from = rows.piece(row, at, valid);
        unsigned char* into = to + row * kPitch + at;
        if constexpr (kUnit == 16) {
            ptx::cp_async_16(into, from, valid);
        } else if constexpr (kUnit >= 4) {
            ptx::cp_async_narrow<kUnit>(into, from, valid);
        } else if constexpr (kUnit == 2) {
            *reinterpret_cast<uint16_t*>(into) =
                valid ? *reinterpret_cast<const uint16_t*>(from) : uint16_t{0};
        } else {
            *into = valid ? *from : static_cast<unsigned char>(0);
        }
    }
}

// For a warp, all lanes. kLeast: the narrowest access that may be needed; unit: the widest there
// is.
template <int kLeast, int kTile, int kRowBytes, int kPitch, typename Tile>
__device__ __forceinline__ void copy_decode_tile(const Tile& rows, int bytes, int unit, int count,
                                                 unsigned char* to) {
    if constexpr (kRowBytes % 16 == 0) {
        if (unit == 16) {
            return copy_decode_pieces<16, kTile, kRowBytes, kPitch>(rows, bytes, count, to);
        }
    }
    if constexpr (kRowBytes % 8 == 0) {
        if (unit >= 8) {
            return copy_decode_pieces<8, kTile, kRowBytes, kPitch>(rows, bytes, count, to);
        }
    }
    if (unit >= 4) {
        return copy_decode_pieces<4, kTile, kRowBytes, kPitch>(rows, bytes, count, to);
    }
    copy_decode_pieces<kLeast, kTile, kRowBytes, kPitch>(rows, bytes, count, to);
}

// Rows [n, n + count) of a run.
template <int kLeast, int kTile, int kRowBytes, int kPitch>
__device__ __forceinline__ void copy_decode_rows(const DecodeRows& rows, int32_t n, int count,
                                                 unsigned char* to) {
    const DecodeStridedTile tile{rows.data + n * rows.stride, rows.stride};
    copy_decode_tile<kLeast, kTile, kRowBytes, kPitch>(tile, rows.bytes, rows.unit, count, to);
}

// The same in pages; lane r has the place of row r.
template <int kLeast, int kTile, int kRowBytes, int kPitch>
__device__ __forceinline__ void copy_decode_pages(const DecodeRows& rows, const DecodePlace& place,
                                                  int count, unsigned char* to) {
    static_assert(kTile <= kWarpThreads && kTile * kRowBytes % (16 * kWarpThreads) == 0,
                  "a lane for each row, and all lanes in each step of the copy");
    const DecodePagedTile tile{rows.data, place.offset(rows)};
    copy_decode_tile<kLeast, kTile, kRowBytes, kPitch>(tile, rows.bytes, rows.unit, count, to);
}

}  // namespace lightvlm
