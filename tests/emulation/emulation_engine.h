// The engine that runs a grid: one fiber a thread, blocks one after another. Implemented in
// emulation.cpp; docs/emulation.md says what it checks. Included through emulation.h only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "emulation_types.h"

namespace lightvlm::emulation {

// Where a barrier or collective stands in the source; lanes that meet must come from one place.
using Site = std::source_location;

inline constexpr unsigned kWarpLanes = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;
inline constexpr unsigned kMaxBlockThreads = 1024;
// What one block may opt in to on sm_90 (227 KiB); the real limit of a device may be lower.
inline constexpr size_t kMaxSharedBytes = 227 * 1024;
// Few, so that a grid sized to the device still makes its blocks loop.
inline constexpr int kMultiprocessors = 4;

// A warp-wide operation. Each lane of the mask hands in a pointer to its own payload; when the last
// lane has arrived, `combine` reads and writes all payloads at once (payloads[lane] is null for a
// lane outside the mask), and then all lanes go on.
struct WarpCollective {
    const char* name;
    void (*combine)(void* const payloads[kWarpLanes], unsigned mask);
};

// Waits for the lanes of `mask`. Different names or sites under one mask fail the launch.
void warp_collective(const WarpCollective& what, unsigned mask, void* payload, const Site& site);

// Waits for the whole block; returns how many of its threads gave a true predicate.
int block_barrier(const char* name, bool predicate, const Site& site);

// Lets other threads run (a spin loop must call it: fibers are not preempted).
void yield();

// In a shuffled run, now and then lets other threads run: atomics and fences call it.
void maybe_yield();

// Ends the launch with an error; does not return. Only from inside a kernel.
[[noreturn]] void fail(const std::string& message);

unsigned lane_index();

// The block's dynamic shared memory; fails the launch if it holds fewer than `bytes`.
void* shared_memory(size_t bytes, size_t alignment);

// cp.async: copies are queued by the lane and done when it waits for their group, as late as the
// hardware may, so that a missing wait shows. `bytes` are copied, the rest up to `total` zeroed.
void queue_copy(void* destination, const void* source, unsigned bytes, unsigned total);
void commit_copies();
void finish_copies(unsigned groups_left_pending);

// Runs `body(arguments)` once per thread of the grid.
cudaError_t run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                void* arguments);

// Grids that ran to their end under this kernel name since the last reset.
uint64_t launch_count(const std::string& name);
void reset_launch_counts();

// What went wrong in the latest launch that failed; empty if none did.
std::string last_error();

}  // namespace lightvlm::emulation
