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

// Rows [n, n + count) of a tile, kRowBytes at a pitch; what is not there arrives as zeros.
template <int kUnit, int kTile, int kRowBytes, int kPitch>
__device__ __forceinline__ void copy_decode_pieces(const DecodeRows& rows, int32_t n, int count,
                                                   unsigned char* to) {
    constexpr int kPieces = kRowBytes / kUnit;
    const unsigned char* first = rows.data + n * rows.stride;
    LIGHTVLM_UNROLL_BY(1)
    for (int piece = threadIdx.x % kWarpThreads; piece < kTile * kPieces; piece += kWarpThreads) {
        const int row = piece / kPieces;
        const int at = (piece - row * kPieces) * kUnit;
        const bool valid = row < count && at < rows.bytes;
        const unsigned char* from = first + (valid ? row * rows.stride + at : 0);
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

// For a warp, all lanes. kLeast: the narrowest access that may be needed.
template <int kLeast, int kTile, int kRowBytes, int kPitch>
__device__ __forceinline__ void copy_decode_rows(const DecodeRows& rows, int32_t n, int count,
                                                 unsigned char* to) {
    if constexpr (kRowBytes % 16 == 0) {
        if (rows.unit == 16) {
            return copy_decode_pieces<16, kTile, kRowBytes, kPitch>(rows, n, count, to);
        }
    }
    if constexpr (kRowBytes % 8 == 0) {
        if (rows.unit >= 8) {
            return copy_decode_pieces<8, kTile, kRowBytes, kPitch>(rows, n, count, to);
        }
    }
    if (rows.unit >= 4) {
        return copy_decode_pieces<4, kTile, kRowBytes, kPitch>(rows, n, count, to);
    }
    copy_decode_pieces<kLeast, kTile, kRowBytes, kPitch>(rows, n, count, to);
}

}  // namespace lightvlm
