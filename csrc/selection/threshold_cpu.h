// The key at which a row's budget is met, on the CPU.
//
// radix_threshold()   any processor: counts (and masses) per digit of 11 + 11 + 10 bits, each round
//                     among the tokens of the digit that the last one chose.
// find_threshold()    the fastest of those below.
// RankThreshold       AVX-512, a count: a sample of the keys brackets the answer, one sweep counts
//                     what lies above and compresses what lies inside, bits of the key settle the
//                     rest. The answer is the same; a sample that misleads is told by the counts,
//                     and then the radix search decides.
// MassThreshold       AVX-512, a mass: halves the tokens left by a median of samples.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/multiversion.h"
#include "common/x86_intrinsics.h"
#include "selection/score_order.h"

namespace lightvlm {

struct Threshold {
    uint32_t key = 0xffffffffu;
    int64_t ties_kept = 0;  // of the tokens at the key
    int64_t ties = 0;
};

// Grows once, and is used again for the next row.
struct ThresholdScratch {
    static constexpr int kDigitBits = 11;
    static constexpr uint32_t kDigits = 1u << kDigitBits;

    // The tokens that are still undecided. Vectors are stored whole: 16 slots more than tokens.
    std::vector<uint32_t> keys;
    std::vector<uint64_t> masses;
    std::array<uint32_t, kDigits> digit_counts;
    std::array<uint64_t, kDigits> digit_masses;

    void reserve(int64_t n, bool with_masses) {
        const size_t slots = static_cast<size_t>(n) + 16;
        if (keys.size() < slots) keys.resize(slots);
        if (with_masses && masses.size() < slots) masses.resize(slots);
    }
};

// scratch holds room for n tokens; see find_threshold() for the arguments.
inline Threshold radix_threshold(const uint32_t* keys, const uint64_t* masses, int64_t n,
                                 uint64_t wanted, ThresholdScratch& scratch) {
    uint32_t prefix = 0;
    int shift = 32;
    uint32_t digit = 0;
    while (shift > 0) {
        const int width = std::min(shift, ThresholdScratch::kDigitBits);
        const bool first = shift == 32;
        shift -= width;
        const uint32_t mask = (1u << width) - 1u;

        scratch.digit_counts.fill(0);
        for (int64_t i = 0; i < n; ++i) ++scratch.digit_counts[(keys[i] >> shift) & mask];
        if (masses != nullptr) {
            scratch.digit_masses.fill(0);
            for (int64_t i = 0; i < n; ++i) {
                scratch.digit_masses[(keys[i] >> shift) & mask] += masses[i];
            }
        }
        // Tokens without a key all fall into the first round's digit 0, that no key has.
        const uint32_t lowest_digit = first ? 1 : 0;
        digit = mask;
        while (true) {
            const uint64_t here =
                masses != nullptr ? scratch.digit_masses[digit] : scratch.digit_counts[digit];
            if (wanted <= here || digit == lowest_digit) break;
            wanted -= here;
            --digit;
        }
        prefix = (prefix << width) | digit;
        if (shift == 0) break;

        // In place from the second round on: position `to` never passes i. A token is written
        // before it is known whether it stays.
        size_t to = 0;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t key = keys[i];
            scratch.keys[to] = key;
            if (masses != nullptr) scratch.masses[to] = masses[i];
            to += ((key >> shift) & mask) == digit ? 1 : 0;
        }
        keys = scratch.keys.data();
        if (masses != nullptr) masses = scratch.masses.data();
        n = static_cast<int64_t>(to);
    }
    Threshold threshold;
    threshold.key = prefix;
    threshold.ties = scratch.digit_counts[digit];
    threshold.ties_kept = static_cast<int64_t>(wanted);
    if (masses != nullptr) {
        const uint64_t each = scratch.digit_masses[digit] / scratch.digit_counts[digit];
        threshold.ties_kept = static_cast<int64_t>((wanted + each - 1) / each);
    }
    return threshold;
}

#if defined(__x86_64__)

namespace avx512 {

// The lanes of keys[i, i + 16) that lie below n.
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE __mmask16 lanes_below(int64_t i, int64_t n) {
    return n - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - i)) - 1u);
}

LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE int64_t count_from(const uint32_t* keys, int64_t n,
                                                          uint32_t lowest) {
    const __m512i bound = _mm512_set1_epi32(static_cast<int32_t>(lowest));
    int64_t count = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        count += __builtin_popcount(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + i), bound));
    }
    if (i < n) {
        const __mmask16 here = lanes_below(i, n);
        count += __builtin_popcount(
            _mm512_mask_cmpge_epu32_mask(here, _mm512_maskz_loadu_epi32(here, keys + i), bound));
    }
    return count;
}

// The rank-th highest of keys that all lie in [low, high], bit by bit. 1 <= rank <= n.
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE uint32_t ranked_key(const uint32_t* keys, int64_t n,
                                                           int64_t rank, uint32_t low,
                                                           uint32_t high) {
    const uint32_t differs = low ^ high;
    if (differs == 0) return low;
    const int bits = 32 - __builtin_clz(differs);
    uint32_t key = bits == 32 ? 0 : low >> bits << bits;
    for (int bit = bits - 1; bit >= 0; --bit) {
        const uint32_t tried = key | 1u << bit;
        if (count_from(keys, n, tried) >= rank) key = tried;
    }
    return key;
}

// to[0, result): the keys of [low, high], in order; *above: how many lie higher. `to` may be
// `keys`; it has 16 slots more than it gets.
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE int64_t keys_between(const uint32_t* keys, int64_t n,
                                                            uint32_t low, uint32_t high,
                                                            uint32_t* to, int64_t* above) {
    const __m512i lowest = _mm512_set1_epi32(static_cast<int32_t>(low));
    const __m512i highest = _mm512_set1_epi32(static_cast<int32_t>(high));
    int64_t inside = 0;
    int64_t higher = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 here = lanes_below(i, n);
        const __m512i key = _mm512_maskz_loadu_epi32(here, keys + i);
        const __mmask16 over = _mm512_mask_cmpgt_epu32_mask(here, key, highest);
        const __mmask16 in = _mm512_mask_cmpge_epu32_mask(here, key, lowest) & ~over;
        _mm512_storeu_si512(to + inside, _mm512_maskz_compress_epi32(in, key));
        inside += __builtin_popcount(in);
        higher += __builtin_popcount(over);
    }
    *above = higher;
    return inside;
}

// Every n / count-th key, give or take: a fixed stride would follow the columns of an image.
LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE void sample_keys(const uint32_t* keys, int64_t n,
                                                        uint32_t* sample, int64_t count) {
    const uint64_t stride = static_cast<uint64_t>(n / count);
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t jitter = static_cast<uint32_t>(i) * 2654435769u;
        sample[i] = keys[static_cast<uint64_t>(i) * stride + (jitter * stride >> 32)];
    }
}

}  // namespace avx512

#endif

// Fills *found and returns true, or leaves it to radix_threshold(). left[n + 16]: scratch.
struct RankThreshold {
    template <CpuLevel level>
    static LIGHTVLM_INLINE bool run(const uint32_t* keys, int64_t n, int64_t wanted, uint32_t* left,
                                    Threshold* found) {
#if defined(__x86_64__)
        if constexpr (level == CpuLevel::kAvx512) {
            return search(keys, n, wanted, left, found);
        }
#endif
        return false;
    }

#if defined(__x86_64__)
  private:
    static constexpr int64_t kSample = 256;
    // So few are settled bit by bit at once.
    static constexpr int64_t kFew = 1536;

    LIGHTVLM_TARGET_AVX512 static bool search(const uint32_t* keys, int64_t n, int64_t wanted,
                                              uint32_t* left, Threshold* found) {
        uint32_t low = 0;
        uint32_t high = 0xffffffffu;
        while (n > kFew) {
            alignas(64) uint32_t sample[kSample];
            avx512::sample_keys(keys, n, sample, kSample);
            // Where the answer ranks in the sample, and three standard deviations around it.
            const double share = static_cast<double>(wanted) / static_cast<double>(n);
            const double rank = share * kSample;
            const double slack = 3.0 * std::sqrt(rank * (1.0 - share)) + 1.0;
            const int64_t first = static_cast<int64_t>(rank - slack);
            const int64_t last = static_cast<int64_t>(rank + slack) + 1;
            const uint32_t sample_high =
                first < 1 ? high : avx512::ranked_key(sample, kSample, first, low, high);
            const uint32_t sample_low =
                last > kSample ? low : avx512::ranked_key(sample, kSample, last, low, sample_high);
            int64_t above;
            const int64_t inside =
                avx512::keys_between(keys, n, sample_low, sample_high, left, &above);
            if (wanted <= above || wanted > above + inside) return false;
            // A bracket of one key leaves nothing to decide; another has to leave out enough.
            if (sample_low != sample_high && inside > n / 4 * 3) return false;
            wanted -= above;
            keys = left;
            n = inside;
            low = sample_low;
            high = sample_high;
            if (low == high) break;
        }
        found->key = avx512::ranked_key(keys, n, wanted, low, high);
        const int64_t from = avx512::count_from(keys, n, found->key);
        const int64_t above =
            found->key == 0xffffffffu ? 0 : avx512::count_from(keys, n, found->key + 1);
        found->ties = from - above;
        found->ties_kept = wanted - above;
        return true;
    }
#endif
};

// As RankThreshold for a sum of masses; left_keys, left_masses [n + 16]: scratch.
struct MassThreshold {
    template <CpuLevel level>
    static LIGHTVLM_INLINE bool run(const uint32_t* keys, const uint64_t* masses, int64_t n,
                                    uint64_t wanted, uint32_t* left_keys, uint64_t* left_masses,
                                    Threshold* found) {
#if defined(__x86_64__)
        if constexpr (level == CpuLevel::kAvx512) {
            search(keys, masses, n, wanted, left_keys, left_masses, found);
            return true;
        }
#endif
        return false;
    }

#if defined(__x86_64__)
  private:
    static constexpr int64_t kSample = 15;

    LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE static uint64_t mass_from(const uint32_t* keys,
                                                                     const uint64_t* masses,
                                                                     int64_t n, uint32_t lowest) {
        const __m512i bound = _mm512_set1_epi32(static_cast<int32_t>(lowest));
        __m512i sum = _mm512_setzero_si512();
        __m512i other = _mm512_setzero_si512();
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 here = avx512::lanes_below(i, n);
            const __mmask16 in =
                _mm512_mask_cmpge_epu32_mask(here, _mm512_maskz_loadu_epi32(here, keys + i), bound);
            sum = _mm512_add_epi64(sum,
                                   _mm512_maskz_loadu_epi64(static_cast<__mmask8>(in), masses + i));
            other = _mm512_add_epi64(
                other, _mm512_maskz_loadu_epi64(static_cast<__mmask8>(in >> 8), masses + i + 8));
        }
        alignas(64) uint64_t sums[8];
        _mm512_store_si512(sums, _mm512_add_epi64(sum, other));
        uint64_t total = 0;
        for (uint64_t part : sums) total += part;
        return total;
    }

    // Keeps the tokens of [low, high]; returns how many.
    LIGHTVLM_TARGET_AVX512 LIGHTVLM_INLINE static int64_t narrow(const uint32_t* keys,
                                                                 const uint64_t* masses, int64_t n,
                                                                 uint32_t low, uint32_t high,
                                                                 uint32_t* left_keys,
                                                                 uint64_t* left_masses) {
        const __m512i lowest = _mm512_set1_epi32(static_cast<int32_t>(low));
        const __m512i highest = _mm512_set1_epi32(static_cast<int32_t>(high));
        int64_t inside = 0;
        for (int64_t i = 0; i < n; i += 16) {
            const __mmask16 here = avx512::lanes_below(i, n);
            const __m512i key = _mm512_maskz_loadu_epi32(here, keys + i);
            const __mmask16 in = _mm512_mask_cmple_epu32_mask(
                _mm512_mask_cmpge_epu32_mask(here, key, lowest), key, highest);
            const __mmask8 in_first = static_cast<__mmask8>(in);
            const __mmask8 in_second = static_cast<__mmask8>(in >> 8);
            const __m512i first = _mm512_maskz_loadu_epi64(in_first, masses + i);
            const __m512i second = _mm512_maskz_loadu_epi64(in_second, masses + i + 8);
            _mm512_storeu_si512(left_keys + inside, _mm512_maskz_compress_epi32(in, key));
            _mm512_storeu_si512(left_masses + inside, _mm512_maskz_compress_epi64(in_first, first));
            _mm512_storeu_si512(left_masses + inside + __builtin_popcount(in_first),
                                _mm512_maskz_compress_epi64(in_second, second));
            inside += __builtin_popcount(in);
        }
        return inside;
    }

    LIGHTVLM_TARGET_AVX512 static void search(const uint32_t* keys, const uint64_t* masses,
                                              int64_t n, uint64_t wanted, uint32_t* left_keys,
                                              uint64_t* left_masses, Threshold* found) {
        uint32_t low = 1;
        uint32_t high = 0xffffffffu;
        // The median of a sample about halves what is left; where that has not been quick, halving
        // the range of the keys ends the search for sure.
        for (int turn = 0; low < high && n > 1; ++turn) {
            uint32_t pivot = low;
            if (turn < 24 && n >= kSample) {
                uint32_t sample[kSample];
                avx512::sample_keys(keys, n, sample, kSample);
                std::nth_element(sample, sample + kSample / 2, sample + kSample);
                pivot = sample[kSample / 2];
            }
            if (pivot <= low || pivot > high) pivot = low + (high - low) / 2 + 1;
            const uint64_t mass = mass_from(keys, masses, n, pivot);
            if (wanted <= mass) {
                low = pivot;
            } else {
                wanted -= mass;
                high = pivot - 1;
            }
            n = narrow(keys, masses, n, low, high, left_keys, left_masses);
            keys = left_keys;
            masses = left_masses;
        }
        found->key = keys[0];
        found->ties = n;
        const uint64_t each = masses[0];
        found->ties_kept = static_cast<int64_t>((wanted + each - 1) / each);
    }
#endif
};

// The key at which `wanted` tokens (masses null), or that much mass, are reached; 1 <= wanted <=
// what there is of tokens with a key, or of mass.
inline Threshold find_threshold(const uint32_t* keys, const uint64_t* masses, int64_t n,
                                uint64_t wanted, ThresholdScratch& scratch) {
    scratch.reserve(n, masses != nullptr);
    Threshold found;
    const bool done =
        masses == nullptr
            ? multiversion<RankThreshold>(keys, n, static_cast<int64_t>(wanted),
                                          scratch.keys.data(), &found)
            : multiversion<MassThreshold>(keys, masses, n, wanted, scratch.keys.data(),
                                          scratch.masses.data(), &found);
    return done ? found : radix_threshold(keys, masses, n, wanted, scratch);
}

}  // namespace lightvlm
