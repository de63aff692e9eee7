// The engine behind emulation.h: fibers, barriers, warp collectives, shared memory with guards.
#include "emulation.h"

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "fiber.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace lightvlm::emulation {
namespace {

constexpr unsigned kMaxWarps = kMaxBlockThreads / kWarpLanes;
constexpr size_t kGuardBytes = 1024;
constexpr unsigned char kGuardByte = 0xC5;
constexpr unsigned char kPoisonByte = 0xFF;  // Floats that read it are NaN, integers are -1.
constexpr size_t kSharedAlignment = 128;

std::string text(const char* format, auto... values) {
    char buffer[512];
    std::snprintf(buffer, sizeof(buffer), format, values...);
    return buffer;
}

std::string place(const Site& site) {
    return text("%s:%u", site.file_name(), static_cast<unsigned>(site.line()));
}

bool same_site(const Site& a, const Site& b) {
    return a.line() == b.line() && a.column() == b.column() &&
           std::strcmp(a.file_name(), b.file_name()) == 0;
}

// splitmix64 (Steele, Lea, Flood 2014): a full-period generator of one word of state.
struct Random {
    uint64_t state = 0;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    unsigned below(unsigned limit) {
        return static_cast<unsigned>(((next() & 0xffffffffu) * limit) >> 32);
    }
};

unsigned nth_set_bit(uint32_t mask, unsigned n) {
    for (; n > 0; --n) mask &= mask - 1;
    return static_cast<unsigned>(std::countr_zero(mask));
}

struct PendingCopy {
    void* destination;
    const void* source;
    unsigned bytes;
    unsigned total;
};

struct Fiber {
    Context context;
    uint3 index{};
    unsigned warp = 0;
    unsigned lane = 0;
    // cp.async: copies in issue order, and where each committed group ends in them.
    std::vector<PendingCopy> copies;
    std::vector<size_t> copy_groups;
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

struct Barrier {
    const char* name = nullptr;
    Site site;
    unsigned first_thread = 0;
    unsigned arrived = 0;
    int true_predicates = 0;
    int result = 0;
    std::array<uint32_t, kMaxWarps> waiting{};
};

struct LaunchFailure : std::exception {};

class Engine {
  public:
    void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
             void* arguments, uint64_t seed);

    void collective(const WarpCollective& what, unsigned mask, void* payload, const Site& site);
    int barrier(const char* name, bool predicate, const Site& site);
    void yield();
    void maybe_yield();
    [[noreturn]] void fail(const std::string& message);
    void* shared(size_t bytes, size_t alignment);
    Fiber& current() { return *current_; }

    std::string error;

  private:
    static void fiber_main() noexcept;
    void prepare_fibers(unsigned count, dim3 block);
    void prepare_shared(size_t bytes);
    void run_block();
    void check_guards();
    void schedule();
    Fiber* pick();
    void wait();
    void release(Warp& warp, unsigned warp_index, uint32_t lanes);
    std::string describe_deadlock() const;
    std::string describe_lane(unsigned warp_index, unsigned lane) const;
    std::string header() const;
    unsigned thread_number(const Fiber& fiber) const {
        return fiber.warp * kWarpLanes + fiber.lane;
    }
    std::string thread_name(unsigned number) const;

    const char* name_ = nullptr;
    void (*body_)(void*) = nullptr;
    void* arguments_ = nullptr;
    unsigned threads_ = 0;
    unsigned exited_ = 0;
    size_t shared_bytes_ = 0;
    unsigned char* shared_ = nullptr;

    Context launcher_;
    Fiber* current_ = nullptr;
    // Grows only, and never moves what is there: contexts are pointed at.
    std::deque<Fiber> fibers_;
    std::deque<Stack> stacks_;
    unsigned fresh_ = 0;  // Fibers from here on must be prepared anew before they run.

    bool shuffled_ = false;
    unsigned stay_in_warp_ = 0;
    Random random_;
    uint32_t ready_warps_ = 0;
    unsigned running_warp_ = 0;
    uint64_t idle_turns_ = 0;
    std::chrono::steady_clock::time_point idle_since_;
    std::chrono::duration<double> timeout_{20.0};

    std::array<Warp, kMaxWarps> warps_;
    Barrier barrier_;
    std::vector<unsigned char> shared_storage_;
};

Engine engine;

// ---------------------------------------------------------------------------------------------
// Fibers and scheduling
// ---------------------------------------------------------------------------------------------

void Engine::fiber_main() noexcept {
    switched_in(engine.current_->context);
    for (;;) {
        bool threw = true;
        try {
            engine.body_(engine.arguments_);
            threw = false;
        } catch (...) {
            // Left before the fiber is: the handler's state belongs to the OS thread.
        }
        if (threw) engine.fail("threw a C++ exception");
        Fiber& self = *engine.current_;
        self.copies.clear();
        self.copy_groups.clear();
        engine.warps_[self.warp].exited |= 1u << self.lane;
        ++engine.exited_;
        engine.idle_turns_ = 0;
        engine.wait();
    }
}

// Picks who runs next. Natural order (seed 0): lowest warp, lowest lane. Shuffled: random lanes; a
// warp runs on with a chance that differs from block to block, so that both lock-step and warps
// that run far ahead of others occur.
Fiber* Engine::pick() {
    if (ready_warps_ == 0) return nullptr;
    unsigned lane = 0;
    if (!shuffled_) {
        running_warp_ = static_cast<unsigned>(std::countr_zero(ready_warps_));
        lane = static_cast<unsigned>(std::countr_zero(warps_[running_warp_].ready));
    } else {
        const uint64_t dice = random_.next();
        const bool stay = (ready_warps_ >> running_warp_ & 1u) != 0 && (dice & 63u) < stay_in_warp_;
        if (!stay) {
            const auto count = static_cast<uint64_t>(std::popcount(ready_warps_));
            running_warp_ = nth_set_bit(ready_warps_, ((dice >> 8 & 0xffffu) * count) >> 16);
        }
        const uint32_t ready = warps_[running_warp_].ready;
        const auto count = static_cast<uint64_t>(std::popcount(ready));
        lane = nth_set_bit(ready, ((dice >> 32 & 0xffffu) * count) >> 16);
    }
    return &fibers_[running_warp_ * kWarpLanes + lane];
}

// Switches to the next ready fiber, or to the launcher if none is.
void Engine::schedule() {
    Fiber* next = pick();
    Fiber* self = current_;
    if (next == self) return;
    if (next == nullptr) {
        switch_context(self->context, launcher_);
    } else {
        current_ = next;
        threadIdx = next->index;
        switch_context(self->context, next->context);
    }
}

// Takes the running fiber off the ready ones and runs others until it is released.
void Engine::wait() {
    Warp& warp = warps_[current_->warp];
    warp.ready &= ~(1u << current_->lane);
    if (warp.ready == 0) ready_warps_ &= ~(1u << current_->warp);
    schedule();
}

void Engine::release(Warp& warp, unsigned warp_index, uint32_t lanes) {
    warp.ready |= lanes;
    ready_warps_ |= 1u << warp_index;
    idle_turns_ = 0;
}

void Engine::yield() {
    constexpr uint64_t kTurnsPerLook = 1 << 16;
    if (++idle_turns_ % kTurnsPerLook == 0) {
        const auto now = std::chrono::steady_clock::now();
        if (idle_turns_ == kTurnsPerLook) {
            idle_since_ = now;
        } else if (now - idle_since_ > timeout_) {
            fail(
                text("no thread reached a barrier or its end for %.3g s: a spin loop waits for "
                     "something that does not come",
                     timeout_.count()));
        }
    }
    schedule();
}

void Engine::maybe_yield() {
    constexpr unsigned kShuffledChance = 16;
    constexpr unsigned kNaturalPeriod = 1024;  // Only so that a spin on an atomic ends.
    static unsigned calls = 0;
    if (shuffled_ ? random_.below(kShuffledChance) == 0 : ++calls % kNaturalPeriod == 0) yield();
}

void Engine::fail(const std::string& message) {
    error = header() + message;
    fresh_ = 0;
    switch_context(current_->context, launcher_);
    std::abort();  // The launcher never switches back to a fiber of a failed block.
}

// ---------------------------------------------------------------------------------------------
// Barriers and collectives
// ---------------------------------------------------------------------------------------------

void Engine::collective(const WarpCollective& what, unsigned mask, void* payload,
                        const Site& site) {
    Fiber& self = *current_;
    Warp& warp = warps_[self.warp];
    const uint32_t own = 1u << self.lane;
    if ((mask & own) == 0) {
        fail(text("%s at %s: lane %u of warp %u is not in its own mask 0x%08x", what.name,
                  place(site).c_str(), self.lane, self.warp, mask));
    }
    if ((mask & ~warp.population) != 0) {
        fail(text("%s at %s: mask 0x%08x names lanes 0x%08x that warp %u does not have", what.name,
                  place(site).c_str(), mask, mask & ~warp.population, self.warp));
    }
    unsigned slot = 0;
    while (slot < warp.gathering_count && warp.gatherings[slot].mask != mask) ++slot;
    Gathering& gathering = warp.gatherings[slot];
    if (slot == warp.gathering_count) {
        ++warp.gathering_count;
        gathering.what = &what;
        gathering.site = site;
        gathering.mask = mask;
        gathering.arrived = 0;
        if (mask != kFullMask) gathering.payloads.fill(nullptr);
    } else if (gathering.what->name != what.name || !same_site(gathering.site, site)) {
        fail(
            text("divergent warp %u: lane %u arrived at %s (%s), lanes 0x%08x wait at %s (%s), all "
                 "with mask 0x%08x",
                 self.warp, self.lane, what.name, place(site).c_str(), gathering.arrived,
                 gathering.what->name, place(gathering.site).c_str(), mask));
    }
    gathering.payloads[self.lane] = payload;
    gathering.arrived |= own;
    if (gathering.arrived != mask) {
        wait();
        return;
    }
    what.combine(gathering.payloads.data(), mask);
    --warp.gathering_count;
    if (slot != warp.gathering_count) gathering = warp.gatherings[warp.gathering_count];
    release(warp, self.warp, mask);
}

int Engine::barrier(const char* name, bool predicate, const Site& site) {
    Fiber& self = *current_;
    if (barrier_.arrived == 0) {
        barrier_.name = name;
        barrier_.site = site;
        barrier_.first_thread = thread_number(self);
        barrier_.true_predicates = 0;
    } else if (barrier_.name != name || !same_site(barrier_.site, site)) {
        fail(text("divergent barrier: %s arrived at %s (%s), but %s waits at %s (%s)",
                  thread_name(thread_number(self)).c_str(), name, place(site).c_str(),
                  thread_name(barrier_.first_thread).c_str(), barrier_.name,
                  place(barrier_.site).c_str()));
    }
    barrier_.true_predicates += predicate ? 1 : 0;
    if (++barrier_.arrived != threads_) {
        barrier_.waiting[self.warp] |= 1u << self.lane;
        wait();
        return barrier_.result;
    }
    barrier_.result = barrier_.true_predicates;
    barrier_.arrived = 0;
    for (unsigned w = 0; w * kWarpLanes < threads_; ++w) {
        barrier_.waiting[w] = 0;
        release(warps_[w], w, warps_[w].population);
    }
    return barrier_.result;
}

std::string Engine::describe_lane(unsigned warp_index, unsigned lane) const {
    const Warp& warp = warps_[warp_index];
    const uint32_t bit = 1u << lane;
    const std::string who = thread_name(warp_index * kWarpLanes + lane);
    if ((warp.exited & bit) != 0) return who + " exited";
    if ((barrier_.waiting[warp_index] & bit) != 0) {
        return who + text(" waits at %s (%s)", barrier_.name, place(barrier_.site).c_str());
    }
    for (unsigned i = 0; i < warp.gathering_count; ++i) {
        const Gathering& gathering = warp.gatherings[i];
        if ((gathering.arrived & bit) != 0) {
            return who + text(" waits at %s (%s) with mask 0x%08x", gathering.what->name,
                              place(gathering.site).c_str(), gathering.mask);
        }
    }
    return who + " runs";
}

// Why nobody can go on although somebody has not finished.
std::string Engine::describe_deadlock() const {
    const unsigned warp_count = (threads_ + kWarpLanes - 1) / kWarpLanes;
    for (unsigned w = 0; w < warp_count; ++w) {
        if (warps_[w].gathering_count == 0) continue;
        const Gathering& gathering = warps_[w].gatherings[0];
        const uint32_t missing = gathering.mask & ~gathering.arrived;
        const auto first = static_cast<unsigned>(std::countr_zero(missing));
        return text("missing lane: %s (%s) with mask 0x%08x in warp %u waits for lanes 0x%08x: ",
                    gathering.what->name, place(gathering.site).c_str(), gathering.mask, w,
                    missing) +
               describe_lane(w, first);
    }
    for (unsigned w = 0; w < warp_count; ++w) {
        const uint32_t missing = warps_[w].population & ~barrier_.waiting[w];
        if (missing == 0) continue;
        return text("divergent barrier: %u of %u threads wait at %s (%s), but ", barrier_.arrived,
                    threads_, barrier_.name, place(barrier_.site).c_str()) +
               describe_lane(w, static_cast<unsigned>(std::countr_zero(missing)));
    }
    return "deadlock";
}

std::string Engine::thread_name(unsigned number) const {
    const uint3& index = fibers_[number].index;
    return text("thread (%u,%u,%u)", index.x, index.y, index.z);
}

std::string Engine::header() const {
    return text("kernel '%s', block (%u,%u,%u): ", name_, blockIdx.x, blockIdx.y, blockIdx.z);
}

// ---------------------------------------------------------------------------------------------
// Shared memory
// ---------------------------------------------------------------------------------------------

void Engine::prepare_shared(size_t bytes) {
    if (shared_storage_.empty()) {
        shared_storage_.resize(kMaxSharedBytes + 2 * kGuardBytes + 2 * kSharedAlignment);
    }
    // On 128 bytes but not on more: relying on more than the launch promises should show.
    auto address = reinterpret_cast<uintptr_t>(shared_storage_.data()) + kGuardBytes;
    address = (address + 2 * kSharedAlignment - 1) / (2 * kSharedAlignment) * 2 * kSharedAlignment;
    if (address - reinterpret_cast<uintptr_t>(shared_storage_.data()) >=
        kGuardBytes + kSharedAlignment) {
        address -= kSharedAlignment;
    } else {
        address += kSharedAlignment;
    }
    shared_ = reinterpret_cast<unsigned char*>(address);
    shared_bytes_ = bytes;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(shared_storage_.data(), shared_storage_.size());
    unsigned char* const end = shared_storage_.data() + shared_storage_.size();
    __asan_poison_memory_region(shared_storage_.data(), shared_ - shared_storage_.data());
    __asan_poison_memory_region(shared_ + bytes, end - (shared_ + bytes));
#else
    std::memset(shared_ - kGuardBytes, kGuardByte, kGuardBytes);
    std::memset(shared_ + bytes, kGuardByte, kGuardBytes);
#endif
}

void* Engine::shared(size_t bytes, size_t alignment) {
    if (bytes > shared_bytes_) {
        fail(text("shared_memory<T>() needs %zu bytes, the launch gave %zu", bytes, shared_bytes_));
    }
    if (alignment > kSharedAlignment) {
        fail(text("shared_memory<T>() needs alignment %zu, the limit is %zu", alignment,
                  kSharedAlignment));
    }
    return shared_;
}

void Engine::check_guards() {
#ifndef __SANITIZE_ADDRESS__
    for (size_t i = 0; i < kGuardBytes; ++i) {
        if (shared_[shared_bytes_ + i] != kGuardByte) {
            error = header() + text("wrote past the end of its %zu bytes of shared memory, at +%zu",
                                    shared_bytes_, shared_bytes_ + i);
            throw LaunchFailure();
        }
        if (*(shared_ - 1 - i) != kGuardByte) {
            error = header() + text("wrote before the start of its shared memory, at -%zu", i + 1);
            throw LaunchFailure();
        }
    }
#endif
}

// ---------------------------------------------------------------------------------------------
// Blocks and launches
// ---------------------------------------------------------------------------------------------

void Engine::prepare_fibers(unsigned count, dim3 block) {
    constexpr size_t kStaggerStep = 320;
    constexpr size_t kStaggers = 48;
    while (fibers_.size() < count) {
        fibers_.emplace_back();
        stacks_.emplace_back();
    }
    for (; fresh_ < count; ++fresh_) {
        Fiber& fiber = fibers_[fresh_];
        stacks_[fresh_].prepare(fiber.context, fiber_main, fresh_ % kStaggers * kStaggerStep);
        fiber.warp = fresh_ / kWarpLanes;
        fiber.lane = fresh_ % kWarpLanes;
        fiber.copies.clear();
        fiber.copy_groups.clear();
    }
    for (unsigned i = 0; i < count; ++i) {
        fibers_[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    }
}

void Engine::run_block() {
    exited_ = 0;
    idle_turns_ = 0;
    barrier_.arrived = 0;
    ready_warps_ = 0;
    const unsigned warp_count = (threads_ + kWarpLanes - 1) / kWarpLanes;
    for (unsigned w = 0; w < warp_count; ++w) {
        const unsigned lanes = std::min(kWarpLanes, threads_ - w * kWarpLanes);
        warps_[w].population = lanes == kWarpLanes ? kFullMask : (1u << lanes) - 1;
        warps_[w].ready = warps_[w].population;
        warps_[w].exited = 0;
        warps_[w].gathering_count = 0;
        barrier_.waiting[w] = 0;
        ready_warps_ |= 1u << w;
    }
    std::memset(shared_, kPoisonByte, shared_bytes_);
    running_warp_ = 0;
    current_ = pick();
    threadIdx = current_->index;
    switch_context(launcher_, current_->context);
    if (error.empty() && exited_ != threads_) {
        error = header() + describe_deadlock();
        fresh_ = 0;
    }
    if (!error.empty()) throw LaunchFailure();
    check_guards();
}

void Engine::run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                 void* arguments, uint64_t seed) {
    name_ = name;
    body_ = body;
    arguments_ = arguments;
    threads_ = block.x * block.y * block.z;
    shuffled_ = seed != 0;
    error.clear();
    blockDim = block;
    gridDim = grid;
    if (const char* seconds = std::getenv("LIGHTVLM_EMULATION_TIMEOUT")) {
        timeout_ = std::chrono::duration<double>(std::strtod(seconds, nullptr));
    }
    prepare_fibers(threads_, block);
    prepare_shared(shared_bytes);

    // Block i of the order is (start + i * step) mod count: a permutation, as step and count have
    // no common factor.
    const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
    uint64_t start = 0;
    uint64_t step = 1;
    Random order{seed};
    if (shuffled_) {
        start = order.next() % count;
        do {
            step = 1 + order.next() % count;
        } while (std::gcd(step, count) != 1);
    }
    uint64_t linear = start;
    for (uint64_t i = 0; i < count; ++i) {
        blockIdx.x = static_cast<unsigned>(linear % grid.x);
        blockIdx.y = static_cast<unsigned>(linear / grid.x % grid.y);
        blockIdx.z = static_cast<unsigned>(linear / (uint64_t{grid.x} * grid.y));
        random_.state = seed + linear * 0xd1342543de82ef95ull;
        constexpr std::array<unsigned, 4> kStay = {0, 48, 60, 64};  // of 64
        stay_in_warp_ = kStay[random_.next() % kStay.size()];
        run_block();
        linear = (linear + step) % count;
    }
}

std::mutex launch_mutex;
std::map<std::string, uint64_t> launch_counts;
std::string last_failure;

uint64_t seed_from_environment() {
    constexpr uint64_t kDefaultSeed = 1;
    const char* value = std::getenv("LIGHTVLM_EMULATION_SEED");
    return value != nullptr && *value != '\0' ? std::strtoull(value, nullptr, 10) : kDefaultSeed;
}

}  // namespace

void warp_collective(const WarpCollective& what, unsigned mask, void* payload, const Site& site) {
    engine.collective(what, mask, payload, site);
}

int block_barrier(const char* name, bool predicate, const Site& site) {
    return engine.barrier(name, predicate, site);
}

void yield() { engine.yield(); }
void maybe_yield() { engine.maybe_yield(); }
void fail(const std::string& message) { engine.fail(message); }
unsigned lane_index() { return engine.current().lane; }
void* shared_memory(size_t bytes, size_t alignment) { return engine.shared(bytes, alignment); }

void queue_copy(void* destination, const void* source, unsigned bytes, unsigned total) {
    engine.current().copies.push_back({destination, source, bytes, total});
}

void commit_copies() {
    Fiber& self = engine.current();
    self.copy_groups.push_back(self.copies.size());
}

void finish_copies(unsigned groups_left_pending) {
    Fiber& self = engine.current();
    const size_t committed = self.copy_groups.size();
    if (committed <= groups_left_pending) return;
    const size_t groups = committed - groups_left_pending;
    const size_t finished = self.copy_groups[groups - 1];
    for (size_t i = 0; i < finished; ++i) {
        const PendingCopy& copy = self.copies[i];
        std::memcpy(copy.destination, copy.source, copy.bytes);
        std::memset(static_cast<char*>(copy.destination) + copy.bytes, 0, copy.total - copy.bytes);
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + finished);
    self.copy_groups.erase(self.copy_groups.begin(), self.copy_groups.begin() + groups);
    for (size_t& end : self.copy_groups) end -= finished;
}

cudaError_t run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                void* arguments) {
    const std::lock_guard lock(launch_mutex);
    try {
        engine.run(name, grid, block, shared_bytes, body, arguments, seed_from_environment());
    } catch (const LaunchFailure&) {
        last_failure = engine.error;
        return cudaErrorLaunchFailure;
    }
    ++launch_counts[name];
    return cudaSuccess;
}

uint64_t launch_count(const std::string& name) {
    const std::lock_guard lock(launch_mutex);
    const auto found = launch_counts.find(name);
    return found != launch_counts.end() ? found->second : 0;
}

void reset_launch_counts() {
    const std::lock_guard lock(launch_mutex);
    launch_counts.clear();
}

std::string last_error() {
    const std::lock_guard lock(launch_mutex);
    return last_failure;
}

}  // namespace lightvlm::emulation

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorLaunchFailure: {
            // Valid until this thread asks again.
            static thread_local std::string message;
            message = lightvlm::emulation::last_error();
            return message.c_str();
        }
    }
    return "unrecognized error code";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = lightvlm::emulation::kMultiprocessors;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = static_cast<int>(lightvlm::emulation::kMaxSharedBytes);
            return cudaSuccess;
    }
    return cudaErrorInvalidValue;
}

// For Python, through ctypes.
extern "C" {
__attribute__((visibility("default"))) uint64_t lightvlm_emulation_launch_count(const char* name) {
    return lightvlm::emulation::launch_count(name);
}
__attribute__((visibility("default"))) void lightvlm_emulation_reset_launch_counts() {
    lightvlm::emulation::reset_launch_counts();
}
__attribute__((visibility("default"))) const char* lightvlm_emulation_last_error() {
    return cudaGetErrorString(cudaErrorLaunchFailure);
}
}
