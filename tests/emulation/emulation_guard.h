// A block's dynamic shared memory: poisoned before each block, with guard zones on both sides.
// Included by emulation.cpp only.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "emulation_block.h"

namespace lightvlm::emulation {

class GuardedMemory {
  public:
    static constexpr size_t kAlignment = 128;

    // For a launch with `bytes` of shared memory.
    void prepare(size_t bytes) {
        if (storage_.empty()) {
            storage_.resize(kMaxSharedBytes + 2 * (kGuardBytes + kAlignment));
            auto address = reinterpret_cast<uintptr_t>(storage_.data()) + kGuardBytes;
            // The next multiple of 128 that is none of 256: a kernel that relies on more than
            // launch.h promises should show.
            address = (address + kAlignment - 1) / kAlignment * kAlignment;
            if (address % (2 * kAlignment) == 0) address += kAlignment;
            data_ = reinterpret_cast<unsigned char*>(address);
        }
        bytes_ = bytes;
#ifdef __SANITIZE_ADDRESS__
        __asan_poison_memory_region(storage_.data(), storage_.size());
        __asan_unpoison_memory_region(data_, bytes);
#else
        std::memset(data_ - kGuardBytes, kGuardByte, kGuardBytes);
        std::memset(data_ + bytes, kGuardByte, kGuardBytes);
#endif
    }

    // Before each block: nothing survives from the one before.
    void poison() { std::memset(data_, kPoisonByte, bytes_); }

    // After each block: what was overwritten outside, or an empty string. (Under AddressSanitizer
    // the guard zones are poisoned and the access itself is reported.)
    std::string damage() const {
#ifndef __SANITIZE_ADDRESS__
        const unsigned char* const end = data_ + bytes_;
        if (!intact(end)) {
            size_t i = 0;
            while (end[i] == kGuardByte) ++i;
            return text("wrote past the end of its %zu bytes of shared memory, at +%zu", bytes_,
                        bytes_ + i);
        }
        if (!intact(data_ - kGuardBytes)) {
            size_t i = 1;
            while (*(data_ - i) == kGuardByte) ++i;
            return text("wrote before the start of its shared memory, at -%zu", i);
        }
#endif
        return {};
    }

    size_t bytes() const { return bytes_; }
    void* data() { return data_; }

  private:
    static constexpr size_t kGuardBytes = 16 * 1024;
    static constexpr unsigned char kGuardByte = 0xC5;
    static constexpr unsigned char kPoisonByte = 0xFF;  // Floats are NaN, integers are -1.

    // Each byte is the guard byte: the first is, and each equals the one before.
    static bool intact(const unsigned char* guard) {
        return guard[0] == kGuardByte && std::memcmp(guard, guard + 1, kGuardBytes - 1) == 0;
    }

    std::vector<unsigned char> storage_;
    unsigned char* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace lightvlm::emulation
