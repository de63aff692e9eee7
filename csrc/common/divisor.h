// Division of non-negative int32 by a divisor that is not known when compiling: one wide multiply
// and a shift.
//
// With s = ceil(log2 d) and m = ceil(2^(31 + s) / d), n / d = (n * m) >> (31 + s) for 0 <= n <
// 2^31: m exceeds the exact quotient by e / d with e < d <= 2^s, so the result exceeds n / d by n *
// e / (d * 2^(31 + s)) < 1 / d, which never reaches the next integer. m needs at most 32 bits.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace lightvlm {

struct Divisor {
    int32_t divisor = 1;
    uint32_t multiplier = 1u << 31;
    int32_t shift = 31;

    Divisor() = default;
    explicit Divisor(int32_t d) : divisor(d) {
        int32_t bits = 0;
        while ((int64_t{1} << bits) < d) ++bits;
        shift = 31 + bits;
        const uint64_t power = uint64_t{1} << shift;
        multiplier = static_cast<uint32_t>((power + d - 1) / d);
    }

    LIGHTVLM_HOST_DEVICE int32_t quotient(int32_t n) const {
        const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier;
        return static_cast<int32_t>(product >> shift);
    }
    LIGHTVLM_HOST_DEVICE int32_t remainder(int32_t n) const { return n - quotient(n) * divisor; }
};

}  // namespace lightvlm
