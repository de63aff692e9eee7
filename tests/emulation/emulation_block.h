// The state of the block that runs: who is ready, who waits where, who has exited. Included by
// emulation.cpp only.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "emulation_engine.h"
#include "emulation_fiber.h"

namespace lightvlm::emulation {

inline constexpr unsigned kMaxWarps = kMaxBlockThreads / kWarpLanes;

std::string text(const char* format, auto... values) {
    char buffer[1024];
    std::snprintf(buffer, sizeof(buffer), format, values...);
    return buffer;
}

inline std::string place(const Site& site) {
    return text("%s:%u", site.file_name(), static_cast<unsigned>(site.line()));
}

inline bool same_site(const Site& a, const Site& b) {
    return a.line() == b.line() && a.column() == b.column() &&
           std::strcmp(a.file_name(), b.file_name()) == 0;
}

// The cp.async copies that one thread has issued and that have not been waited for.
class PendingCopies {
  public:
    struct Copy {
        void* destination;
        const void* source;
        unsigned bytes;
        unsigned total;
    };

    void queue(const Copy& copy) { copies_.push_back(copy); }
    void commit() { group_ends_.push_back(copies_.size()); }

    // Does the copies of all but the `groups_left` latest groups.
    void finish(size_t groups_left) {
        if (group_ends_.size() <= groups_left) return;
        const auto groups = static_cast<ptrdiff_t>(group_ends_.size() - groups_left);
        const auto done = static_cast<ptrdiff_t>(group_ends_[groups - 1]);
        for (ptrdiff_t i = 0; i < done; ++i) {
            const Copy& copy = copies_[i];
            if (copy.bytes != 0) std::memcpy(copy.destination, copy.source, copy.bytes);
            std::memset(static_cast<char*>(copy.destination) + copy.bytes, 0,
                        copy.total - copy.bytes);
        }
        copies_.erase(copies_.begin(), copies_.begin() + done);
        group_ends_.erase(group_ends_.begin(), group_ends_.begin() + groups);
        for (size_t& end : group_ends_) end -= static_cast<size_t>(done);
    }

    void clear() {
        copies_.clear();
        group_ends_.clear();
    }

  private:
    std::vector<Copy> copies_;        // In the order of issue.
    std::vector<size_t> group_ends_;  // Where each committed group ends in copies_.
};

// One thread of the block. Fibers are reused from block to block.
struct Fiber {
    Context context;
    uint3 index{};
    unsigned warp = 0;
    unsigned lane = 0;
    PendingCopies copies;
};

// Lanes that have arrived at a collective under one mask.
struct Gathering {
    const WarpCollective* what = nullptr;
    Site site;
    uint32_t mask = 0;
    uint32_t arrived = 0;
    std::array<void*, kWarpLanes> payloads;
};

struct Warp {
    uint32_t population = 0;
    uint32_t ready = 0;
    uint32_t exited = 0;
    unsigned gathering_count = 0;
    std::array<Gathering, kWarpLanes> gatherings;
};

// Threads that have arrived at the block's barrier.
struct Barrier {
    const char* name = nullptr;
    Site site;
    unsigned first_thread = 0;
    unsigned arrived = 0;
    int true_predicates = 0;
    int result = 0;
    std::array<uint32_t, kMaxWarps> waiting{};
};

struct Block {
    const char* kernel = nullptr;
    unsigned threads = 0;
    unsigned exited = 0;
    uint32_t ready_warps = 0;
    std::array<Warp, kMaxWarps> warps;
    Barrier barrier;
    // Grows only and never moves what is there: contexts are pointed at. Thread t is fibers[t].
    std::deque<Fiber> fibers;

    unsigned warp_count() const { return (threads + kWarpLanes - 1) / kWarpLanes; }

    void start() {
        exited = 0;
        ready_warps = 0;
        barrier.arrived = 0;
        barrier.waiting.fill(0);
        for (unsigned w = 0; w < warp_count(); ++w) {
            const unsigned lanes = threads - w * kWarpLanes;
            Warp& warp = warps[w];
            warp.population = lanes >= kWarpLanes ? kFullMask : (1u << lanes) - 1;
            warp.ready = warp.population;
            warp.exited = 0;
            warp.gathering_count = 0;
            ready_warps |= 1u << w;
        }
    }

    void release(unsigned warp, uint32_t lanes) {
        warps[warp].ready |= lanes;
        ready_warps |= 1u << warp;
    }

    void hold(const Fiber& fiber) {
        Warp& warp = warps[fiber.warp];
        warp.ready &= ~(1u << fiber.lane);
        if (warp.ready == 0) ready_warps &= ~(1u << fiber.warp);
    }

    std::string name() const {
        return text("kernel '%s', block (%u,%u,%u): ", kernel, blockIdx.x, blockIdx.y, blockIdx.z);
    }

    std::string thread_name(unsigned thread) const {
        const uint3& index = fibers[thread].index;
        return text("thread (%u,%u,%u)", index.x, index.y, index.z);
    }

    // Why nobody can go on although somebody has not finished.
    std::string describe_deadlock() const;

  private:
    std::string describe_lane(unsigned warp_index, unsigned lane) const;
};

inline std::string Block::describe_lane(unsigned warp_index, unsigned lane) const {
    const Warp& warp = warps[warp_index];
    const uint32_t bit = 1u << lane;
    const std::string who = thread_name(warp_index * kWarpLanes + lane);
    if ((warp.exited & bit) != 0) return who + " exited";
    if ((barrier.waiting[warp_index] & bit) != 0) {
        return who + text(" waits at %s (%s)", barrier.name, place(barrier.site).c_str());
    }
    for (unsigned i = 0; i < warp.gathering_count; ++i) {
        const Gathering& gathering = warp.gatherings[i];
        if ((gathering.arrived & bit) == 0) continue;
        return who + text(" waits at %s (%s) with mask 0x%08x", gathering.what->name,
                          place(gathering.site).c_str(), gathering.mask);
    }
    return who + " runs";
}

inline std::string Block::describe_deadlock() const {
    for (unsigned w = 0; w < warp_count(); ++w) {
        if (warps[w].gathering_count == 0) continue;
        const Gathering& gathering = warps[w].gatherings[0];
        const uint32_t missing = gathering.mask & ~gathering.arrived;
        return text(
                   "missing lane: %s (%s) with mask 0x%08x in warp %u waits for lanes 0x%08x, of "
                   "whom ",
                   gathering.what->name, place(gathering.site).c_str(), gathering.mask, w,
                   missing) +
               describe_lane(w, static_cast<unsigned>(std::countr_zero(missing)));
    }
    for (unsigned w = 0; w < warp_count(); ++w) {
        const uint32_t missing = warps[w].population & ~barrier.waiting[w];
        if (missing == 0) continue;
        return text("divergent barrier: %u of %u threads wait at %s (%s), but ", barrier.arrived,
                    threads, barrier.name, place(barrier.site).c_str()) +
               describe_lane(w, static_cast<unsigned>(std::countr_zero(missing)));
    }
    return "deadlock";
}

}  // namespace lightvlm::emulation
