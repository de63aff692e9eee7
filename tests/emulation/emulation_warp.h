// Barriers, shuffles, votes and warp reductions. Included through emulation.h only.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

#include "emulation_engine.h"

#define LIGHTVLM_SITE \
    const ::lightvlm::emulation::Site& site = ::lightvlm::emulation::Site::current()

// The lanes that happen to be converged are not something to rely on.
unsigned __activemask() = delete;

inline void __syncthreads(LIGHTVLM_SITE) {
    lightvlm::emulation::block_barrier("__syncthreads", false, site);
}

inline int __syncthreads_count(int predicate, LIGHTVLM_SITE) {
    return lightvlm::emulation::block_barrier("__syncthreads_count", predicate != 0, site);
}

inline int __syncthreads_or(int predicate, LIGHTVLM_SITE) {
    return lightvlm::emulation::block_barrier("__syncthreads_or", predicate != 0, site) != 0;
}

inline int __syncthreads_and(int predicate, LIGHTVLM_SITE) {
    return lightvlm::emulation::block_barrier("__syncthreads_and", predicate == 0, site) == 0;
}

inline void __syncwarp(unsigned mask = lightvlm::emulation::kFullMask, LIGHTVLM_SITE) {
    static constexpr lightvlm::emulation::WarpCollective kBarrier{"__syncwarp",
                                                                  [](void* const*, unsigned) {}};
    lightvlm::emulation::warp_collective(kBarrier, mask, nullptr, site);
}

namespace lightvlm::emulation {

struct ShufflePayload {
    uint64_t value;
    unsigned source;
    uint64_t result;
};

inline void combine_shuffle(void* const payloads[kWarpLanes], unsigned mask) {
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
        auto* own = static_cast<ShufflePayload*>(payloads[std::countr_zero(rest)]);
        const auto* from = static_cast<const ShufflePayload*>(payloads[own->source]);
        // The value of a lane outside the mask is undefined: all ones, a NaN.
        own->result = from != nullptr ? from->value : ~uint64_t{0};
    }
}

template <typename T>
T shuffle(const WarpCollective& what, unsigned mask, T value, unsigned source, const Site& site) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "CUDA shuffles 32- and 64-bit arithmetic types only");
    ShufflePayload payload{0, source, 0};
    std::memcpy(&payload.value, &value, sizeof(T));
    warp_collective(what, mask, &payload, site);
    std::memcpy(&value, &payload.result, sizeof(T));
    return value;
}

inline void check_shuffle_width(int width) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
        fail("shuffle width " + std::to_string(width) + " is not a power of two up to 32");
    }
}

}  // namespace lightvlm::emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, LIGHTVLM_SITE) {
    namespace em = lightvlm::emulation;
    static constexpr em::WarpCollective kShuffle{"__shfl_sync", em::combine_shuffle};
    em::check_shuffle_width(width);
    const unsigned segment = em::lane_index() & ~(width - 1u);
    return em::shuffle(kShuffle, mask, value, segment + (source & (width - 1u)), site);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, LIGHTVLM_SITE) {
    namespace em = lightvlm::emulation;
    static constexpr em::WarpCollective kShuffle{"__shfl_up_sync", em::combine_shuffle};
    em::check_shuffle_width(width);
    const unsigned lane = em::lane_index();
    const unsigned offset = lane & (width - 1u);
    return em::shuffle(kShuffle, mask, value, offset >= delta ? lane - delta : lane, site);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, LIGHTVLM_SITE) {
    namespace em = lightvlm::emulation;
    static constexpr em::WarpCollective kShuffle{"__shfl_down_sync", em::combine_shuffle};
    em::check_shuffle_width(width);
    const unsigned lane = em::lane_index();
    const unsigned after = width - 1u - (lane & (width - 1u));
    return em::shuffle(kShuffle, mask, value, delta <= after ? lane + delta : lane, site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, LIGHTVLM_SITE) {
    namespace em = lightvlm::emulation;
    static constexpr em::WarpCollective kShuffle{"__shfl_xor_sync", em::combine_shuffle};
    em::check_shuffle_width(width);
    const unsigned lane = em::lane_index();
    const unsigned last = lane | (width - 1u);
    const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
    return em::shuffle(kShuffle, mask, value, source <= last ? source : lane, site);
}

namespace lightvlm::emulation {

// Votes, matches and reductions: one 32- or 64-bit word in, one out.
struct WordPayload {
    uint64_t value;
    uint64_t result;
};

// Gives all lanes the fold of their values, from the lowest lane up.
template <typename Fold>
void combine_fold(void* const payloads[kWarpLanes], unsigned mask) {
    auto word = [&](unsigned lanes) {
        return static_cast<WordPayload*>(payloads[std::countr_zero(lanes)]);
    };
    uint64_t total = word(mask)->value;
    for (unsigned rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
        total = Fold{}(total, word(rest)->value);
    }
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) word(rest)->result = total;
}

inline void combine_match(void* const payloads[kWarpLanes], unsigned mask) {
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
        auto* own = static_cast<WordPayload*>(payloads[std::countr_zero(rest)]);
        own->result = 0;
        for (unsigned others = mask; others != 0; others &= others - 1) {
            const int lane = std::countr_zero(others);
            if (static_cast<const WordPayload*>(payloads[lane])->value == own->value) {
                own->result |= 1u << lane;
            }
        }
    }
}

inline uint64_t word_collective(const WarpCollective& what, unsigned mask, uint64_t value,
                                const Site& site) {
    WordPayload payload{value, 0};
    warp_collective(what, mask, &payload, site);
    return payload.result;
}

struct FoldOr {
    uint64_t operator()(uint64_t a, uint64_t b) const { return a | b; }
};
struct FoldAnd {
    uint64_t operator()(uint64_t a, uint64_t b) const { return a & b; }
};
struct FoldXor {
    uint64_t operator()(uint64_t a, uint64_t b) const { return a ^ b; }
};
struct FoldAdd {
    uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
template <typename T>
struct FoldMin {
    uint64_t operator()(uint64_t a, uint64_t b) const {
        return static_cast<T>(a) < static_cast<T>(b) ? a : b;
    }
};
template <typename T>
struct FoldMax {
    uint64_t operator()(uint64_t a, uint64_t b) const {
        return static_cast<T>(a) < static_cast<T>(b) ? b : a;
    }
};

inline unsigned vote(const WarpCollective& what, unsigned mask, int predicate, const Site& site) {
    const unsigned own = predicate != 0 ? 1u << lane_index() : 0u;
    return static_cast<unsigned>(word_collective(what, mask, own, site));
}

}  // namespace lightvlm::emulation

inline unsigned __ballot_sync(unsigned mask, int predicate, LIGHTVLM_SITE) {
    namespace em = lightvlm::emulation;
    static constexpr em::WarpCollective kVote{"__ballot_sync", em::combine_fold<em::FoldOr>};
    return em::vote(kVote, mask, predicate, site);
}

inline int __any_sync(unsigned mask, int predicate, LIGHTVLM_SITE) {
    namespace em = lightvlm::emulation;
    static constexpr em::WarpCollective kVote{"__any_sync", em::combine_fold<em::FoldOr>};
    return em::vote(kVote, mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, LIGHTVLM_SITE) {
    namespace em = lightvlm::emulation;
    static constexpr em::WarpCollective kVote{"__all_sync", em::combine_fold<em::FoldOr>};
    return em::vote(kVote, mask, predicate, site) == mask;
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, LIGHTVLM_SITE) {
    namespace em = lightvlm::emulation;
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "CUDA matches 32- and 64-bit arithmetic types only");
    static constexpr em::WarpCollective kMatch{"__match_any_sync", em::combine_match};
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    return static_cast<unsigned>(em::word_collective(kMatch, mask, word, site));
}

// __reduce_*_sync: 32-bit integers, sm_80 and up.
#define LIGHTVLM_WARP_REDUCTION(type, name, fold)                                       \
    inline type name(unsigned mask, type value, LIGHTVLM_SITE) {                        \
        namespace em = lightvlm::emulation;                                             \
        static constexpr em::WarpCollective kReduce{#name, em::combine_fold<em::fold>}; \
        const uint64_t word = static_cast<uint32_t>(value);                             \
        return static_cast<type>(em::word_collective(kReduce, mask, word, site));       \
    }
LIGHTVLM_WARP_REDUCTION(unsigned, __reduce_add_sync, FoldAdd)
LIGHTVLM_WARP_REDUCTION(unsigned, __reduce_min_sync, FoldMin<uint32_t>)
LIGHTVLM_WARP_REDUCTION(unsigned, __reduce_max_sync, FoldMax<uint32_t>)
LIGHTVLM_WARP_REDUCTION(int, __reduce_add_sync, FoldAdd)
LIGHTVLM_WARP_REDUCTION(int, __reduce_min_sync, FoldMin<int32_t>)
LIGHTVLM_WARP_REDUCTION(int, __reduce_max_sync, FoldMax<int32_t>)
LIGHTVLM_WARP_REDUCTION(unsigned, __reduce_and_sync, FoldAnd)
LIGHTVLM_WARP_REDUCTION(unsigned, __reduce_or_sync, FoldOr)
LIGHTVLM_WARP_REDUCTION(unsigned, __reduce_xor_sync, FoldXor)
#undef LIGHTVLM_WARP_REDUCTION
#undef LIGHTVLM_SITE
