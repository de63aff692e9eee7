// The project's only inline PTX (sm_80 and up): named wrappers, each with a plain C++ body for
// emulation that keeps what may go wrong on the device visible (docs/emulation.md).
#pragma once

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

}  // namespace lightvlm::ptx
