// Threads of the CPU twins: torch's own pool, so torch.set_num_threads counts and no second
// runtime comes in. Write each output from exactly one item: then results cannot depend on the
// thread count.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lightvlm {

// Work below this many elementary steps is not worth waking a thread for.
constexpr int64_t kParallelGrain = 1 << 14;

// fn(begin, end) over [0, items); steps_per_item estimates the cost of one item.
// fn must not throw: exceptions lose their type on the way out of torch's pool.
template <typename Fn>
void parallel_items(int64_t items, int64_t steps_per_item, const Fn& fn) {
    if (items <= 0) return;
    const int64_t grain =
        std::max<int64_t>(1, kParallelGrain / std::max<int64_t>(1, steps_per_item));
    if (items <= grain) {
        fn(int64_t{0}, items);
        return;
    }
    torch::stable::parallel_for(0, items, grain, fn);
}

// fn(item) for each item, where items differ in cost: a thread that is done takes the next one.
template <typename Fn>
void parallel_dynamic(int64_t items, int64_t steps_per_item, const Fn& fn) {
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t, int64_t) {
        for (int64_t item = next++; item < items; item = next++) fn(item);
    };
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
    if (threads <= 1 || items * std::max<int64_t>(1, steps_per_item) <= kParallelGrain) {
        work(0, 1);
    } else {
        torch::stable::parallel_for(0, threads, 1, work);
    }
}

}  // namespace lightvlm
