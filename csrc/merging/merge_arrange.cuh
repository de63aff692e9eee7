// Lists of who arrives where, ascending, without a sort: the place of a token is the number of
// tokens that go elsewhere lower, or to the same and come before. A warp counts one token's in
// ballots over all of them, 32 at a time.
//
// Bound     N / 32 steps of a warp for each of N tokens: a few microseconds for an image, against
//           N^2 C operations of the similarities before.
#pragma once

#include "common/block.cuh"

namespace lightvlm {

// Where a list begins, and how long it is.
struct __align__(8) ListSpan {
    int32_t begin;
    int32_t count;
};

constexpr uint32_t kGoesNowhere = 0xffffffffu;

struct ArrivalRank {
    int32_t less = 0;          // tokens that go to a lower one
    int32_t equal_before = 0;  // to the same, and stand before `position`
    int32_t equal = 0;         // to the same
};

// goes(i): where token i of n goes, or kGoesNowhere. Every lane of the warp calls it.
template <typename Goes>
__device__ __forceinline__ ArrivalRank rank_arrivals(int64_t n, uint32_t to, int64_t position,
                                                     const Goes& goes) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    ArrivalRank rank;
    for (int64_t base = 0; base < n; base += kWarpThreads) {
        const uint32_t other = base + lane < n ? goes(base + lane) : kGoesNowhere;
        const uint32_t same = __ballot_sync(kFullWarp, other == to);
        rank.less += __popc(__ballot_sync(kFullWarp, other < to));
        rank.equal += __popc(same);
        const int64_t before = position - base;
        const uint32_t mask = before >= kWarpThreads ? kFullWarp
                              : before > 0           ? (1u << before) - 1u
                                                     : 0u;
        rank.equal_before += __popc(same & mask);
    }
    return rank;
}

}  // namespace lightvlm
