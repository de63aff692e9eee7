// Kernels that test the emulation itself: some are right, most are wrong in one way that it has to
// notice. tests/emulation/test_emulation.py calls the functions at the end through ctypes.
#include <cstdint>

#include "common/float16.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"

namespace lightvlm {
namespace {

constexpr unsigned kFull = 0xffffffffu;

// ---- Right ---------------------------------------------------------------------------------

struct NormShared {
    float partial[32];
};

// y = x / sqrt(mean(x^2) + 1e-6), one block a row.
template <typename T>
__global__ void rms_norm_kernel(const T* x, T* y, int width) {
    auto* shared = shared_memory<NormShared>();
    const T* row = x + static_cast<int64_t>(blockIdx.x) * width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float value = to_float(row[i]);
        sum += value * value;
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFull, sum, step);
    if (threadIdx.x % 32 == 0) shared->partial[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += shared->partial[warp];
    const float scale = rsqrtf(total / static_cast<float>(width) + 1e-6f);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        y[static_cast<int64_t>(blockIdx.x) * width + i] = from_float<T>(to_float(row[i]) * scale);
    }
}

// One row of `out` per collective, one column per lane; the value of lane l is 3 l + 1.
__global__ void collectives_kernel(int* out) {
    const int lane = static_cast<int>(threadIdx.x);
    const int value = 3 * lane + 1;
    int row = 0;
    const auto put = [&](int result) { out[32 * row++ + lane] = result; };
    put(__shfl_sync(kFull, value, 5));
    put(__shfl_sync(kFull, value, lane + 3, 8));
    put(__shfl_up_sync(kFull, value, 3, 16));
    put(__shfl_down_sync(kFull, value, 3, 16));
    put(__shfl_xor_sync(kFull, value, 9));
    put(__shfl_xor_sync(kFull, value, 12, 8));
    put(static_cast<int>(__shfl_xor_sync(kFull, static_cast<double>(value), 1)));
    put(static_cast<int>(__shfl_sync(kFull, static_cast<long long>(value) << 33, 31) >> 33));
    put(static_cast<int>(__ballot_sync(kFull, lane % 3 == 0)));
    put(__any_sync(kFull, lane == 31));
    put(__any_sync(kFull, 0));
    put(__all_sync(kFull, lane < 32));
    put(__all_sync(kFull, lane != 7));
    put(static_cast<int>(__match_any_sync(kFull, lane % 5)));
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    put(__reduce_add_sync(kFull, value - 50));
    put(__reduce_min_sync(kFull, value - 50));
    put(__reduce_max_sync(kFull, value - 50));
    put(static_cast<int>(__reduce_max_sync(kFull, static_cast<unsigned>(value - 50))));
    put(static_cast<int>(__reduce_and_sync(kFull, static_cast<unsigned>(value | 64))));
    put(static_cast<int>(__reduce_or_sync(kFull, static_cast<unsigned>(value))));
    put(static_cast<int>(__reduce_xor_sync(kFull, static_cast<unsigned>(value))));
#endif
    // Two halves of the warp, each under its own mask and each with its own number of rounds.
    int sum = value;
    if (lane < 16) {
        for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, step);
    } else {
        sum += __shfl_xor_sync(0xffff0000u, sum, 1);
        __syncwarp(0xffff0000u);
    }
    put(sum);
}

__global__ void block_votes_kernel(int* out) {
    const int thread = static_cast<int>(threadIdx.x);
    const int counted = __syncthreads_count(thread % 3 == 0);
    const int any = __syncthreads_or(thread == 5);
    const int none = __syncthreads_or(0);
    const int all = __syncthreads_and(1);
    const int not_all = __syncthreads_and(thread != 5);
    out[thread] = counted * 16 + any * 8 + none * 4 + all * 2 + not_all;
}

__global__ void indices_kernel(int* out) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    out[block * threads + thread] += static_cast<int>(block * threads + thread);
}

struct AtomicTotals {
    int added;
    unsigned added_unsigned;
    unsigned long long added_wide;
    int smallest;
    int largest;
    unsigned long long smallest_wide;
    unsigned long long largest_wide;
    long long smallest_signed;
    long long largest_signed;
    unsigned ored;
    int ored_signed;
    unsigned anded;
    unsigned swapped;
    unsigned exchanged;
};

__global__ void atomics_kernel(AtomicTotals* totals) {
    const int value = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) - 40;
    atomicAdd(&totals->added, value);
    atomicAdd(&totals->added_unsigned, static_cast<unsigned>(value));
    atomicAdd(&totals->added_wide, 1ull << 40);
    atomicMin(&totals->smallest, value);
    atomicMax(&totals->largest, value);
    atomicMin(&totals->smallest_wide, static_cast<unsigned long long>(value + 50) << 33);
    atomicMax(&totals->largest_wide, static_cast<unsigned long long>(value + 50) << 33);
    atomicMin(&totals->smallest_signed, static_cast<long long>(value) * (1ll << 33));
    atomicMax(&totals->largest_signed, static_cast<long long>(value) * (1ll << 33));
    atomicOr(&totals->ored, 1u << (value & 31));
    atomicOr(&totals->ored_signed, 1 << (value & 15));
    atomicAnd(&totals->anded, ~(1u << (value & 7)));
    unsigned seen = totals->swapped;
    for (;;) {
        const unsigned before = atomicCAS(&totals->swapped, seen, seen + 2);
        if (before == seen) break;
        seen = before;
    }
    atomicExch(&totals->exchanged, 77u);
}

// A thread waits for a later one of its block, and for a block with an earlier ticket.
__global__ void spin_kernel(int* flags, int* ticket, int* out) {
    volatile int* flag = flags;
    auto* mine = shared_memory<int>();
    if (threadIdx.x == 0) *mine = atomicAdd(ticket, 1);
    __syncthreads();
    const int block = *mine;
    const int last = static_cast<int>(blockDim.x) - 1;
    if (threadIdx.x == 0) {
        while (flag[block * 2] == 0) __nanosleep(20);
        while (block > 0 && flag[(block - 1) * 2 + 1] == 0) __nanosleep(20);
        out[block] = block > 0 ? out[block - 1] + 1 : 1;
        __threadfence();
        atomicExch(&flags[block * 2 + 1], 1);
    }
    if (static_cast<int>(threadIdx.x) == last) atomicExch(&flags[block * 2], 1);
}

// Copies 16-byte pieces through two buffers; pieces from `valid` on arrive as zeros.
struct CopyShared {
    float4 buffer[2][64];
};

template <bool kWaits>
__global__ void async_copy_kernel(const float4* in, float4* out, int tiles, int valid) {
    auto* shared = shared_memory<CopyShared>();
    const int thread = static_cast<int>(threadIdx.x);
    const auto fetch = [&](int tile) {
        const int piece = tile * 64 + thread;
        const bool inside = tile < tiles && piece < valid;
        if (tile < tiles) {
            ptx::cp_async_16(&shared->buffer[tile % 2][thread], in + (inside ? piece : 0), inside);
        }
        ptx::cp_async_commit();
    };
    fetch(0);
    for (int tile = 0; tile < tiles; ++tile) {
        fetch(tile + 1);
        if (kWaits) ptx::cp_async_wait<1>();
        __syncthreads();
        out[tile * 64 + thread] = shared->buffer[tile % 2][63 - thread];
        __syncthreads();
    }
    ptx::cp_async_wait<0>();
}

// One warp: d (16 x 8) += a (16 x 16) b (16 x 8), all row-major, fragments gathered by hand.
template <typename T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
    const int lane = static_cast<int>(threadIdx.x);
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    const auto two = [](T low, T high) {
        return low.bits | static_cast<uint32_t>(high.bits) << 16;
    };
    uint32_t a_registers[4];
    uint32_t b_registers[2];
    float d_registers[4];
    for (int part = 0; part < 4; ++part) {
        const T* from = a + 16 * (group + part % 2 * 8) + pair + part / 2 * 8;
        a_registers[part] = two(from[0], from[1]);
    }
    for (int part = 0; part < 2; ++part) {
        const T* from = b + 8 * (pair + part * 8) + group;
        b_registers[part] = two(from[0], from[8]);
    }
    const auto place = [&](int i) { return 8 * (group + i / 2 * 8) + pair + i % 2; };
    for (int i = 0; i < 4; ++i) d_registers[i] = d[place(i)];
    ptx::mma_m16n8k16<T>(d_registers, a_registers, b_registers);
    for (int i = 0; i < 4; ++i) d[place(i)] = d_registers[i];
}

// One warp: the transpose of in (8 x 8), and of each pair of its row what is left after `low` and
// `high` are taken away.
__global__ void pairs_kernel(const half_t* in, uint32_t* transposed, float low, float high,
                             uint32_t* difference, uint32_t* converted) {
    const int lane = static_cast<int>(threadIdx.x);
    const half_t* from = in + lane * 2;
    const uint32_t pair = from[0].bits | static_cast<uint32_t>(from[1].bits) << 16;
    transposed[lane] = ptx::movmatrix_transpose(pair);
    difference[lane] = ptx::subtract_half_pair(pair, ptx::convert_pair<half_t>(low, high));
    converted[lane] = ptx::convert_pair<bfloat16_t>(to_float(from[0]), to_float(from[1]));
}

struct MatrixShared {
    uint4 rows[32];
};

// One warp: four matrices of 8 x 8, the rows of each in reverse order.
__global__ void ldmatrix_kernel(const uint4* in, uint32_t* out, int offset) {
    auto* shared = shared_memory<MatrixShared>();
    const int lane = static_cast<int>(threadIdx.x);
    shared->rows[lane] = in[lane];
    __syncwarp();
    uint32_t d[4];
    const int row = lane / 8 * 8 + 7 - lane % 8;
    ptx::ldmatrix_x4(d, reinterpret_cast<const char*>(&shared->rows[row]) + offset);
    for (int i = 0; i < 4; ++i) out[32 * i + lane] = d[i];
}

__global__ void exp2_kernel(const float* x, float* y) {
    y[threadIdx.x] = ptx::exp2_approximate(x[threadIdx.x]);
}

struct NarrowCopyShared {
    uint2 wide[32];
    uint32_t narrow[32];
};

// Pieces of 8 and 4 bytes; those of lanes from `valid` on arrive as zeros.
__global__ void narrow_copy_kernel(const uint2* in, uint2* out, uint32_t* narrow_out, int valid) {
    auto* shared = shared_memory<NarrowCopyShared>();
    const int lane = static_cast<int>(threadIdx.x);
    const bool inside = lane < valid;
    ptx::cp_async_narrow<8>(&shared->wide[lane], in + (inside ? lane : 0), inside);
    ptx::cp_async_narrow<4>(&shared->narrow[lane], &in[inside ? lane : 0].y, inside);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    out[lane] = shared->wide[31 - lane];
    narrow_out[lane] = shared->narrow[31 - lane];
}

// ---- Depends on the order of threads -------------------------------------------------------

__global__ void order_kernel(int* counter, int* order) {
    order[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

struct ReverseShared {
    float row[256];
};

// A barrier is missing between writing and reading.
__global__ void missing_barrier_kernel(float* out) {
    auto* shared = shared_memory<ReverseShared>();
    shared->row[threadIdx.x] = static_cast<float>(threadIdx.x);
    out[threadIdx.x] = shared->row[blockDim.x - 1 - threadIdx.x];
}

// The second barrier of the loop is missing: a fast warp overwrites what a slow one still reads.
__global__ void missing_second_barrier_kernel(float* out, int rounds) {
    auto* shared = shared_memory<ReverseShared>();
    float sum = 0.0f;
    for (int round = 0; round < rounds; ++round) {
        const float seen = __shfl_xor_sync(kFull, static_cast<float>(round), 1);
        shared->row[threadIdx.x] = seen;
        __syncthreads();
        sum += shared->row[blockDim.x - 1 - threadIdx.x];
    }
    out[threadIdx.x] = sum;
}

__global__ void float_sum_kernel(float* sum) {
    atomicAdd(sum, 1.0f / static_cast<float>(1 + threadIdx.x));
}

// ---- Wrong ---------------------------------------------------------------------------------

enum Fault : int {
    kDivergentSites,
    kExitBeforeBarrier,
    kBarrierInBranch,
    kMissingLane,
    kMissingLaneAtBarrier,
    kOutsideOwnMask,
    kMixedCollectives,
    kMixedSites,
    kBadWidth,
    kTrap,
    kSpinForever,
    kMisalignedLoad,
};

__global__ void fault_kernel(Fault fault, int* data) {
    const unsigned thread = threadIdx.x;
    const int value = static_cast<int>(thread);
    int result = 0;
    switch (fault) {
        case kDivergentSites:
            if (thread < 32) {
                __syncthreads();
            } else {
                __syncthreads();
            }
            break;
        case kExitBeforeBarrier:
            if (thread == 37) return;
            __syncthreads();
            break;
        case kBarrierInBranch:
            if (thread % 2 == 0) __syncthreads();
            result = __shfl_xor_sync(kFull, value, 1);
            break;
        case kMissingLane:
            if (thread != 5) result = __shfl_xor_sync(kFull, value, 1);
            break;
        case kMissingLaneAtBarrier:
            if (thread != 33) result = __ballot_sync(kFull, 1) != 0;
            __syncthreads();
            break;
        case kOutsideOwnMask:
            result = __any_sync(0x0000ffffu, 1);
            break;
        case kMixedCollectives:
            result = thread < 16 ? __any_sync(kFull, 1) : __all_sync(kFull, 1);
            break;
        case kMixedSites:
            if (thread < 16) {
                result = __shfl_sync(kFull, value, 0);
            } else {
                result = __shfl_sync(kFull, value, 1);
            }
            break;
        case kBadWidth:
            result = __shfl_sync(kFull, value, 0, 12 + (value & 0));
            break;
        case kTrap:
            if (thread == 3) __trap();
            break;
        case kSpinForever:
            while (atomicAdd(data, 0) == 0) __nanosleep(100);
            break;
        case kMisalignedLoad:
            result = __ldg(reinterpret_cast<const int*>(reinterpret_cast<const char*>(data) + 2));
            break;
    }
    data[1 + thread] = result;
}

// Full-mask collective in a block whose last warp is not full.
__global__ void partial_warp_kernel(int* out) {
    out[threadIdx.x] = static_cast<int>(__ballot_sync(kFull, 1));
}

struct OneShared {
    float data[1];
};

// Writes `data[offset]` of dynamic shared memory; the caller chooses one that is outside.
__global__ void shared_write_kernel(int offset) {
    auto* shared = shared_memory<OneShared>();
    if (threadIdx.x == 3 && blockIdx.x == 1) shared->data[offset] = 1.0f;
}

// Reads its shared memory without writing it, then writes: nothing may survive for the next block.
__global__ void shared_read_kernel(float* out) {
    auto* shared = shared_memory<ReverseShared>();
    out[blockIdx.x * blockDim.x + threadIdx.x] = shared->row[threadIdx.x];
    shared->row[threadIdx.x] = 1.0f;
}

__global__ void global_write_kernel(int* data, int64_t offset) {
    if (threadIdx.x == 0) data[offset] = 1;
}

__global__ void global_read_kernel(const int* data, int64_t offset, int* out) {
    if (threadIdx.x == 0) *out = data[offset];
}

// A 16-byte access at an address that is a multiple of 4 only: a fault on the device.
__global__ void vector_read_kernel(const int* data, int offset, int* out) {
    const int4 pieces = *reinterpret_cast<const int4*>(data + offset);
    out[threadIdx.x] = pieces.x + pieces.w;
}

}  // namespace
}  // namespace lightvlm

// ---- Called from Python --------------------------------------------------------------------

using namespace lightvlm;

#define SELF_TEST extern "C" __attribute__((visibility("default"))) int

template <typename T>
static int rms_norm(const void* x, void* y, int rows, int width, int threads) {
    return launch("rms_norm", rms_norm_kernel<T>, make_grid(rows), dim3(threads),
                  sizeof(NormShared), nullptr, static_cast<const T*>(x), static_cast<T*>(y), width);
}

SELF_TEST run_rms_norm(int type, const void* x, void* y, int rows, int width, int threads) {
    if (type == 0) return rms_norm<float>(x, y, rows, width, threads);
    if (type == 1) return rms_norm<half_t>(x, y, rows, width, threads);
    return rms_norm<bfloat16_t>(x, y, rows, width, threads);
}

SELF_TEST run_collectives(int* out) {
    return launch("collectives", collectives_kernel, dim3(1), dim3(32), 0, nullptr, out);
}

SELF_TEST run_block_votes(int* out, int threads) {
    return launch("block_votes", block_votes_kernel, dim3(1), dim3(threads), 0, nullptr, out);
}

SELF_TEST run_indices(int* out, const int64_t* grid, const int* block) {
    return launch("indices", indices_kernel, make_grid(grid[0], grid[1], grid[2]),
                  dim3(block[0], block[1], block[2]), 0, nullptr, out);
}

SELF_TEST run_atomics(void* totals, int blocks, int threads) {
    return launch("atomics", atomics_kernel, dim3(blocks), dim3(threads), 0, nullptr,
                  static_cast<AtomicTotals*>(totals));
}

SELF_TEST run_spin(int* flags, int* ticket, int* out, int blocks) {
    return launch("spin", spin_kernel, dim3(blocks), dim3(64), sizeof(int), nullptr, flags, ticket,
                  out);
}

SELF_TEST run_async_copy(int waits, const void* in, void* out, int tiles, int valid) {
    return launch("async_copy", waits != 0 ? async_copy_kernel<true> : async_copy_kernel<false>,
                  dim3(1), dim3(64), sizeof(CopyShared), nullptr, static_cast<const float4*>(in),
                  static_cast<float4*>(out), tiles, valid);
}

SELF_TEST run_mma(int is_half, const void* a, const void* b, float* d) {
    if (is_half != 0) {
        return launch("mma", mma_kernel<half_t>, dim3(1), dim3(32), 0, nullptr,
                      static_cast<const half_t*>(a), static_cast<const half_t*>(b), d);
    }
    return launch("mma", mma_kernel<bfloat16_t>, dim3(1), dim3(32), 0, nullptr,
                  static_cast<const bfloat16_t*>(a), static_cast<const bfloat16_t*>(b), d);
}

SELF_TEST run_pairs(const void* in, uint32_t* transposed, const float* subtracted,
                    uint32_t* difference, uint32_t* converted) {
    return launch("pairs", pairs_kernel, dim3(1), dim3(32), 0, nullptr,
                  static_cast<const half_t*>(in), transposed, subtracted[0], subtracted[1],
                  difference, converted);
}

SELF_TEST run_ldmatrix(const void* in, uint32_t* out, int offset) {
    return launch("ldmatrix", ldmatrix_kernel, dim3(1), dim3(32), sizeof(MatrixShared), nullptr,
                  static_cast<const uint4*>(in), out, offset);
}

SELF_TEST run_exp2(const float* x, float* y, int count) {
    return launch("exp2", exp2_kernel, dim3(1), dim3(count), 0, nullptr, x, y);
}

SELF_TEST run_narrow_copy(const void* in, void* out, uint32_t* narrow_out, int valid) {
    return launch("narrow_copy", narrow_copy_kernel, dim3(1), dim3(32), sizeof(NarrowCopyShared),
                  nullptr, static_cast<const uint2*>(in), static_cast<uint2*>(out), narrow_out,
                  valid);
}

SELF_TEST run_order(int* counter, int* order, int blocks, int threads) {
    return launch("order", order_kernel, dim3(blocks), dim3(threads), 0, nullptr, counter, order);
}

SELF_TEST run_missing_barrier(float* out) {
    return launch("missing_barrier", missing_barrier_kernel, dim3(1), dim3(256),
                  sizeof(ReverseShared), nullptr, out);
}

SELF_TEST run_missing_second_barrier(float* out, int rounds) {
    return launch("missing_second_barrier", missing_second_barrier_kernel, dim3(1), dim3(256),
                  sizeof(ReverseShared), nullptr, out, rounds);
}

SELF_TEST run_float_sum(float* sum) {
    return launch("float_sum", float_sum_kernel, dim3(1), dim3(1024), 0, nullptr, sum);
}

SELF_TEST run_fault(int fault, int* data) {
    return launch("fault", fault_kernel, dim3(2, 3), dim3(64), 0, nullptr,
                  static_cast<Fault>(fault), data);
}

SELF_TEST run_partial_warp(int* out) {
    return launch("partial_warp", partial_warp_kernel, dim3(1), dim3(40), 0, nullptr, out);
}

SELF_TEST run_shared_write(int offset, int64_t shared_bytes) {
    return launch("shared_write", shared_write_kernel, dim3(3), dim3(32),
                  static_cast<size_t>(shared_bytes), nullptr, offset);
}

SELF_TEST run_shared_read(float* out, int blocks) {
    return launch("shared_read", shared_read_kernel, dim3(blocks), dim3(256), sizeof(ReverseShared),
                  nullptr, out);
}

SELF_TEST run_global_write(int* data, int64_t offset) {
    return launch("global_write", global_write_kernel, dim3(1), dim3(32), 0, nullptr, data, offset);
}

SELF_TEST run_global_read(const int* data, int64_t offset, int* out) {
    return launch("global_read", global_read_kernel, dim3(1), dim3(32), 0, nullptr, data, offset,
                  out);
}

SELF_TEST run_vector_read(const int* data, int offset, int* out) {
    return launch("vector_read", vector_read_kernel, dim3(1), dim3(1), 0, nullptr, data, offset,
                  out);
}

// The plain C++ conversions that CPU twins use; `type` 1: half_t, 2: bfloat16_t.
SELF_TEST convert_to_float(int type, const uint16_t* in, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        out[i] = type == 1 ? to_float(half_t{in[i]}) : to_float(bfloat16_t{in[i]});
    }
    return 0;
}

SELF_TEST convert_from_float(int type, const float* in, uint16_t* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        out[i] = type == 1 ? from_float<half_t>(in[i]).bits : from_float<bfloat16_t>(in[i]).bits;
    }
    return 0;
}
