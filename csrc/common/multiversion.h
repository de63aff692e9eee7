// One loop, compiled for three levels of x86-64, chosen once per process by what the CPU has.
//
//   struct Scale {
//       template <CpuLevel level>
//       static LIGHTVLM_INLINE void run(const float* x, float a, float* y, int64_t n) {
//           for (int64_t i = 0; i < n; ++i) y[i] = a * x[i];
//       }
//   };
//   multiversion<Scale>(x, a, y, n);
//
// run() is inlined into one function per level that carries the target attribute, so the compiler
// vectorises the same source three times; `if constexpr (level == CpuLevel::kAvx512)` may call
// intrinsics from a function marked LIGHTVLM_TARGET_AVX512. Helpers called from run() must be
// LIGHTVLM_INLINE too, or they are compiled once, portably.
//
// A Body that has use for the dot-product instructions says so and gets their levels besides
// (compare with >=: all that kAvx512 has is there too):
//
//       static constexpr CpuLevel kHighestLevel = CpuLevel::kAvx512Bf16;
//
// Floating-point contraction is off for the whole library (-ffp-contract=off): a level changes
// speed. It changes a result only where run() itself picks another order of summation.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#define LIGHTVLM_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define LIGHTVLM_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")))
#define LIGHTVLM_TARGET_AVX512                                                           \
    __attribute__((                                                                      \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt," \
               "prefer-vector-width=512")))
#define LIGHTVLM_TARGET_AVX512_VNNI                                                      \
    __attribute__((                                                                      \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt," \
               "avx512vnni,prefer-vector-width=512")))
#define LIGHTVLM_TARGET_AVX512_BF16                                                      \
    __attribute__((                                                                      \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt," \
               "avx512vnni,avx512bf16,prefer-vector-width=512")))
#endif

namespace lightvlm {

// kAvx512Vnni: vpdpbusd, vpdpwssd. kAvx512Bf16: these and vdpbf16ps (no processor has it without).
enum class CpuLevel : int {
    kPortable = 0,
    kAvx2 = 1,
    kAvx512 = 2,
    kAvx512Vnni = 3,
    kAvx512Bf16 = 4,
};

namespace detail {

// What this CPU has, lowered (never raised) by
// LIGHTVLM_CPU_LEVEL=portable|avx2|avx512|avx512_vnni|avx512_bf16.
inline CpuLevel usable_cpu_level() {
    CpuLevel found = CpuLevel::kPortable;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2")) {
        found = CpuLevel::kAvx2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            found = CpuLevel::kAvx512;
            if (__builtin_cpu_supports("avx512vnni")) {
                found = __builtin_cpu_supports("avx512bf16") ? CpuLevel::kAvx512Bf16
                                                             : CpuLevel::kAvx512Vnni;
            }
        }
    }
#endif
    const char* wanted = std::getenv("LIGHTVLM_CPU_LEVEL");
    if (wanted == nullptr) return found;
    constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};
    for (int level = 0; level < static_cast<int>(found); ++level) {
        if (std::strcmp(wanted, kNames[level]) == 0) return static_cast<CpuLevel>(level);
    }
    return found;
}

}  // namespace detail

// The level to run at, for code that has versions up to `highest`.
inline CpuLevel cpu_level(CpuLevel highest = CpuLevel::kAvx512) {
    static const CpuLevel level = detail::usable_cpu_level();
    return level < highest ? level : highest;
}

namespace detail {

template <typename Body, typename... Args>
auto run_portable(Args... args) {
    return Body::template run<CpuLevel::kPortable>(args...);
}

#if defined(__x86_64__)
template <typename Body, typename... Args>
LIGHTVLM_TARGET_AVX2 auto run_avx2(Args... args) {
    return Body::template run<CpuLevel::kAvx2>(args...);
}

template <typename Body, typename... Args>
LIGHTVLM_TARGET_AVX512 auto run_avx512(Args... args) {
    return Body::template run<CpuLevel::kAvx512>(args...);
}

template <typename Body, typename... Args>
LIGHTVLM_TARGET_AVX512_VNNI auto run_avx512_vnni(Args... args) {
    return Body::template run<CpuLevel::kAvx512Vnni>(args...);
}

template <typename Body, typename... Args>
LIGHTVLM_TARGET_AVX512_BF16 auto run_avx512_bf16(Args... args) {
    return Body::template run<CpuLevel::kAvx512Bf16>(args...);
}
#endif

template <typename Body>
constexpr CpuLevel highest_level() {
    if constexpr (requires { Body::kHighestLevel; }) {
        return Body::kHighestLevel;
    } else {
        return CpuLevel::kAvx512;
    }
}

}  // namespace detail

// Arguments go by value: pass pointers and numbers.
template <typename Body, typename... Args>
auto multiversion(Args... args) {
#if defined(__x86_64__)
    constexpr CpuLevel kHighest = detail::highest_level<Body>();
    const CpuLevel level = cpu_level(kHighest);
    if constexpr (kHighest >= CpuLevel::kAvx512Bf16) {
        if (level == CpuLevel::kAvx512Bf16) return detail::run_avx512_bf16<Body>(args...);
    }
    if constexpr (kHighest >= CpuLevel::kAvx512Vnni) {
        if (level == CpuLevel::kAvx512Vnni) return detail::run_avx512_vnni<Body>(args...);
    }
    switch (level) {
        case CpuLevel::kAvx512:
            return detail::run_avx512<Body>(args...);
        case CpuLevel::kAvx2:
            return detail::run_avx2<Body>(args...);
        default:
            break;
    }
#endif
    return detail::run_portable<Body>(args...);
}

}  // namespace lightvlm
