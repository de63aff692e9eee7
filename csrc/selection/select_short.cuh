// select for rows that the registers of a block hold: top-k or cumulative mass, per segment,
// order-preserving, in one launch and without an atomic.
//
// Formula   As select.cuh.
// Owner     One block owns one row; a thread owns kOwn neighbouring tokens, their keys (and masses)
//           in registers, so that the order of the threads is that of the tokens. Everything is
//           read once and written once.
// Search    The range of the keys is halved until it holds one key, or, for a count, until the keys
//           above are exactly as many as wanted: some 16 steps of one barrier for random scores, 32
//           at most. Histograms of digits need fewer steps, but most scores share a few digits, on
//           which shared atomics queue up.
// Ties      All above the threshold are kept; of its equals, the lowest indices up to the quota.
// Exact     Only integers are added.
// Shared    Under 1 KiB: a partial sum of each warp, twice.
// Bound     Latency: two trips to memory and about 24 barriers a row; 4 B read and 8 B written a
//           token.
#pragma once

#include "selection/rows.cuh"
#include "selection/select.h"

namespace lightvlm {

template <int kThreads>
struct SelectShortShared {
    unsigned long long partials[2][kThreads / kWarpThreads];
    unsigned long long sums[kThreads / kWarpThreads];
    uint32_t words[kThreads / kWarpThreads];
};

// Sums of up to 2^48 a thread over a warp.
__device__ __forceinline__ unsigned long long warp_sum_wide(unsigned long long value) {
    constexpr int kLimb = 24;
    const uint32_t low = static_cast<uint32_t>(value) & ((1u << kLimb) - 1u);
    const uint32_t high = static_cast<uint32_t>(value >> kLimb);
    return (static_cast<unsigned long long>(__reduce_add_sync(kFullWarp, high)) << kLimb) +
           __reduce_add_sync(kFullWarp, low);
}

template <int kThreads, int kOwn, bool kMass>
struct SelectShortBlock {
    static constexpr int kWarps = kThreads / kWarpThreads;
    using Shared = SelectShortShared<kThreads>;

    const SelectParams& params;
    Shared& shared;
    SelectionRow row;
    int64_t first;             // the thread's tokens are [first, first + kOwn)
    uint32_t keys[kOwn] = {};  // kKeyNone: no candidate
    uint32_t kept = 0;         // bits of the own tokens
    uint32_t turn = 0;         // of the partial sums

    __device__ void load() {
        const int64_t tokens = params.rows.tokens;
        LIGHTVLM_UNROLL
        for (int j = 0; j < kOwn; ++j) keys[j] = kKeyNone;
        const bool whole = first + kOwn <= tokens &&
                           reinterpret_cast<uintptr_t>(row.scores + first) % sizeof(float4) == 0;
        if (whole) {
            LIGHTVLM_UNROLL
            for (int j = 0; j < kOwn; j += 4) {
                const float4 four = *reinterpret_cast<const float4*>(row.scores + first + j);
                keys[j] = score_key(four.x);
                keys[j + 1] = score_key(four.y);
                keys[j + 2] = score_key(four.z);
                keys[j + 3] = score_key(four.w);
            }
        } else {
            LIGHTVLM_UNROLL
            for (int j = 0; j < kOwn; ++j) {
                if (first + j < tokens) keys[j] = score_key(row.scores[first + j]);
            }
        }
        if (row.forced == nullptr && row.candidates == nullptr) return;
        LIGHTVLM_UNROLL
        for (int j = 0; j < kOwn; ++j) {
            if (first + j >= tokens) continue;
            const bool forced = row.is_forced(first + j);
            if (forced) kept |= 1u << j;
            if (forced || (row.candidates != nullptr && !row.candidates[first + j])) {
                keys[j] = kKeyNone;
            }
        }
    }

    // The sum over the block, in every thread; one barrier.
    __device__ unsigned long long block_sum(unsigned long long value) {
        const int lane = threadIdx.x % kWarpThreads;
        value = kMass ? warp_sum_wide(value)
                      : __reduce_add_sync(kFullWarp, static_cast<uint32_t>(value));
        // Whoever is a step ahead writes the other half.
        unsigned long long* partials = shared.partials[turn++ % 2];
        if (lane == 0) partials[threadIdx.x / kWarpThreads] = value;
        __syncthreads();
        value = lane < kWarps ? partials[lane] : 0;
        if constexpr (kMass) {
            // A partial sum has up to 53 bits, a warp's sum of them 58.
            for (int step = kWarpThreads / 2; step > 0; step /= 2) {
                value += __shfl_xor_sync(kFullWarp, value, step);
            }
            return value;
        } else {
            return __reduce_add_sync(kFullWarp, static_cast<uint32_t>(value));
        }
    }

    // Chooses among the candidates own[] of a segment.
    __device__ void choose(const uint32_t (&own)[kOwn]) {
        unsigned long long wanted = 0;
        if constexpr (!kMass) {
            wanted = static_cast<unsigned long long>(segment_budget(params.rows, row));
            if (wanted == 0) return;
        }
        uint32_t highest = kKeyNone;
        uint32_t lowest = 0xffffffffu;  // of the candidates
        LIGHTVLM_UNROLL
        for (int j = 0; j < kOwn; ++j) {
            highest = own[j] > highest ? own[j] : highest;
            if (own[j] != kKeyNone && own[j] < lowest) lowest = own[j];
        }
        highest = block_reduce<kThreads>(highest, shared.words,
                                         [](uint32_t a, uint32_t b) { return a > b ? a : b; });
        if (highest == kKeyNone) return;
        lowest = block_reduce<kThreads>(lowest, shared.words,
                                        [](uint32_t a, uint32_t b) { return a < b ? a : b; });

        bool by_mass = kMass && highest > kKeyZero;
        unsigned long long weights[kMass ? kOwn : 1];
        unsigned long long total = 0;
        LIGHTVLM_UNROLL
        for (int j = 0; j < kOwn; ++j) {
            unsigned long long weight = own[j] != kKeyNone ? 1 : 0;
            if constexpr (kMass) {
                if (by_mass) {
                    const double scale = static_cast<double>(positive_key_score(highest));
                    weight = own[j] > kKeyZero ? fixed_mass(positive_key_score(own[j]), scale) : 0;
                }
                weights[j] = weight;
            }
            total += weight;
        }
        total = block_sum(total);
        if constexpr (kMass) {
            // Nothing weighs anything: one token, the highest, stands for the segment.
            wanted = by_mass ? mass_target(params.mass, total) : 1;
        } else {
            if (wanted >= total) {
                mark_from(own, 1);
                return;
            }
        }

        // sum_low, over the keys from `low` on, reaches what is wanted, sum_high does not.
        unsigned long long low = lowest;
        unsigned long long high = highest + 1ull;
        unsigned long long sum_low = total;
        unsigned long long sum_high = 0;
        while (high - low > 1) {
            const uint32_t middle = static_cast<uint32_t>((low + high) / 2);
            unsigned long long sum = 0;
            LIGHTVLM_UNROLL
            for (int j = 0; j < kOwn; ++j) {
                if constexpr (kMass) {
                    sum += own[j] >= middle ? weights[j] : 0;
                } else {
                    sum += own[j] >= middle ? 1 : 0;
                }
            }
            sum = block_sum(sum);
            if (!kMass && sum == wanted) {
                mark_from(own, middle);
                return;
            }
            if (sum >= wanted) {
                low = middle;
                sum_low = sum;
            } else {
                high = middle;
                sum_high = sum;
            }
        }
        const uint32_t key = static_cast<uint32_t>(low);
        uint32_t own_ties = 0;
        LIGHTVLM_UNROLL
        for (int j = 0; j < kOwn; ++j) own_ties += own[j] == key ? 1 : 0;
        uint32_t ties;
        uint32_t rank = block_exclusive_sum<kThreads>(own_ties, shared.words, &ties);
        unsigned long long ties_kept = wanted - sum_high;
        if (by_mass) {
            // All equals weigh the same.
            const unsigned long long each = (sum_low - sum_high) / ties;
            ties_kept = (ties_kept + each - 1) / each;
        }
        LIGHTVLM_UNROLL
        for (int j = 0; j < kOwn; ++j) {
            if (own[j] > key || (own[j] == key && rank++ < ties_kept)) kept |= 1u << j;
        }
    }

    __device__ __forceinline__ void mark_from(const uint32_t (&own)[kOwn], uint32_t lowest_kept) {
        LIGHTVLM_UNROLL
        for (int j = 0; j < kOwn; ++j) {
            if (own[j] >= lowest_kept) kept |= 1u << j;
        }
    }

    // Segment by segment, by ascending id; ids may be sparse.
    __device__ void choose_segments() {
        constexpr uint32_t kNoSegment = 1u << 31;  // above all ids
        const int64_t tokens = params.rows.tokens;
        const auto lower = [](uint32_t a, uint32_t b) { return a < b ? a : b; };
        uint32_t limit = kNoSegment;
        if (params.rows.keep_per_segment && params.rows.keep_columns < kNoSegment) {
            limit = static_cast<uint32_t>(params.rows.keep_columns);
        }
        // The lowest id from `from` on.
        const auto next_from = [&](uint32_t from, bool report) {
            uint32_t next = kNoSegment;
            for (int64_t i = first; i < first + kOwn && i < tokens; ++i) {
                const uint32_t id = static_cast<uint32_t>(row.segment[i]);
                if (id >= kNoSegment) continue;  // negative
                if (id >= limit) {
                    if (report) report_device_error(params.rows.error, kErrorSegmentRange);
                } else if (id >= from) {
                    next = lower(next, id);
                }
            }
            return block_reduce<kThreads>(next, shared.words, lower);
        };
        // One call of choose(), which is inlined: a row without segments is a segment.
        const bool segmented = row.segment != nullptr;
        uint32_t id = segmented ? next_from(0, true) : 0;
        while (id < limit) {
            row.segment_id = static_cast<int32_t>(id);
            uint32_t own[kOwn];
            LIGHTVLM_UNROLL
            for (int j = 0; j < kOwn; ++j) {
                const int64_t i = first + j;
                const bool inside = !segmented || (i < tokens && row.segment[i] == row.segment_id);
                own[j] = inside ? keys[j] : kKeyNone;
            }
            choose(own);
            id = segmented ? next_from(id + 1, false) : limit;
        }
    }

    // Numbers the kept tokens.
    __device__ void write() {
        const SelectionRows& rows = params.rows;
        uint32_t total;
        const uint32_t before = block_exclusive_sum<kThreads>(static_cast<uint32_t>(__popc(kept)),
                                                              shared.words, &total);
        int32_t* index = rows.index + row.row * rows.capacity;
        int32_t slots[kOwn];
        uint32_t slot = before;
        LIGHTVLM_UNROLL
        for (int j = 0; j < kOwn; ++j) {
            slots[j] = -1;
            if ((kept >> j & 1u) == 0) continue;
            if (slot < rows.capacity) {
                index[slot] = static_cast<int32_t>(first + j);
                slots[j] = static_cast<int32_t>(slot);
            }
            ++slot;
        }
        int32_t* inverse = row.inverse + first;
        if (first + kOwn <= rows.tokens &&
            reinterpret_cast<uintptr_t>(inverse) % sizeof(int4) == 0) {
            LIGHTVLM_UNROLL
            for (int j = 0; j < kOwn; j += 4) {
                *reinterpret_cast<int4*>(inverse + j) =
                    int4{slots[j], slots[j + 1], slots[j + 2], slots[j + 3]};
            }
        } else {
            LIGHTVLM_UNROLL
            for (int j = 0; j < kOwn; ++j) {
                if (first + j < rows.tokens) inverse[j] = slots[j];
            }
        }
        const int64_t count = total < rows.capacity ? total : rows.capacity;
        if (threadIdx.x == 0) {
            rows.count[row.row] = static_cast<int32_t>(count);
            if (total > rows.capacity) report_device_error(rows.error, kErrorCapacity);
        }
        for (int64_t s = count + threadIdx.x; s < rows.capacity; s += kThreads) index[s] = -1;
    }

    __device__ void run() {
        load();
        if constexpr (kMass) {
            LIGHTVLM_UNROLL
            for (int j = 0; j < kOwn; ++j) {
                // An infinity of no segment is no candidate.
                if (keys[j] != kKeyInfinity) continue;
                keys[j] = kKeyNone;
                if (row.segment == nullptr || row.segment[first + j] >= 0) {
                    report_device_error(params.rows.error, kErrorInfiniteScore);
                }
            }
        }
        choose_segments();
        write();
    }
};

// One block an SM, as rows are few: keys and masses of kOwn tokens take up to 128 registers.
template <int kThreads, int kOwn, bool kMass>
__global__ void __launch_bounds__(kThreads, 1) select_short_kernel(SelectParams params) {
    auto& shared = *shared_memory<SelectShortShared<kThreads>>();
    SelectShortBlock<kThreads, kOwn, kMass> block{params, shared,
                                                  selection_row(params.rows, blockIdx.x),
                                                  static_cast<int64_t>(threadIdx.x) * kOwn};
    block.run();
}

}  // namespace lightvlm
