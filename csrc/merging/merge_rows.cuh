// The last launch of merge_tokens and merge_pairs: the rows that are left, from lists of who
// arrives at each.
//
// Formula   out(slot of c) = (w_c x_c + sum w_i x_i) / max(w_c + sum w_i, eps), over the tokens i
// of
//           c's list, in the order of the list.
// Owner     A block owns one slot and a chunk of its columns. Where more than kHubArrivals tokens
//           arrive, blocks of their own share out the columns 128 bytes at a time, so that many
//           processors read what only one slot needs. No atomics.
// Exact     Products and sums round to fp32 one by one (no fused multiply-add), as on the CPU, and
// in
//           the same order on both ways.
// Shared    26 KiB: tokens and weights of up to 256 arrivals, and for hubs six stages of 32 rows x
//           128 bytes.
// Bound     Bytes: x is read once, out written once.
#pragma once

#include "common/block.cuh"
#include "common/ptx.cuh"
#include "merging/merge_arrange.cuh"
#include "merging/merge_numbers.h"
#include "merging/merge_vector.cuh"

namespace lightvlm {

constexpr int kRowsThreads = 128;
constexpr int kRowsListed = 256;
constexpr int kHubArrivals = 64;
constexpr int kHubRows = 32;
constexpr int kHubStages = 6;
constexpr int kHubBytes = 128;  // of a row that one block sums

// Sizes and strides in elements.
struct MergeRowsParams {
    int64_t rows = 0;
    int64_t tokens = 0;
    int64_t slots = 0;
    int64_t width = 0;
    bool right = false;
    double eps = 0.0;

    const void* x = nullptr;  // [rows, tokens, width]
    int64_t x_row_stride = 0;
    int64_t x_token_stride = 0;
    const float* weight = nullptr;  // [rows, tokens], or null: 1
    int64_t weight_stride = 0;

    const int32_t* count = nullptr;  // [rows]; one outside [0, slots] is 0
    int64_t count_stride = 0;
    const int32_t* kept = nullptr;   // [rows, slots] by entry: the token; -1: a row of zeros
    const ListSpan* span = nullptr;  // [rows, slots] by entry: its list in order
    const int32_t* order = nullptr;  // [rows, tokens]: the lists

    void* out = nullptr;            // [rows, slots, width], contiguous
    float* out_weight = nullptr;    // [rows, slots] by slot, or null
    int32_t* target = nullptr;      // [rows, tokens], or null: gets the entry of what arrives
    int32_t* index_tail = nullptr;  // [rows, slots], or null: gets -1 past count
};

struct RowsShared {
    int32_t token[kRowsListed];
    float weight[kRowsListed];  // scaled
    float plain[kRowsListed];   // as it is
    uint32_t scratch[kRowsThreads / kWarpThreads];
    __align__(16) unsigned char stages[kHubStages][kHubRows][kHubBytes];
};

// One slot's list, as the block sees it.
struct RowsList {
    const int32_t* order;
    const float* weight;  // of the row, or null
    int64_t count;
    int64_t weighing;  // of the list: how many weigh something
    int32_t exponent;  // weight_exponent() of them and the kept token
    float own;         // weight of the kept token, scaled
    float own_plain;

    __device__ __forceinline__ float weight_of(int32_t token) const {
        if (weight == nullptr) return 1.0f;
        return is_weight(weight[token]) ? weight[token] : 0.0f;
    }
};

__device__ inline RowsList open_list(const MergeRowsParams& params, int64_t row, int64_t entry,
                                     int32_t token, RowsShared& shared) {
    const ListSpan span = params.span[row * params.slots + entry];
    RowsList list;
    list.order = params.order + row * params.tokens + span.begin;
    list.weight = params.weight == nullptr ? nullptr : params.weight + row * params.weight_stride;
    list.count = span.count;
    uint32_t highest = 0;
    uint32_t weighing = 0;
    for (int64_t i = threadIdx.x; i < list.count; i += kRowsThreads) {
        const uint32_t bits = weight_bits(list.weight_of(list.order[i]));
        // Floats that are not negative order as their bits do.
        highest = max(highest, bits);
        weighing += bits != 0 ? 1 : 0;
    }
    list.own_plain = list.weight_of(token);
    highest = max(highest, weight_bits(list.own_plain));
    if (list.count > 0) {
        const auto higher = [](uint32_t a, uint32_t b) { return max(a, b); };
        const auto sum = [](uint32_t a, uint32_t b) { return a + b; };
        highest = block_reduce<kRowsThreads>(highest, shared.scratch, higher);
        weighing = block_reduce<kRowsThreads>(weighing, shared.scratch, sum);
    }
    list.weighing = weighing;
    list.exponent = weight_exponent(__uint_as_float(highest), list.weighing + 1);
    list.own = scaled_weight(list.own_plain, list.exponent);
    return list;
}

// Tokens and weights [first, first + kRowsListed) of the list. Returns how many there are.
__device__ inline int load_list(const RowsList& list, int64_t first, RowsShared& shared) {
    const int64_t left = list.count - first;
    const int listed = static_cast<int>(left < kRowsListed ? left : kRowsListed);
    __syncthreads();  // the part before has been read
    for (int i = static_cast<int>(threadIdx.x); i < listed; i += kRowsThreads) {
        const int32_t token = list.order[first + i];
        const float weight = list.weight_of(token);
        shared.token[i] = token;
        shared.plain[i] = weight;
        shared.weight[i] = scaled_weight(weight, list.exponent);
    }
    __syncthreads();
    return listed;
}

// Sums of weights, the kept token's first.
struct WeightSums {
    float scaled;
    float plain;

    __device__ __forceinline__ explicit WeightSums(const RowsList& list)
        : scaled(list.own), plain(list.own_plain) {}
    __device__ __forceinline__ void add(const RowsShared& shared, int i) {
        scaled = __fadd_rn(scaled, shared.weight[i]);
        plain = __fadd_rn(plain, shared.plain[i]);
    }
};

template <int kVector>
__device__ __forceinline__ void add_weighted(float (&sums)[kVector], float weight,
                                             const float (&values)[kVector]) {
    LIGHTVLM_UNROLL
    for (int v = 0; v < kVector; ++v) {
        sums[v] = __fadd_rn(sums[v], __fmul_rn(weight, values[v]));
    }
}

// A slot's columns [column, column + kVector) of each thread.
template <typename T, int kVector>
__device__ void merge_slot(const MergeRowsParams& params, const RowsList& list, const T* x,
                           int32_t token, bool active, float* out_weight, T* out,
                           RowsShared& shared) {
    constexpr int kUnroll = 4;
    float sums[kVector] = {};
    float values[kUnroll][kVector];
    WeightSums weights(list);
    if (active && list.own > 0.0f) {
        load_floats<kVector>(x + token * params.x_token_stride, values[0]);
        add_weighted<kVector>(sums, list.own, values[0]);
    }
    for (int64_t first = 0; first < list.count; first += kRowsListed) {
        const int listed = load_list(list, first, shared);
        for (int i = 0; i < listed; ++i) weights.add(shared, i);
        if (!active) continue;
        for (int i = 0; i < listed; i += kUnroll) {
            LIGHTVLM_UNROLL
            for (int u = 0; u < kUnroll; ++u) {
                const int32_t from = shared.token[i + u < listed ? i + u : i];
                load_floats<kVector>(x + from * params.x_token_stride, values[u]);
            }
            LIGHTVLM_UNROLL
            for (int u = 0; u < kUnroll; ++u) {
                // What weighs nothing changes nothing, were it NaN.
                if (i + u >= listed || !(shared.weight[i + u] > 0.0f)) continue;
                add_weighted<kVector>(sums, shared.weight[i + u], values[u]);
            }
        }
    }
    if (out_weight != nullptr) *out_weight = fminf(weights.plain, FLT_MAX);
    if (!active) return;
    if (list.weighing == 0) {
        copy_values<kVector>(out, x + token * params.x_token_stride);
        return;
    }
    const float divisor = weight_divisor(weights.scaled, params.eps, list.exponent);
    LIGHTVLM_UNROLL
    for (float& sum : sums) sum = __fdiv_rn(sum, divisor);
    store_floats<kVector>(out, sums);
}

// 128 bytes of a hub's columns. Rows are whole, aligned pieces of 16 bytes.
template <typename T>
__device__ void merge_hub(const MergeRowsParams& params, const RowsList& list, const T* x,
                          int32_t token, int64_t chunk, T* out, RowsShared& shared) {
    constexpr int kPieceBytes = 16;
    constexpr int kPieces = kHubBytes / kPieceBytes;
    constexpr int kPieceValues = kPieceBytes / static_cast<int>(sizeof(T));
    constexpr int kOwn = 4 / static_cast<int>(sizeof(T));  // columns of a lane of the first warp
    const int64_t first_column = chunk * (kHubBytes / static_cast<int64_t>(sizeof(T)));
    const int piece = static_cast<int>(threadIdx.x) % kPieces;
    const int64_t piece_column = first_column + piece * kPieceValues;
    const bool read = piece_column < params.width;
    const bool sums_up = threadIdx.x < kWarpThreads;
    const int64_t column = first_column + static_cast<int64_t>(threadIdx.x) * kOwn;
    const bool active = sums_up && column < params.width;

    float sums[kOwn] = {};
    float values[kOwn];
    WeightSums weights(list);
    if (active && list.own > 0.0f) {
        load_floats<kOwn>(x + token * params.x_token_stride + column, values);
        add_weighted<kOwn>(sums, list.own, values);
    }
    for (int64_t first = 0; first < list.count; first += kRowsListed) {
        const int listed = load_list(list, first, shared);
        const int stages = (listed + kHubRows - 1) / kHubRows;
        const auto load = [&](int stage) {
            for (int r = static_cast<int>(threadIdx.x) / kPieces; r < kHubRows;
                 r += kRowsThreads / kPieces) {
                const int i = stage * kHubRows + r;
                if (i >= listed) break;
                const T* from =
                    x + shared.token[i] * params.x_token_stride + (read ? piece_column : 0);
                ptx::cp_async_16(&shared.stages[stage % kHubStages][r][piece * kPieceBytes], from,
                                 read);
            }
            ptx::cp_async_commit();
        };
        for (int stage = 0; stage < kHubStages - 1; ++stage) load(stage);
        for (int stage = 0; stage < stages; ++stage) {
            ptx::cp_async_wait<kHubStages - 2>();
            __syncthreads();
            load(stage + kHubStages - 1);
            if (!sums_up) continue;
            const int left = listed - stage * kHubRows;
            for (int r = 0; r < kHubRows && r < left; ++r) {
                const int i = stage * kHubRows + r;
                weights.add(shared, i);
                const auto* row = reinterpret_cast<const T*>(shared.stages[stage % kHubStages][r]);
                load_floats<kOwn>(row + threadIdx.x * kOwn, values);
                if (shared.weight[i] > 0.0f) add_weighted<kOwn>(sums, shared.weight[i], values);
            }
        }
        ptx::cp_async_wait<0>();
    }
    if (!active) return;
    const float divisor = weight_divisor(weights.scaled, params.eps, list.exponent);
    LIGHTVLM_UNROLL
    for (float& sum : sums) sum = __fdiv_rn(sum, divisor);
    if (list.weighing > 0) {
        store_floats<kOwn>(out + column, sums);
    } else {
        copy_values<kOwn>(out + column, x + token * params.x_token_stride + column);
    }
}

__device__ __forceinline__ int64_t rows_count(const MergeRowsParams& params, int64_t row) {
    const int32_t count = params.count[row * params.count_stride];
    return count < 0 || count > params.slots ? 0 : count;
}

// The entry of the row's hub number `hub`, or -1.
__device__ inline int64_t find_hub(const MergeRowsParams& params, int64_t row, int64_t hub,
                                   RowsShared& shared) {
    const int64_t count = rows_count(params, row);
    int64_t before = 0;
    int64_t found = -1;
    for (int64_t tile = 0; tile < count; tile += kRowsThreads) {
        const int64_t entry = tile + threadIdx.x;
        const bool is_hub = entry < count && params.kept[row * params.slots + entry] >= 0 &&
                            params.span[row * params.slots + entry].count > kHubArrivals;
        uint32_t here;
        const int64_t at = before + block_rank<kRowsThreads>(is_hub, shared.scratch, &here);
        if (is_hub && at == hub) shared.token[0] = static_cast<int32_t>(entry);
        before += here;
        if (before > hub) {  // the same in each thread
            __syncthreads();
            found = shared.token[0];
            break;
        }
    }
    return found;
}

// The grid: first rows * hubs * hub_chunks blocks for hubs, then rows * slots * chunks.
struct MergeRowsGrid {
    uint32_t hubs;  // of a row, at most; 0 where there is no such way
    uint32_t hub_chunks;
    uint32_t chunks;
    uint32_t hub_blocks;
};

template <typename T, int kVector>
// Six blocks an SM: 80 registers, of which it takes fewer and spills none.
__global__ void __launch_bounds__(kRowsThreads, 6)
    merge_rows_kernel(const __grid_constant__ MergeRowsParams params, MergeRowsGrid grid) {
    auto& shared = *shared_memory<RowsShared>();
    // 32 bits, as the grid has no more: a division of 64 is a call.
    uint32_t block = blockIdx.x;
    if constexpr (kVector > 1) {
        if (block < grid.hub_blocks) {
            const int64_t chunk = block % grid.hub_chunks;
            const int64_t row = block / grid.hub_chunks / grid.hubs;
            const int64_t entry =
                find_hub(params, row, block / grid.hub_chunks % grid.hubs, shared);
            if (entry < 0) return;
            const int32_t token = params.kept[row * params.slots + entry];
            const int64_t slot =
                params.right ? params.slots - rows_count(params, row) + entry : entry;
            const RowsList list = open_list(params, row, entry, token, shared);
            merge_hub<T>(params, list, static_cast<const T*>(params.x) + row * params.x_row_stride,
                         token, chunk,
                         static_cast<T*>(params.out) + (row * params.slots + slot) * params.width,
                         shared);
            return;
        }
    }
    block -= grid.hub_blocks;
    const int64_t chunk = block % grid.chunks;
    const int64_t slot = block / grid.chunks % static_cast<uint32_t>(params.slots);
    const int64_t row = block / grid.chunks / static_cast<uint32_t>(params.slots);
    const int64_t column = (chunk * kRowsThreads + threadIdx.x) * kVector;
    const bool active = column < params.width;
    const bool first = chunk == 0 && threadIdx.x == 0;
    T* out = static_cast<T*>(params.out) + (row * params.slots + slot) * params.width + column;
    float* out_weight = first && params.out_weight != nullptr
                            ? params.out_weight + row * params.slots + slot
                            : nullptr;

    const int64_t count = rows_count(params, row);
    if (first && params.index_tail != nullptr && slot >= count) {
        params.index_tail[row * params.slots + slot] = -1;
    }
    const int64_t entry = params.right ? slot - (params.slots - count) : slot;
    const int32_t token =
        entry >= 0 && entry < count ? params.kept[row * params.slots + entry] : -1;
    if (token < 0) {
        const float zeros[kVector] = {};
        if (active) store_floats<kVector>(out, zeros);
        if (out_weight != nullptr) *out_weight = 0.0f;
        return;
    }
    const RowsList list = open_list(params, row, entry, token, shared);
    if (params.target != nullptr && chunk == 0) {
        for (int64_t i = threadIdx.x; i < list.count; i += kRowsThreads) {
            params.target[row * params.tokens + list.order[i]] = static_cast<int32_t>(entry);
        }
    }
    // The hub's own blocks write its columns; here only what it weighs is left to do.
    const bool is_hub = grid.hubs > 0 && list.count > kHubArrivals;
    if (is_hub && (chunk > 0 || params.out_weight == nullptr)) return;
    merge_slot<T, kVector>(params, list,
                           static_cast<const T*>(params.x) + row * params.x_row_stride + column,
                           token, active && !is_hub, out_weight, out, shared);
}

}  // namespace lightvlm
