// Tile product of importance on tensor cores (mma.sync m16n8k16), for fp16 and bf16.
//
// A block of 4 warps keeps 128 *stationary* vectors in registers, as the rows of the product (M):
// 32 a warp, loaded once through shared memory. *Streamed* vectors come 64 at a time through two
// buffers (cp.async), as its columns (N). A thread's 4 stationary rows stay the same throughout, so
// what is reduced over the streamed side needs no other thread until the end.
//
//              streamed: 64 columns                   thread (warp, lane): rows
//            +---------------------+                    32 warp + 16 m + 8 half + lane / 4
//     warp 0 | 32 rows             |                  and of 16 columns at a time
//     warp 1 | 32 rows             |  stationary:       8 j + lane % 4 * 2 + {0, 1}
//     warp 2 | 32 rows             |  128 rows
//     warp 3 | 32 rows             |
//            +---------------------+
//
// Rows of shared memory are 16 bytes longer than the vectors, so that the eight rows of an
// ldmatrix lie in different banks.
#pragma once

#include "common/block.cuh"
#include "common/float16.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "importance/importance_view.cuh"

namespace lightvlm {

constexpr int kTensorThreads = 128;
constexpr int kStationary = 128;
constexpr int kStreamed = kImportanceTile;
constexpr int kWarpRows = 32;
constexpr int kThreadRows = 4;  // stationary rows of a thread
constexpr int kColumnStep = 16;

// What is known of the streamed vectors of one tile.
template <typename T>
struct StreamedTile {
    const T* vector[kStreamed];  // null: zeros
    int32_t level[kStreamed];    // limit of a probe, threshold of a target
    float shift[kStreamed];
    float factor[kStreamed];
    int32_t count;                             // of vectors that are there
    int32_t lowest[kStreamed / kWarpThreads];  // level, by warp of those who filled it in
    int32_t highest[kStreamed / kWarpThreads];
};

template <typename T, int kWidth>
struct TensorShared {
    static constexpr int kPitch = kWidth + 8;
    // First the stationary vectors, then two buffers of streamed ones. 18, 26, 34 or 66 KiB.
    alignas(16) T vectors[kStationary][kPitch];
    const T* stationary[kStationary];  // 1 KiB
    StreamedTile<T> tile[3];           // 4 KiB
};

// kWidth: the vectors' width rounded up; what lies past it is zeros.
template <typename T, int kWidth>
class TensorTile {
  public:
    using Shared = TensorShared<T, kWidth>;

    // even: 16-byte pieces can be copied.
    __device__ TensorTile(const ImportanceParams& params, bool even, Shared& shared)
        : params_(params), shared_(shared), even_(even) {}

    // Row of thread-owned element i in [0, kThreadRows).
    __device__ static int row(int i) {
        const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
        return static_cast<int>(threadIdx.x) / kWarpThreads * kWarpRows + i * 8 + lane / 4;
    }

    // Loads the vectors that shared.stationary points to. The block calls it after a barrier.
    __device__ void keep_stationary() {
        stage(shared_.stationary, kStationary, 0);
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        __syncthreads();
        const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
        const int first = static_cast<int>(threadIdx.x) / kWarpThreads * kWarpRows + lane % 16;
        for (int m = 0; m < 2; ++m) {
            for (int k = 0; k < kSteps; ++k) {
                ptx::ldmatrix_x4(stationary_[m][k],
                                 &shared_.vectors[first + 16 * m][16 * k + lane / 16 * 8]);
            }
        }
        __syncthreads();
    }

    // Passes `tiles` tiles by. fill(t, tile) writes element threadIdx.x % kStreamed of what is
    // known of tile t; it is called by two warps. use(t, tile, buffer) consumes a tile. The block
    // calls it after a barrier.
    template <typename Fill, typename Use>
    __device__ void stream(int tiles, const Fill& fill, const Use& use) {
        const int half = static_cast<int>(threadIdx.x) / kStreamed;
        if (half < tiles) fill(half, shared_.tile[half]);
        __syncthreads();
        if (tiles > 0) stage(shared_.tile[0].vector, kStreamed, 0);
        ptx::cp_async_commit();
        for (int t = 0; t < tiles; ++t) {
            if (t + 1 < tiles) {
                stage(shared_.tile[(t + 1) % 3].vector, kStreamed, (t + 1) % 2 * kStreamed);
            }
            ptx::cp_async_commit();
            ptx::cp_async_wait<1>();
            __syncthreads();
            use(shared_.tile[t % 3], t % 2 * kStreamed);
            if (half == 0 && t + 2 < tiles) fill(t + 2, shared_.tile[(t + 2) % 3]);
            __syncthreads();
        }
    }

    // product[j][m][i]: columns first_column + 8 j + ..., rows 16 m + ... of the warp, as d[i] of
    // mma_m16n8k16.
    __device__ __forceinline__ void multiply(int buffer, int first_column,
                                             float (&product)[2][2][4]) const {
        const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
        const T* from = &shared_.vectors[buffer + first_column + lane % 8][lane / 8 * 8];
        for (int j = 0; j < 2; ++j) {
            for (int m = 0; m < 2; ++m) {
                for (int i = 0; i < 4; ++i) product[j][m][i] = 0.0f;
            }
        }
        for (int k = 0; k < kSteps; k += 2) {
            for (int j = 0; j < 2; ++j) {
                uint32_t columns[4];
                ptx::ldmatrix_x4(columns, from + 8 * j * Shared::kPitch + 16 * k);
                const uint32_t low[2] = {columns[0], columns[1]};
                const uint32_t high[2] = {columns[2], columns[3]};
                for (int m = 0; m < 2; ++m) {
                    ptx::mma_m16n8k16<T>(product[j][m], stationary_[m][k], low);
                    ptx::mma_m16n8k16<T>(product[j][m], stationary_[m][k + 1], high);
                }
            }
        }
    }

    // Sets the lowest and highest level of a tile; each warp of fill() calls it.
    __device__ static void bound_levels(StreamedTile<T>& tile, int32_t level) {
        int32_t low = level;
        int32_t high = level;
        for (int step = kWarpThreads / 2; step > 0; step /= 2) {
            const int32_t other_low = __shfl_xor_sync(kFullWarp, low, step);
            const int32_t other_high = __shfl_xor_sync(kFullWarp, high, step);
            low = other_low < low ? other_low : low;
            high = other_high > high ? other_high : high;
        }
        if (threadIdx.x % kWarpThreads != 0) return;
        tile.lowest[threadIdx.x % kStreamed / kWarpThreads] = low;
        tile.highest[threadIdx.x % kStreamed / kWarpThreads] = high;
    }

  private:
    static constexpr int kSteps = kWidth / 16;

    // Starts copying `count` vectors to rows first and on.
    __device__ void stage(const T* const* vectors, int count, int first) {
        constexpr int kPieces = kWidth / 8;
        if (even_) {
            for (int i = static_cast<int>(threadIdx.x); i < count * kPieces; i += kTensorThreads) {
                const int d = i % kPieces * 8;
                const T* vector = vectors[i / kPieces];
                const bool valid = vector != nullptr && d < params_.width;
                const void* from = valid ? static_cast<const void*>(vector + d) : params_.query;
                ptx::cp_async_16(&shared_.vectors[first + i / kPieces][d], from, valid);
            }
            return;
        }
        for (int i = static_cast<int>(threadIdx.x); i < count * kWidth; i += kTensorThreads) {
            const T* vector = vectors[i / kWidth];
            const bool valid = vector != nullptr && i % kWidth < params_.width;
            shared_.vectors[first + i / kWidth][i % kWidth] = valid ? vector[i % kWidth] : T{0};
        }
    }

    const ImportanceParams& params_;
    Shared& shared_;
    const bool even_;
    uint32_t stationary_[2][kSteps][4];
};

}  // namespace lightvlm
