// Atomics, fences, cached loads and stores. Fibers are not preempted, so a plain
// read-modify-write is atomic; each is a place where a shuffled run may switch threads.
// Included through emulation.h only.
#pragma once

#include <string>
#include <type_traits>

#include "emulation_engine.h"

namespace lightvlm::emulation {

// The hardware faults on a misaligned access; x86 would let it pass.
template <typename T>
void check_alignment(const T* pointer, const char* name) {
    if (reinterpret_cast<uintptr_t>(pointer) % alignof(T) != 0) {
        fail(std::string(name) + ": address is not aligned to " + std::to_string(alignof(T)) +
             " bytes");
    }
}

template <typename T, typename Update>
T atomic_update(T* address, const char* name, Update update) {
    check_alignment(address, name);
    maybe_yield();
    const T old = *address;
    *address = update(old);
    return old;
}

}  // namespace lightvlm::emulation

// One overload per type that CUDA has: uint64_t is `unsigned long` on Linux, which nvcc refuses
// too.
#define LIGHTVLM_ATOMIC(type, name, expression)                                \
    inline type name(type* address, type value) {                              \
        return lightvlm::emulation::atomic_update(                             \
            address, #name, [value](type old) -> type { return expression; }); \
    }
#define LIGHTVLM_ATOMIC_INTEGERS(name, expression) \
    LIGHTVLM_ATOMIC(int, name, expression)         \
    LIGHTVLM_ATOMIC(unsigned, name, expression)    \
    LIGHTVLM_ATOMIC(unsigned long long, name, expression)

LIGHTVLM_ATOMIC_INTEGERS(atomicMax, old < value ? value : old)
LIGHTVLM_ATOMIC(long long, atomicMax, old < value ? value : old)
LIGHTVLM_ATOMIC_INTEGERS(atomicMin, value < old ? value : old)
LIGHTVLM_ATOMIC(long long, atomicMin, value < old ? value : old)
LIGHTVLM_ATOMIC_INTEGERS(atomicAnd, old& value)
LIGHTVLM_ATOMIC_INTEGERS(atomicOr, old | value)
LIGHTVLM_ATOMIC_INTEGERS(atomicXor, old ^ value)
LIGHTVLM_ATOMIC_INTEGERS(atomicExch, ((void)old, value))
LIGHTVLM_ATOMIC(float, atomicExch, ((void)old, value))
// Signed overflow wraps on the device.
LIGHTVLM_ATOMIC(int, atomicAdd, static_cast<int>(static_cast<unsigned>(old) + value))
LIGHTVLM_ATOMIC(unsigned, atomicAdd, old + value)
LIGHTVLM_ATOMIC(unsigned long long, atomicAdd, old + value)
LIGHTVLM_ATOMIC(int, atomicSub, static_cast<int>(static_cast<unsigned>(old) - value))
LIGHTVLM_ATOMIC(unsigned, atomicSub, old - value)
// Here so that an order-dependent sum can be shown to be one; no kernel of ours adds floats so.
LIGHTVLM_ATOMIC(float, atomicAdd, old + value)
LIGHTVLM_ATOMIC(unsigned, atomicInc, old >= value ? 0u : old + 1u)
LIGHTVLM_ATOMIC(unsigned, atomicDec, (old == 0u || old > value) ? value : old - 1u)
#undef LIGHTVLM_ATOMIC_INTEGERS
#undef LIGHTVLM_ATOMIC

#define LIGHTVLM_ATOMIC_CAS(type)                                                 \
    inline type atomicCAS(type* address, type compare, type value) {              \
        return lightvlm::emulation::atomic_update(                                \
            address, "atomicCAS",                                                 \
            [compare, value](type old) { return old == compare ? value : old; }); \
    }
LIGHTVLM_ATOMIC_CAS(int)
LIGHTVLM_ATOMIC_CAS(unsigned)
LIGHTVLM_ATOMIC_CAS(unsigned long long)
LIGHTVLM_ATOMIC_CAS(unsigned short)
#undef LIGHTVLM_ATOMIC_CAS

inline void __threadfence_block() { lightvlm::emulation::maybe_yield(); }
inline void __threadfence() { lightvlm::emulation::maybe_yield(); }
inline void __threadfence_system() { lightvlm::emulation::maybe_yield(); }
inline void __nanosleep(unsigned) { lightvlm::emulation::yield(); }
[[noreturn]] inline void __trap() { lightvlm::emulation::fail("__trap"); }

#define LIGHTVLM_CACHED_LOAD(name)                            \
    template <typename T>                                     \
    T name(const T* address) {                                \
        lightvlm::emulation::check_alignment(address, #name); \
        return *address;                                      \
    }
LIGHTVLM_CACHED_LOAD(__ldg)
LIGHTVLM_CACHED_LOAD(__ldca)
LIGHTVLM_CACHED_LOAD(__ldcg)
LIGHTVLM_CACHED_LOAD(__ldcs)
LIGHTVLM_CACHED_LOAD(__ldcv)
#undef LIGHTVLM_CACHED_LOAD

#define LIGHTVLM_CACHED_STORE(name)                           \
    template <typename T>                                     \
    void name(T* address, std::type_identity_t<T> value) {    \
        lightvlm::emulation::check_alignment(address, #name); \
        *address = value;                                     \
    }
LIGHTVLM_CACHED_STORE(__stcg)
LIGHTVLM_CACHED_STORE(__stcs)
LIGHTVLM_CACHED_STORE(__stwt)
#undef LIGHTVLM_CACHED_STORE
