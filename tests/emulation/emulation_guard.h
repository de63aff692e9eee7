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
        for (size_t i = 0; i < kGuardBytes; ++i) {
            if (data_[bytes_ + i] != kGuardByte) {
                return text("wrote past the end of its %zu bytes of shared memory, at +%zu", bytes_,
                            bytes_ + i);
            }
            if (*(data_ - 1 - i) != kGuardByte) {
                return text("wrote before the start of its shared memory, at -%zu", i + 1);
            }
        }
#endif
        return {};
    }

    size_t bytes() const { return bytes_; }
    void* data() { return data_; }

  private:
    static constexpr size_t kGuardBytes = 1024;
    static constexpr unsigned char kGuardByte = 0xC5;
    static constexpr unsigned char kPoisonByte = 0xFF;  // Floats are NaN, integers are -1.

    std::vector<unsigned char> storage_;
    unsigned char* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace lightvlm::emulation
