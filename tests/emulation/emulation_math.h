// Bit intrinsics, conversions and fast math. Fast functions are exact here: their device error
// (a few ulp) is not emulated. Included through emulation.h only.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#define CUDART_INF_F (__builtin_huge_valf())
#define CUDART_NAN_F (__builtin_nanf(""))
#define CUDART_INF (__builtin_huge_val())
#define CUDART_NAN (__builtin_nan(""))
#define CUDART_L2E_F 1.442695041f
#define CUDART_LN2_F 0.693147181f
#define CUDART_PI_F 3.141592654f

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline unsigned __brev(unsigned x) {
    x = ((x >> 1) & 0x55555555u) | ((x & 0x55555555u) << 1);
    x = ((x >> 2) & 0x33333333u) | ((x & 0x33333333u) << 2);
    x = ((x >> 4) & 0x0f0f0f0fu) | ((x & 0x0f0f0f0fu) << 4);
    return __builtin_bswap32(x);
}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = (static_cast<uint64_t>(y) << 32) | x;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned select = selector >> (4 * i);
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (select & 7u))) & 0xffu;
        // Bit 3 of a selector copies the byte's sign over the byte.
        if ((select & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;
        result |= byte << (8 * i);
    }
    return result;
}

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    const uint64_t wide = (static_cast<uint64_t>(high) << 32) | low;
    return static_cast<unsigned>((wide << (shift & 31u)) >> 32);
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    const uint64_t wide = (static_cast<uint64_t>(high) << 32) | low;
    return static_cast<unsigned>(wide >> (shift & 31u));
}

inline unsigned __umulhi(unsigned x, unsigned y) {
    return static_cast<unsigned>((static_cast<uint64_t>(x) * y) >> 32);
}
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    __extension__ using Wide = unsigned __int128;
    return static_cast<unsigned long long>((static_cast<Wide>(x) * y) >> 64);
}

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

namespace lightvlm::emulation {

// The device's float-to-integer conversions saturate, and give 0 for a NaN of a 32-bit result and
// 0x8000000000000000 for one of a 64-bit result.
template <typename Integer, typename Float>
Integer convert_saturated(Float rounded) {
    using Limits = std::numeric_limits<Integer>;
    if (std::isnan(rounded)) {
        return sizeof(Integer) == 4 ? Integer{0} : static_cast<Integer>(uint64_t{1} << 63);
    }
    // max() + 1 is a power of two, hence exact; max() itself may not be.
    const Float above = std::ldexp(Float{1}, Limits::digits);
    if (rounded >= above) return Limits::max();
    if (rounded < static_cast<Float>(Limits::min())) return Limits::min();
    return static_cast<Integer>(rounded);
}

}  // namespace lightvlm::emulation

#define LIGHTVLM_CONVERSIONS(from, name, to)                                  \
    inline to name##_rn(from x) {                                             \
        return lightvlm::emulation::convert_saturated<to>(std::nearbyint(x)); \
    }                                                                         \
    inline to name##_rz(from x) {                                             \
        return lightvlm::emulation::convert_saturated<to>(std::trunc(x));     \
    }                                                                         \
    inline to name##_rd(from x) {                                             \
        return lightvlm::emulation::convert_saturated<to>(std::floor(x));     \
    }                                                                         \
    inline to name##_ru(from x) { return lightvlm::emulation::convert_saturated<to>(std::ceil(x)); }
LIGHTVLM_CONVERSIONS(float, __float2int, int)
LIGHTVLM_CONVERSIONS(float, __float2uint, unsigned)
LIGHTVLM_CONVERSIONS(float, __float2ll, long long)
LIGHTVLM_CONVERSIONS(float, __float2ull, unsigned long long)
LIGHTVLM_CONVERSIONS(double, __double2ll, long long)
LIGHTVLM_CONVERSIONS(double, __double2ull, unsigned long long)
#undef LIGHTVLM_CONVERSIONS

inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

// CUDA has min and max of arithmetic types in the global namespace; for floating point they are
// fmin and fmax, which drop a NaN if the other argument is a number.
#define LIGHTVLM_MIN_MAX(type)                                   \
    constexpr type min(type x, type y) { return y < x ? y : x; } \
    constexpr type max(type x, type y) { return x < y ? y : x; }
LIGHTVLM_MIN_MAX(int)
LIGHTVLM_MIN_MAX(unsigned)
LIGHTVLM_MIN_MAX(long)
LIGHTVLM_MIN_MAX(unsigned long)
LIGHTVLM_MIN_MAX(long long)
LIGHTVLM_MIN_MAX(unsigned long long)
#undef LIGHTVLM_MIN_MAX
inline float min(float x, float y) { return std::fmin(x, y); }
inline float max(float x, float y) { return std::fmax(x, y); }
inline double min(double x, double y) { return std::fmin(x, y); }
inline double max(double x, double y) { return std::fmax(x, y); }
