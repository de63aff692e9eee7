// The project's only inline PTX (sm_80 and up): named wrappers, each with a plain C++ body for
// emulation that keeps what may go wrong on the device visible (docs/emulation.md).
#pragma once

#include <cmath>
#include <type_traits>

#include "common/float16.cuh"
#include "common/launch.h"

namespace lightvlm::ptx {

// cp.async: copies 16 bytes from global to shared memory in the background, past the registers and
// L1. Both addresses are multiples of 16. With `valid` false, 16 zero bytes arrive instead and
// `global` is not read (it must still be a pointer into an allocation).
// A thread sees its own copies after cp_async_wait, the block sees them after a barrier besides.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
#ifdef LIGHTVLM_EMULATION
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0) {
        emulation::fail("cp_async_16: address is not aligned to 16 bytes");
    }
    emulation::queue_copy(shared, global, valid ? 16 : 0, 16);
#else
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
#endif
}

// The same for pieces of 4 or 8 bytes, aligned to their size; these pass through L1.
template <int kBytes>
__device__ __forceinline__ void cp_async_narrow(void* shared, const void* global,
                                                bool valid = true) {
    static_assert(kBytes == 4 || kBytes == 8);
#ifdef LIGHTVLM_EMULATION
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % kBytes != 0) {
        emulation::fail("cp_async_narrow: address is not aligned to the piece");
    }
    emulation::queue_copy(shared, global, valid ? kBytes : 0, kBytes);
#else
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(address), "l"(global),
                 "n"(kBytes), "r"(valid ? kBytes : 0)
                 : "memory");
#endif
}

// Closes the group of the copies this thread has issued since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#ifdef LIGHTVLM_EMULATION
    emulation::commit_copies();
#else
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most the `kPending` latest groups of this thread are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef LIGHTVLM_EMULATION
    emulation::finish_copies(kPending);
#else
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

#ifdef LIGHTVLM_EMULATION
namespace detail {

struct MmaPayload {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

template <typename T>
float half_of(uint32_t pair, int which) {
    return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

template <typename T>
void combine_mma(void* const payloads[emulation::kWarpLanes], unsigned) {
    float a[16][16];
    float b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto* own = static_cast<const MmaPayload*>(payloads[lane]);
        const int group = lane / 4;
        const int pair = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            for (int part = 0; part < 4; ++part) {
                a[group + part % 2 * 8][pair + part / 2 * 8 + i] = half_of<T>(own->a[part], i);
            }
            for (int part = 0; part < 2; ++part) {
                b[pair + part * 8 + i][group] = half_of<T>(own->b[part], i);
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        float* d = static_cast<const MmaPayload*>(payloads[lane])->d;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8;
            const int column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) d[i] += a[row][k] * b[k][column];
        }
    }
}

struct TransposePayload {
    uint32_t pair;
    uint32_t result;
};

inline void combine_transpose(void* const payloads[emulation::kWarpLanes], unsigned) {
    const auto at = [&](int lane) { return static_cast<TransposePayload*>(payloads[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
        uint32_t result = 0;
        for (int i = 0; i < 2; ++i) {
            const int column = lane / 4;
            const uint32_t pair = at((lane % 4 * 2 + i) * 4 + column / 2)->pair;
            result |= (pair >> (16 * (column % 2)) & 0xffffu) << (16 * i);
        }
        at(lane)->result = result;
    }
}

}  // namespace detail
#endif

// mma.sync: d += a b over the warp, a 16 x 16 and b 16 x 8 of T = half_t or bfloat16_t, d in fp32.
// With group = lane / 4 and pair = lane % 4 * 2, a lane holds (two neighbouring values a register,
// the lower index in the lower half)
//   a[part]  row group + part % 2 * 8, columns pair + part / 2 * 8 and the next    part in [0, 4)
//   b[part]  rows pair + part * 8 and the next, column group                       part in [0, 2)
//   d[i]     row group + i / 2 * 8, column pair + i % 2                            i in [0, 4)
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, half_t> || std::is_same_v<T, bfloat16_t>);
#ifdef LIGHTVLM_EMULATION
    static constexpr emulation::WarpCollective kMma{"mma_m16n8k16", detail::combine_mma<T>};
    detail::MmaPayload payload{d, a, b};
    emulation::warp_collective(kMma, emulation::kFullMask, &payload, emulation::Site::current());
#else
    if constexpr (std::is_same_v<T, half_t>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
}

// movmatrix.trans: transposes an 8 x 8 matrix of 16-bit values over the warp. A lane gives columns
// lane % 4 * 2 and the next (lower half first) of row lane / 4, and gets the same of the transpose.
// So the accumulator of an mma, rounded to 16 bits, becomes the b of another.
__device__ __forceinline__ uint32_t movmatrix_transpose(uint32_t pair) {
#ifdef LIGHTVLM_EMULATION
    static constexpr emulation::WarpCollective kTranspose{"movmatrix_transpose",
                                                          detail::combine_transpose};
    detail::TransposePayload payload{pair, 0};
    emulation::warp_collective(kTranspose, emulation::kFullMask, &payload,
                               emulation::Site::current());
    return payload.result;
#else
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(pair));
    return result;
#endif
}

// Two floats as a pair of T = half_t or bfloat16_t, rounded to nearest even, `low` in the lower
// half.
template <typename T>
__device__ __forceinline__ uint32_t convert_pair(float low, float high) {
    static_assert(std::is_same_v<T, half_t> || std::is_same_v<T, bfloat16_t>);
#ifdef LIGHTVLM_EMULATION
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#else
    uint32_t pair;
    if constexpr (std::is_same_v<T, half_t>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
#endif
}

// a - b in each half of a pair of half_t.
__device__ __forceinline__ uint32_t subtract_half_pair(uint32_t a, uint32_t b) {
#ifdef LIGHTVLM_EMULATION
    uint32_t pair = 0;
    for (int i = 0; i < 2; ++i) {
        const float difference = detail::half_of<half_t>(a, i) - detail::half_of<half_t>(b, i);
        pair |= static_cast<uint32_t>(from_float<half_t>(difference).bits) << (16 * i);
    }
    return pair;
#else
    uint32_t pair;
    asm("sub.rn.f16x2 %0, %1, %2;\n" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
#endif
}

#ifdef LIGHTVLM_EMULATION
namespace detail {

struct LdmatrixPayload {
    const void* row;
    uint32_t* d;
};

inline void combine_ldmatrix(void* const payloads[emulation::kWarpLanes], unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
        uint32_t* d = static_cast<const LdmatrixPayload*>(payloads[lane])->d;
        for (int i = 0; i < 4; ++i) {
            const auto* from = static_cast<const LdmatrixPayload*>(payloads[8 * i + lane / 4]);
            d[i] = static_cast<const uint32_t*>(from->row)[lane % 4];
        }
    }
}

}  // namespace detail
#endif

// ldmatrix: four 8 x 8 matrices of 16-bit values out of shared memory. Lane 8 i + r hands in the
// address of row r of matrix i (16 bytes, aligned to 16); afterwards d[i] of a lane holds, of
// matrix i, row lane / 4, columns lane % 4 * 2 and the next.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
#ifdef LIGHTVLM_EMULATION
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
        emulation::fail("ldmatrix_x4: address is not aligned to 16 bytes");
    }
    static constexpr emulation::WarpCollective kLoad{"ldmatrix_x4", detail::combine_ldmatrix};
    detail::LdmatrixPayload payload{row, d};
    emulation::warp_collective(kLoad, emulation::kFullMask, &payload, emulation::Site::current());
#else
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
#endif
}

// ex2.approx: 2^x with a relative error of 2^-22; subnormal results are 0 (exact in emulation).
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef LIGHTVLM_EMULATION
    const float value = std::exp2(x);
    return value < 0x1p-126f ? 0.0f : value;
#else
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(value) : "f"(x));
    return value;
#endif
}

}  // namespace lightvlm::ptx
