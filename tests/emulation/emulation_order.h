// The order in which blocks, warps and lanes run, out of a seed. Included by emulation.cpp only.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <numeric>

#include "emulation_block.h"

namespace lightvlm::emulation {

// splitmix64 (Steele, Lea, Flood 2014): a full-period generator of one word of state.
struct Random {
    uint64_t state = 0;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
};

// start, start + step, ... modulo count: visits each number below count once, because step and
// count have no common factor. Seed 0: 0, 1, 2, ...
class BlockOrder {
  public:
    BlockOrder(uint64_t seed, uint64_t count) : count_(count) {
        if (seed == 0) return;
        Random random{seed};
        next_ = random.next() % count;
        do {
            step_ = 1 + random.next() % count;
        } while (std::gcd(step_, count) != 1);
    }

    uint64_t next() {
        const uint64_t number = next_;
        next_ = (next_ + step_) % count_;
        return number;
    }

  private:
    uint64_t count_;
    uint64_t next_ = 0;
    uint64_t step_ = 1;
};

// Who of a block runs next. Seed 0: the lowest warp, its lowest lane. Otherwise: any lane, of the
// warp that ran last with a chance that differs from block to block, so that warps both keep pace
// and run far ahead of others.
class ThreadOrder {
  public:
    void start(uint64_t seed, uint64_t block) {
        constexpr std::array<unsigned, 4> kStay = {0, 48, 60, 64};
        shuffled_ = seed != 0;
        random_.state = seed + block * 0xd1342543de82ef95ull;
        stay_ = kStay[random_.next() % kStay.size()];
        warp_ = 0;
    }

    // The number of a ready thread; at least one warp is ready.
    unsigned pick(const Block& block) {
        unsigned lane = 0;
        if (shuffled_) {
            const uint64_t dice = random_.next();
            const bool ready = (block.ready_warps >> warp_ & 1u) != 0;
            if (!ready || (dice & 63u) >= stay_) warp_ = choose_bit(block.ready_warps, dice >> 8);
            lane = choose_bit(block.warps[warp_].ready, dice >> 24);
        } else {
            warp_ = static_cast<unsigned>(std::countr_zero(block.ready_warps));
            lane = static_cast<unsigned>(std::countr_zero(block.warps[warp_].ready));
        }
        return warp_ * kWarpLanes + lane;
    }

    // Whether an atomic is a place to switch threads. In natural order one in 1024 is, only so that
    // spinning on an atomic ends.
    bool interrupts() { return shuffled_ ? random_.next() % 16 == 0 : ++random_.state % 1024 == 0; }

  private:
    // A set bit of `mask`, chosen by 16 bits of `dice`.
    static unsigned choose_bit(uint32_t mask, uint64_t dice) {
        const auto count = static_cast<unsigned>(std::popcount(mask));
        unsigned skip = (static_cast<unsigned>(dice & 0xffffu) * count) >> 16;
        for (; skip > 0; --skip) mask &= mask - 1;
        return static_cast<unsigned>(std::countr_zero(mask));
    }

    bool shuffled_ = false;
    Random random_;
    unsigned warp_ = 0;
    unsigned stay_ = 0;  // Of 64 turns, how many stay in the warp that ran last.
};

}  // namespace lightvlm::emulation
