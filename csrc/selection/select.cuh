// select for rows longer than select_short.cuh takes: top-k or cumulative mass, per segment,
// order-preserving, in one launch.
//
// Formula   Candidates of a segment are ordered by score (score_order.h). Kept are the first k, or
//           the fewest whose fixed-point masses reach mass_target(); forced tokens besides.
// Owner     One block owns one row: it finds each segment's threshold key by a radix search over
//           11 + 11 + 10 bits (counts and masses per digit, suffix-scanned from the top), marks the
//           kept tokens in `inverse`, and at last numbers the marks in token order.
// Ends      A count stops at a digit of which all are wanted, mostly the second.
// Ties      All above the threshold are kept; of its equals, the lowest indices up to the quota.
// Exact     Only integers are added, so atomics cannot make the result depend on their order.
// Shared    24 KiB: 2,048 digits x (count 4 B + mass 8 B), and a word a warp.
// Bound     Latency: 4 to 6 sweeps over 4 B x tokens, that stay in L1/L2, and about 10 barriers a
//           sweep of digits; 32k tokens are 32 steps of the block. Bytes moved from memory: 4 B
//           read and 8 B written a token.
#pragma once

#include "selection/rows.cuh"
#include "selection/select.h"

namespace lightvlm {

constexpr int kSelectDigitBits = 11;
constexpr int kSelectDigits = 1 << kSelectDigitBits;

template <int kThreads>
struct SelectShared {
    unsigned long long masses[kSelectDigits];
    unsigned long long sums[kThreads / kWarpThreads];
    uint32_t counts[kSelectDigits];
    RowScratch<kThreads> row;
    // The digit at which the budget is reached: written by the thread that owns it.
    unsigned long long above;  // what the higher digits hold of the budget
    unsigned long long digit_mass;
    uint32_t digit_count;
    uint32_t digit;
};

// kKeyNone where the token may not be chosen.
__device__ __forceinline__ uint32_t candidate_key(const SelectionRow& row, int64_t i,
                                                  bool by_mass) {
    if (!row.is_candidate(i)) return kKeyNone;
    const uint32_t key = score_key(row.scores[i]);
    return by_mass && key == kKeyInfinity ? kKeyNone : key;
}

struct SelectThreshold {
    uint32_t key = 0xffffffffu;
    uint32_t ties_kept = 0;  // of the tokens at the key
    uint32_t ties = 0;
};

// The key at which `keep` tokens, or the mass, are reached. highest: highest score of the segment.
template <int kThreads>
__device__ SelectThreshold find_threshold(const SelectionRow& row, SelectShared<kThreads>& shared,
                                          unsigned long long keep, double mass, float highest) {
    constexpr int kOwnDigits = kSelectDigits / kThreads;
    static_assert(kOwnDigits * kThreads == kSelectDigits, "each thread owns whole digits");

    SelectThreshold threshold;
    bool by_mass = mass > 0.0;
    const bool finite_only = by_mass;
    unsigned long long wanted = keep;
    uint32_t prefix = 0;
    int shift = 32;
    while (shift > 0) {
        const int prefix_shift = shift;
        shift = shift > kSelectDigitBits ? shift - kSelectDigitBits : 0;
        const uint32_t digit_mask = (1u << (prefix_shift - shift)) - 1u;

        for (int d = threadIdx.x; d < kSelectDigits; d += kThreads) {
            shared.counts[d] = 0;
            shared.masses[d] = 0;
        }
        __syncthreads();
        for (int64_t i = row.begin + threadIdx.x; i < row.end; i += kThreads) {
            const uint32_t key = candidate_key(row, i, finite_only);
            // A shift by 32 is undefined, so the first round, where all match, is named.
            if (key == kKeyNone || (prefix_shift < 32 && (key >> prefix_shift) != prefix)) continue;
            const uint32_t digit = (key >> shift) & digit_mask;
            atomicAdd(&shared.counts[digit], 1u);
            if (by_mass && key > kKeyZero) {
                atomicAdd(&shared.masses[digit],
                          static_cast<unsigned long long>(fixed_mass(row.scores[i], highest)));
            }
        }
        __syncthreads();

        // Thread t owns the digits [top - kOwnDigits + 1, top], highest first.
        const int top = kSelectDigits - 1 - static_cast<int>(threadIdx.x) * kOwnDigits;
        uint32_t own_count = 0;
        unsigned long long own_mass = 0;
        for (int j = 0; j < kOwnDigits; ++j) {
            own_count += shared.counts[top - j];
            own_mass += shared.masses[top - j];
        }
        uint32_t total_count;
        unsigned long long before =
            block_exclusive_sum<kThreads>(own_count, shared.row.words, &total_count);
        if (total_count == 0) return threshold;
        if (by_mass) {
            unsigned long long total_mass;
            const unsigned long long mass_before =
                block_exclusive_sum<kThreads>(own_mass, shared.sums, &total_mass);
            if (prefix_shift == 32) {
                wanted = mass_target(mass, total_mass);
                // Nothing weighs anything: one token, the highest, stands for the segment.
                by_mass = total_mass > 0;
                if (!by_mass) wanted = 1;
            }
            if (by_mass) before = mass_before;
        } else if (prefix_shift == 32 && wanted > total_count) {
            wanted = total_count;
        }
        if (wanted == 0) return threshold;

        if (before < wanted && wanted <= before + (by_mass ? own_mass : own_count)) {
            for (int j = 0; j < kOwnDigits; ++j) {
                const unsigned long long here =
                    by_mass ? shared.masses[top - j] : shared.counts[top - j];
                if (wanted <= before + here) {
                    shared.digit = top - j;
                    shared.digit_count = shared.counts[top - j];
                    shared.digit_mass = shared.masses[top - j];
                    shared.above = before;
                    break;
                }
                before += here;
            }
        }
        __syncthreads();
        prefix = (prefix << (prefix_shift - shift)) | shared.digit;
        wanted -= shared.above;
        if (!by_mass && wanted == shared.digit_count) {
            // All of the digit: lower bits decide nothing.
            prefix <<= shift;
            break;
        }
    }
    threshold.key = prefix;
    threshold.ties = shared.digit_count;
    if (by_mass) {
        // All equals weigh the same.
        const unsigned long long each = shared.digit_mass / shared.digit_count;
        wanted = (wanted + each - 1) / each;
    }
    threshold.ties_kept = static_cast<uint32_t>(wanted);
    __syncthreads();  // the next segment overwrites the digit
    return threshold;
}

// The highest finite positive score of the segment, 0 if there is none.
template <int kThreads>
__device__ float highest_score(const SelectionRow& row, SelectShared<kThreads>& shared,
                               int32_t* error) {
    uint32_t highest = kKeyZero;
    for (int64_t i = row.begin + threadIdx.x; i < row.end; i += kThreads) {
        const uint32_t key = candidate_key(row, i, false);
        if (key == kKeyInfinity) {
            report_device_error(error, kErrorInfiniteScore);
        } else if (key > highest) {
            highest = key;
        }
    }
    highest = block_reduce<kThreads>(highest, shared.row.words,
                                     [](uint32_t a, uint32_t b) { return a > b ? a : b; });
    return positive_key_score(highest);
}

template <int kThreads>
__device__ void mark_kept(const SelectionRow& row, SelectShared<kThreads>& shared,
                          const SelectThreshold& threshold, bool by_mass) {
    if (threshold.ties_kept == threshold.ties) {
        if (threshold.ties == 0) return;
        for (int64_t i = row.begin + threadIdx.x; i < row.end; i += kThreads) {
            if (candidate_key(row, i, by_mass) >= threshold.key) row.inverse[i] = 0;
        }
        return;
    }
    uint32_t ties_before = 0;
    for (int64_t tile = row.begin; tile < row.end; tile += kThreads) {
        const int64_t i = tile + threadIdx.x;
        const uint32_t key = i < row.end ? candidate_key(row, i, by_mass) : kKeyNone;
        const bool tie = key == threshold.key;
        uint32_t ties;
        const uint32_t rank = ties_before + block_rank<kThreads>(tie, shared.row.words, &ties);
        if (key > threshold.key || (tie && rank < threshold.ties_kept)) row.inverse[i] = 0;
        ties_before += ties;
    }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) select_kernel(SelectParams params) {
    auto& shared = *shared_memory<SelectShared<kThreads>>();
    const int64_t row_index = blockIdx.x;
    const bool by_mass = params.mass > 0.0;
    for_each_segment<kThreads>(params.rows, row_index, shared.row, [&](const SelectionRow& row) {
        float highest = 0.0f;
        int64_t keep = 0;
        if (by_mass) {
            highest = highest_score<kThreads>(row, shared, params.rows.error);
        } else {
            keep = segment_budget(params.rows, row);
            if (keep == 0) return;
        }
        const SelectThreshold threshold =
            find_threshold<kThreads>(row, shared, keep, params.mass, highest);
        mark_kept<kThreads>(row, shared, threshold, by_mass);
    });
    write_selection<kThreads>(params.rows, row_index, shared.row);
}

}  // namespace lightvlm
