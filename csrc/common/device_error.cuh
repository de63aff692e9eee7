// The device side of common/error_word.h.
#pragma once

#include "common/error_word.h"
#include "common/launch.h"

namespace lightvlm {

// Integer OR: the word does not depend on the order of threads.
__device__ __forceinline__ void report_device_error(int32_t* word, int32_t bit) {
    if (word != nullptr) atomicOr(word, bit);
}

}  // namespace lightvlm
