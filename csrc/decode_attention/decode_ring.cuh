// Tiles of rows on their way from the cache to shared memory, in the background.
//
// A warp has a ring of its own, of kDecodeStages tiles: while it computes on one, the next is under
// way. Copies are 16 bytes wide where addresses and strides allow, else 8 or 4; below that they
// pass through registers, which is slower and waits.
#pragma once

#include "common/block.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"

namespace lightvlm {

constexpr int kDecodeStages = 2;

// A tile's rows in the cache: `count` valid ones, `bytes` long. Strides in bytes.
struct DecodeRows {
    const unsigned char* data;
    int64_t stride;
    int count;
    int bytes;
};

// Rows of kRowBytes at a pitch, what is not there as zeros. For warps, all lanes.
template <int kUnit, int kTile, int kRowBytes, int kPitch>
__device__ __forceinline__ void copy_decode_pieces(const DecodeRows& rows, unsigned char* to) {
    constexpr int kPieces = kRowBytes / kUnit;
    const int lane = threadIdx.x % kWarpThreads;
    for (int piece = lane; piece < kTile * kPieces; piece += kWarpThreads) {
        const int row = piece / kPieces;
        const int at = (piece - row * kPieces) * kUnit;
        const bool valid = row < rows.count && at < rows.bytes;
        const unsigned char* from = rows.data + (valid ? row * rows.stride + at : 0);
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

// unit: the widest access that addresses, stride and rows.bytes allow; at least kLeast.
template <int kLeast, int kTile, int kRowBytes, int kPitch>
__device__ __forceinline__ void copy_decode_rows(const DecodeRows& rows, int unit,
                                                 unsigned char* to) {
    if constexpr (kRowBytes % 16 == 0) {
        if (unit == 16) return copy_decode_pieces<16, kTile, kRowBytes, kPitch>(rows, to);
    }
    if constexpr (kRowBytes % 8 == 0) {
        if (unit >= 8) return copy_decode_pieces<8, kTile, kRowBytes, kPitch>(rows, to);
    }
    if (unit >= 4) return copy_decode_pieces<4, kTile, kRowBytes, kPitch>(rows, to);
    if constexpr (kLeast == 2) {
        copy_decode_pieces<2, kTile, kRowBytes, kPitch>(rows, to);
    } else {
        copy_decode_pieces<1, kTile, kRowBytes, kPitch>(rows, to);
    }
}

}  // namespace lightvlm
