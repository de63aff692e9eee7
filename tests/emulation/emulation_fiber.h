// Fibers: stacks of their own on one OS thread, switched by hand. On x86-64 a switch saves the six
// callee-saved registers (about 2 ns); elsewhere, or with -DLIGHTVLM_EMULATION_UCONTEXT, ucontext
// does it (two system calls). AddressSanitizer is told about every switch. Included by
// emulation.cpp only.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(LIGHTVLM_EMULATION_UCONTEXT)
#define LIGHTVLM_EMULATION_UCONTEXT
#endif
#ifdef LIGHTVLM_EMULATION_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef LIGHTVLM_EMULATION_UCONTEXT
// (rdi: where to save the stack pointer, rsi: the one to load)
asm(R"(
    .text
    .hidden lightvlm_emulation_switch
    .globl lightvlm_emulation_switch
    .type lightvlm_emulation_switch, @function
lightvlm_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size lightvlm_emulation_switch, . - lightvlm_emulation_switch
)");
extern "C" void lightvlm_emulation_switch(void** save, void* load);
#endif

namespace lightvlm::emulation {

// Something that can be switched to: a fiber, or the thread that launches.
struct Context {
#ifdef LIGHTVLM_EMULATION_UCONTEXT
    ucontext_t machine{};
#else
    void* stack_pointer = nullptr;
#endif
    // The launching thread's bounds are learnt from AddressSanitizer at the first switch.
    const void* stack_bottom = nullptr;
    size_t stack_size = 0;
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
#endif
};

#ifdef __SANITIZE_ADDRESS__
static Context* switched_from = nullptr;
#endif

// First thing to call on a fresh fiber, and after every switch back.
inline void switched_in([[maybe_unused]] Context& to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(to.fake_stack, &switched_from->stack_bottom,
                                    &switched_from->stack_size);
#endif
}

inline void switch_context(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
    switched_from = &from;
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_size);
#endif
#ifdef LIGHTVLM_EMULATION_UCONTEXT
    swapcontext(&from.machine, &to.machine);
#else
    lightvlm_emulation_switch(&from.stack_pointer, to.stack_pointer);
#endif
    switched_in(from);
}

// A stack with an unmapped page below it: an overflow is a fault, not silent damage.
class Stack {
  public:
#ifdef __SANITIZE_ADDRESS__
    static constexpr size_t kBytes = 512 * 1024;
#else
    static constexpr size_t kBytes = 128 * 1024;
#endif

    Stack() {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        mapping_bytes_ = kBytes + page;
        mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        if (mapping_ == MAP_FAILED) throw std::bad_alloc();
        mprotect(mapping_, page, PROT_NONE);
        bottom_ = static_cast<char*>(mapping_) + page;
    }
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;
    ~Stack() { munmap(mapping_, mapping_bytes_); }

    // Makes `context` start `entry` at the top of this stack when it is next switched to. What the
    // stack held is forgotten. `stagger` keeps the hot ends of many stacks out of one cache set.
    void prepare(Context& context, void (*entry)(), size_t stagger) {
        context = Context{};
        context.stack_bottom = bottom_;
        context.stack_size = kBytes - stagger;
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(bottom_, kBytes);
#endif
#ifdef LIGHTVLM_EMULATION_UCONTEXT
        getcontext(&context.machine);
        context.machine.uc_stack.ss_sp = bottom_;
        context.machine.uc_stack.ss_size = kBytes - stagger;
        context.machine.uc_link = nullptr;
        makecontext(&context.machine, entry, 0);
#else
        auto** top = reinterpret_cast<void**>(bottom_ + kBytes - stagger);
        // As if `entry` had been called from address 0: its stack pointer is 8 off a multiple of
        // 16, and backtraces end there. Below that, what the switch pops.
        top[-1] = nullptr;
        top[-2] = reinterpret_cast<void*>(entry);
        for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
        context.stack_pointer = top - 8;
#endif
    }

  private:
    void* mapping_ = nullptr;
    size_t mapping_bytes_ = 0;
    char* bottom_ = nullptr;
};

}  // namespace lightvlm::emulation
