// Tile product of importance: 64 targets x 64 probes, fp32 on the CUDA cores. What a kernel needs
// to know of it is which elements a thread holds and how to fold them over a tile's probes or
// targets.
#pragma once

#include "common/block.cuh"
#include "common/float16.cuh"
#include "common/launch.h"
#include "importance/importance_view.cuh"

namespace lightvlm {

template <typename T>
class ImportanceProduct {
    static constexpr int kSide = 16;   // threads along targets, and along probes
    static constexpr int kDepth = 32;  // numbers of each vector staged at a time

  public:
    static constexpr int kThreads = 256;
    static constexpr int kThreadTargets = 4;  // a thread holds 4 x 4 elements
    static constexpr int kThreadProbes = 4;

    // 17 KiB, and 8 KiB to fold over targets.
    struct Shared {
        // Element d of vector v at [d][v]; the odd pitch keeps both directions free of conflicts.
        float targets[kDepth][kImportanceTile + 1];
        float probes[kDepth][kImportanceTile + 1];
        const T* target_vectors[kImportanceTile];
        const T* probe_vectors[kImportanceTile];
        float highest[kSide][kImportanceTile];
        float sum[kSide][kImportanceTile];
    };

    float value[kThreadTargets][kThreadProbes];

    // Which target and probe of the tile value[i][k] belongs to.
    __device__ static int target(int i) {
        return static_cast<int>(threadIdx.x) / kSide + i * kSide;
    }
    __device__ static int probe(int k) { return static_cast<int>(threadIdx.x) % kSide + k * kSide; }
    // Whether the thread is the one to write a target's fold over probes.
    __device__ static bool owns_targets() { return threadIdx.x % kSide == 0; }

    // value = <target, probe> for the tile at (first_target, first_probe); vectors past the end are
    // zeros. The whole block calls it.
    __device__ void multiply(const ImportanceSlot<T>& slot, int64_t first_target,
                             int64_t first_probe, Shared& shared) {
        __syncthreads();  // the previous tile has been read
        for (int v = threadIdx.x; v < 2 * kImportanceTile; v += kThreads) {
            if (v < kImportanceTile) {
                const int64_t t = first_target + v;
                shared.target_vectors[v] =
                    t < slot.targets ? slot.target(static_cast<int32_t>(t)) : nullptr;
            } else {
                const int64_t p = first_probe + v - kImportanceTile;
                shared.probe_vectors[v - kImportanceTile] =
                    p < slot.probes ? slot.probe(static_cast<int32_t>(p)) : nullptr;
            }
        }
        for (int i = 0; i < kThreadTargets; ++i) {
            for (int k = 0; k < kThreadProbes; ++k) value[i][k] = 0.0f;
        }
        const int width = static_cast<int>(slot.params.width);
        for (int first = 0; first < width; first += kDepth) {
            __syncthreads();
            stage(shared.target_vectors, first, width, shared.targets);
            stage(shared.probe_vectors, first, width, shared.probes);
            __syncthreads();
            for (int d = 0; d < kDepth; ++d) {
                float from_targets[kThreadTargets];
                float from_probes[kThreadProbes];
                for (int i = 0; i < kThreadTargets; ++i)
                    from_targets[i] = shared.targets[d][target(i)];
                for (int k = 0; k < kThreadProbes; ++k) from_probes[k] = shared.probes[d][probe(k)];
                for (int i = 0; i < kThreadTargets; ++i) {
                    for (int k = 0; k < kThreadProbes; ++k) {
                        value[i][k] += from_targets[i] * from_probes[k];
                    }
                }
            }
        }
    }

    // Folds what each thread has of a target over the threads that have its other probes.
    template <typename Combine>
    __device__ static float fold_probes(float own, Combine combine) {
        for (int step = kSide / 2; step > 0; step /= 2) {
            own = combine(own, __shfl_xor_sync(kFullWarp, own, step));
        }
        return own;
    }

    // Merges (maximum, sum of exponentials) of each probe over the threads that have its other
    // targets, in thread order. Thread p < 64 returns with those of probe p of the tile.
    __device__ static void merge_targets(float (&highest)[kThreadProbes],
                                         float (&sum)[kThreadProbes], Shared& shared,
                                         float* merged_highest, float* merged_sum) {
        const int row = static_cast<int>(threadIdx.x) / kSide;
        for (int k = 0; k < kThreadProbes; ++k) {
            shared.highest[row][probe(k)] = highest[k];
            shared.sum[row][probe(k)] = sum[k];
        }
        __syncthreads();
        if (threadIdx.x >= kImportanceTile) return;
        float most = -CUDART_INF_F;
        for (int r = 0; r < kSide; ++r) most = fmaxf(most, shared.highest[r][threadIdx.x]);
        float total = 0.0f;
        const float shift = most > -CUDART_INF_F ? most : 0.0f;
        for (int r = 0; r < kSide; ++r) {
            total += shared.sum[r][threadIdx.x] * exp2f(shared.highest[r][threadIdx.x] - shift);
        }
        *merged_highest = most;
        *merged_sum = total;
    }

  private:
    // A warp takes a vector: its lanes read neighbours.
    __device__ static void stage(const T* const* vectors, int first, int width,
                                 float (*staged)[kImportanceTile + 1]) {
        static_assert(kDepth == kWarpThreads, "a lane for each staged number");
        const int lane = threadIdx.x % kWarpThreads;
        const int d = first + lane;
        for (int v = threadIdx.x / kWarpThreads; v < kImportanceTile;
             v += kThreads / kWarpThreads) {
            const T* vector = vectors[v];
            staged[lane][v] = vector != nullptr && d < width ? to_float(vector[d]) : 0.0f;
        }
    }
};

}  // namespace lightvlm
