// The engine behind emulation.h: schedules the fibers of a block, lets them meet at barriers and
// collectives, runs the blocks of a grid one after another.
#include "emulation.h"

#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <string>

#include "emulation_block.h"
#include "emulation_fiber.h"
#include "emulation_guard.h"
#include "emulation_order.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace lightvlm::emulation {
namespace {

// What ends a launch; thrown on the launching thread, never across a fiber.
struct LaunchFailure : std::exception {};

class Engine {
  public:
    void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
             void* arguments);

    // Called by the running fiber.
    void collective(const WarpCollective& what, unsigned mask, void* payload, const Site& site);
    int barrier(const char* name, bool predicate, const Site& site);
    void yield();
    void maybe_yield();
    [[noreturn]] void fail(const std::string& message);
    void* shared(size_t bytes, size_t alignment);
    Fiber& current() { return *current_; }

    const std::string& error() const { return error_; }

  private:
    static void fiber_main() noexcept;
    void prepare_fibers(unsigned count, dim3 shape);
    void run_block();
    void schedule();
    void wait();
    template <typename Number>
    Number from_environment(const char* variable, Number fallback);

    void (*body_)(void*) = nullptr;
    void* arguments_ = nullptr;
    std::string error_;

    Context launcher_;
    Fiber* current_ = nullptr;
    Block block_;
    std::deque<Stack> stacks_;
    unsigned prepared_ = 0;  // Fibers from here on must be prepared before they run.
    GuardedMemory shared_;

    ThreadOrder order_;
    uint64_t idle_turns_ = 0;
    std::chrono::steady_clock::time_point idle_since_;
    std::chrono::duration<double> timeout_{};
};

Engine engine;

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
        engine.block_.warps[self.warp].exited |= 1u << self.lane;
        ++engine.block_.exited;
        engine.idle_turns_ = 0;
        engine.wait();
    }
}

// Switches to the next ready fiber, or to the launcher if there is none.
void Engine::schedule() {
    Fiber* const self = current_;
    if (block_.ready_warps == 0) {
        switch_context(self->context, launcher_);
        return;
    }
    Fiber* const next = &block_.fibers[order_.pick(block_)];
    if (next == self) return;
    current_ = next;
    threadIdx = next->index;
    switch_context(self->context, next->context);
}

// Runs others until somebody releases the running fiber.
void Engine::wait() {
    block_.hold(*current_);
    schedule();
}

void Engine::yield() {
    constexpr uint64_t kTurnsPerLook = 1 << 16;
    if (++idle_turns_ % kTurnsPerLook == 0) {
        const auto now = std::chrono::steady_clock::now();
        if (idle_turns_ == kTurnsPerLook) {
            idle_since_ = now;
        } else if (now - idle_since_ > timeout_) {
            fail(
                text("no thread reached a barrier or its end for %g s: a spin loop waits for "
                     "what does not come",
                     timeout_.count()));
        }
    }
    schedule();
}

void Engine::maybe_yield() {
    if (order_.interrupts()) yield();
}

void Engine::fail(const std::string& message) {
    error_ = block_.name() + message;
    switch_context(current_->context, launcher_);
    std::abort();  // Unreachable: nobody switches back into a block that failed.
}

void Engine::collective(const WarpCollective& what, unsigned mask, void* payload,
                        const Site& site) {
    const Fiber& self = *current_;
    Warp& warp = block_.warps[self.warp];
    const uint32_t own = 1u << self.lane;
    if ((mask & own) == 0) {
        fail(text("%s (%s): lane %u of warp %u is not in its own mask 0x%08x", what.name,
                  place(site).c_str(), self.lane, self.warp, mask));
    }
    if ((mask & ~warp.population) != 0) {
        fail(text("missing lane: %s (%s) with mask 0x%08x, but warp %u has no lanes 0x%08x",
                  what.name, place(site).c_str(), mask, self.warp, mask & ~warp.population));
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
        gathering.payloads.fill(nullptr);
    } else if (gathering.what->name != what.name || !same_site(gathering.site, site)) {
        fail(
            text("divergent warp %u: lane %u arrived at %s (%s), lanes 0x%08x wait at %s (%s), "
                 "all with mask 0x%08x",
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
    block_.release(self.warp, mask);
    idle_turns_ = 0;
}

int Engine::barrier(const char* name, bool predicate, const Site& site) {
    const Fiber& self = *current_;
    Barrier& barrier = block_.barrier;
    const unsigned thread = self.warp * kWarpLanes + self.lane;
    if (barrier.arrived == 0) {
        barrier.name = name;
        barrier.site = site;
        barrier.first_thread = thread;
        barrier.true_predicates = 0;
    } else if (barrier.name != name || !same_site(barrier.site, site)) {
        fail(text("divergent barrier: %s arrived at %s (%s), but %s waits at %s (%s)",
                  block_.thread_name(thread).c_str(), name, place(site).c_str(),
                  block_.thread_name(barrier.first_thread).c_str(), barrier.name,
                  place(barrier.site).c_str()));
    }
    barrier.true_predicates += predicate ? 1 : 0;
    if (++barrier.arrived != block_.threads) {
        barrier.waiting[self.warp] |= 1u << self.lane;
        wait();
        return barrier.result;
    }
    barrier.result = barrier.true_predicates;
    barrier.arrived = 0;
    barrier.waiting.fill(0);
    for (unsigned w = 0; w < block_.warp_count(); ++w) {
        block_.release(w, block_.warps[w].population);
    }
    idle_turns_ = 0;
    return barrier.result;
}

void* Engine::shared(size_t bytes, size_t alignment) {
    if (bytes > shared_.bytes()) {
        fail(text("shared_memory<T>() needs %zu bytes, the launch gave %zu", bytes,
                  shared_.bytes()));
    }
    if (alignment > GuardedMemory::kAlignment) {
        fail(text("shared_memory<T>() needs alignment %zu, the limit is %zu", alignment,
                  GuardedMemory::kAlignment));
    }
    return shared_.data();
}

template <typename Number>
Number Engine::from_environment(const char* variable, Number fallback) {
    const char* value = std::getenv(variable);
    if (value == nullptr) return fallback;
    const char* const end = value + std::strlen(value);
    Number number{};
    const auto parsed = std::from_chars(value, end, number);
    if (parsed.ec != std::errc() || parsed.ptr != end) {
        error_ = text("%s: got '%s', wants a number", variable, value);
        throw LaunchFailure();
    }
    return number;
}

void Engine::prepare_fibers(unsigned count, dim3 shape) {
    constexpr size_t kStaggerBytes = 320;
    constexpr size_t kStaggers = 48;
    while (stacks_.size() < count) {
        stacks_.emplace_back();
        block_.fibers.emplace_back();
    }
    for (; prepared_ < count; ++prepared_) {
        Fiber& fiber = block_.fibers[prepared_];
        stacks_[prepared_].prepare(fiber.context, fiber_main,
                                   prepared_ % kStaggers * kStaggerBytes);
        fiber.warp = prepared_ / kWarpLanes;
        fiber.lane = prepared_ % kWarpLanes;
        fiber.copies.clear();
    }
    for (unsigned i = 0; i < count; ++i) {
        block_.fibers[i].index = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
    }
}

void Engine::run_block() {
    block_.start();
    shared_.poison();
    idle_turns_ = 0;
    current_ = &block_.fibers[order_.pick(block_)];
    threadIdx = current_->index;
    switch_context(launcher_, current_->context);
    if (error_.empty() && block_.exited != block_.threads) {
        error_ = block_.name() + block_.describe_deadlock();
    }
    if (!error_.empty()) {
        prepared_ = 0;  // The fibers stand somewhere inside the kernel.
        throw LaunchFailure();
    }
    const std::string damage = shared_.damage();
    if (!damage.empty()) {
        error_ = block_.name() + damage;
        throw LaunchFailure();
    }
}

void Engine::run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                 void* arguments) {
    error_.clear();
    const auto seed = from_environment<uint64_t>("LIGHTVLM_EMULATION_SEED", 1);
    timeout_ =
        std::chrono::duration<double>(from_environment<double>("LIGHTVLM_EMULATION_TIMEOUT", 20.0));
    body_ = body;
    arguments_ = arguments;
    blockDim = block;
    gridDim = grid;
    block_.kernel = name;
    block_.threads = block.x * block.y * block.z;
    prepare_fibers(block_.threads, block);
    shared_.prepare(shared_bytes);

    const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
    BlockOrder blocks(seed, count);
    for (uint64_t i = 0; i < count; ++i) {
        const uint64_t number = blocks.next();
        blockIdx.x = static_cast<unsigned>(number % grid.x);
        blockIdx.y = static_cast<unsigned>(number / grid.x % grid.y);
        blockIdx.z = static_cast<unsigned>(number / (uint64_t{grid.x} * grid.y));
        order_.start(seed, number);
        run_block();
    }
}

std::mutex launch_mutex;
std::map<std::string, uint64_t> launch_counts;
std::string last_failure;

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
    engine.current().copies.queue({destination, source, bytes, total});
}
void commit_copies() { engine.current().copies.commit(); }
void finish_copies(unsigned groups_left_pending) {
    engine.current().copies.finish(groups_left_pending);
}

cudaError_t run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                void* arguments) {
    const std::lock_guard lock(launch_mutex);
    try {
        engine.run(name, grid, block, shared_bytes, body, arguments);
    } catch (const LaunchFailure&) {
        last_failure = engine.error();
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
        case cudaErrorLaunchFailure:
            break;
    }
    // Valid until this thread asks again.
    static thread_local std::string message;
    message = lightvlm::emulation::last_error();
    return message.c_str();
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
#define LIGHTVLM_EXPORT extern "C" __attribute__((visibility("default")))

LIGHTVLM_EXPORT uint64_t lightvlm_emulation_launch_count(const char* name) {
    return lightvlm::emulation::launch_count(name);
}

LIGHTVLM_EXPORT void lightvlm_emulation_reset_launch_counts() {
    lightvlm::emulation::reset_launch_counts();
}

LIGHTVLM_EXPORT const char* lightvlm_emulation_last_error() {
    return cudaGetErrorString(cudaErrorLaunchFailure);
}
