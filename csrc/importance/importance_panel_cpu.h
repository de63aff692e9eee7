// How the CPU twin of importance lays out its vectors. Probes lie across the lanes of a *panel*,
// 32 of them (or 16, where no more are left); targets are staged in *groups* of 12.
//
// Both are made of 32-bit units along the vector: a float, or a pair of bfloat16 where the
// processor multiplies these (vdpbf16ps). A vector ends in zeros where its width is odd.
//
//     panel  [unit][lane]       group  [target][unit], targets kUnitPitch apart
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "common/x86_intrinsics.h"
#include "importance/importance.h"

namespace lightvlm::importance_detail {

constexpr int kPanelLanes = 32;
constexpr int kLanes = 16;  // of a vector
constexpr int kTargetGroup = 12;
// Above kImportanceMaxWidth, and no multiple of the cache's way size.
constexpr int64_t kUnitPitch = 272;
constexpr int32_t kSeesNothing = std::numeric_limits<int32_t>::min();

// The levels that a body for vectors of T is compiled for.
template <typename T>
constexpr CpuLevel kHighestLevelFor =
    std::is_same_v<T, bfloat16_t> ? CpuLevel::kAvx512Bf16 : CpuLevel::kAvx512;

template <CpuLevel level, typename T>
constexpr bool kPairs = std::is_same_v<T, bfloat16_t> && level >= CpuLevel::kAvx512Bf16;

template <typename T>
int64_t units_of(int64_t width) {
    const bool pairs =
        std::is_same_v<T, bfloat16_t> && cpu_level(kHighestLevelFor<T>) >= CpuLevel::kAvx512Bf16;
    return pairs ? (width + 1) / 2 : width;
}

// Lane l sees target t where limit[l] >= threshold[t].
struct Panel {
    alignas(64) int32_t limit[kPanelLanes];
    // Given log-sum-exps in units of log 2, as a sum of two floats.
    alignas(64) float shift[kPanelLanes];
    alignas(64) float shift_low[kPanelLanes];
    int lanes = 0;       // 16 or 32
    uint32_t alive = 0;  // a bit for each lane that sees anything
    int32_t lowest = 0;  // limit of these
    int32_t highest = kSeesNothing;
    const uint32_t* units = nullptr;

    // Sets what follows from the limits of the `used` first lanes.
    void close(int used) {
        lanes = used <= kLanes ? kLanes : kPanelLanes;
        alive = 0;
        lowest = std::numeric_limits<int32_t>::max();
        highest = kSeesNothing;
        for (int lane = 0; lane < kPanelLanes; ++lane) {
            if (lane >= used) limit[lane] = kSeesNothing;
            if (limit[lane] == kSeesNothing) continue;
            alive |= 1u << lane;
            lowest = std::min(lowest, limit[lane]);
            highest = std::max(highest, limit[lane]);
        }
    }
};

// Target t lies at base + (row == null ? t : row[t]) * stride.
template <typename T>
struct Targets {
    const T* base = nullptr;
    int64_t stride = 0;
    const int32_t* row = nullptr;
    const int32_t* threshold = nullptr;
    int64_t width = 0;

    LIGHTVLM_INLINE const T* at(int64_t t) const {
        return base + (row == nullptr ? t : row[t]) * stride;
    }
};

template <CpuLevel level, typename T>
LIGHTVLM_INLINE void stage_vector(const T* vector, int64_t width, uint32_t* units) {
    if constexpr (kPairs<level, T>) {
        const auto* bits = reinterpret_cast<const uint16_t*>(vector);
        for (int64_t u = 0; u < width / 2; ++u) {
            uint32_t pair;
            std::memcpy(&pair, bits + 2 * u, sizeof(pair));
            units[u] = pair;
        }
        if (width % 2 != 0) units[width / 2] = bits[width - 1];
    } else {
        for (int64_t d = 0; d < width; ++d)
            units[d] = float16_detail::float_bits(to_float(vector[d]));
    }
}

#if defined(__x86_64__)

// out[c * out_pitch + r] = in[r * in_pitch + c] ^ flip for 16 x 16 units.
LIGHTVLM_TARGET_AVX512 inline void transpose_avx512(const uint32_t* in, int64_t in_pitch,
                                                    uint32_t* out, int64_t out_pitch,
                                                    uint32_t flip) {
    __m512i row[16];
    __m512i half[16];
    const __m512i bits = _mm512_set1_epi32(static_cast<int>(flip));
    for (int r = 0; r < 16; ++r) {
        row[r] = _mm512_xor_si512(_mm512_loadu_si512(in + r * in_pitch), bits);
    }
    for (int r = 0; r < 16; r += 2) {
        half[r] = _mm512_unpacklo_epi32(row[r], row[r + 1]);
        half[r + 1] = _mm512_unpackhi_epi32(row[r], row[r + 1]);
    }
    // row[4 g + c] has column c of rows 4 g to 4 g + 3, one 128-bit part for every fourth column.
    for (int g = 0; g < 16; g += 4) {
        row[g] = _mm512_unpacklo_epi64(half[g], half[g + 2]);
        row[g + 1] = _mm512_unpackhi_epi64(half[g], half[g + 2]);
        row[g + 2] = _mm512_unpacklo_epi64(half[g + 1], half[g + 3]);
        row[g + 3] = _mm512_unpackhi_epi64(half[g + 1], half[g + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        const __m512i low01 = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x88);
        const __m512i high01 = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xdd);
        const __m512i low23 = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x88);
        const __m512i high23 = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xdd);
        _mm512_storeu_si512(out + c * out_pitch, _mm512_shuffle_i32x4(low01, low23, 0x88));
        _mm512_storeu_si512(out + (c + 4) * out_pitch, _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_storeu_si512(out + (c + 8) * out_pitch, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        _mm512_storeu_si512(out + (c + 12) * out_pitch, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

#endif

// The same for `columns` columns, of which up to 15 more are written.
template <CpuLevel level>
LIGHTVLM_INLINE void transpose(const uint32_t* in, int64_t in_pitch, int64_t columns, uint32_t* out,
                               int64_t out_pitch, uint32_t flip) {
    for (int64_t begin = 0; begin < columns; begin += 16) {
#if defined(__x86_64__)
        if constexpr (level >= CpuLevel::kAvx512) {
            transpose_avx512(in + begin, in_pitch, out + begin * out_pitch, out_pitch, flip);
            continue;
        }
#endif
        for (int64_t c = begin; c < std::min(begin + 16, columns); ++c) {
            for (int r = 0; r < 16; ++r) out[c * out_pitch + r] = in[r * in_pitch + c] ^ flip;
        }
    }
}

// Units that a packed panel takes, what transpose() writes past its end included.
constexpr int64_t panel_units(int64_t units) { return (units + 15) / 16 * 16 * kPanelLanes; }

// probe[0 .. lanes) into panel [unit][lanes]; a null probe is zeros. staged: 16 * kUnitPitch units.
template <typename T>
struct PackPanel {
    static constexpr CpuLevel kHighestLevel = kHighestLevelFor<T>;

    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const T* const* probe, int lanes, int64_t width, bool negate,
                                    uint32_t* staged, uint32_t* panel) {
        const int64_t units = kPairs<level, T> ? (width + 1) / 2 : width;
        const uint32_t sign = kPairs<level, T> ? 0x80008000u : 0x80000000u;
        for (int first = 0; first < lanes; first += 16) {
            for (int lane = 0; lane < 16; ++lane) {
                uint32_t* row = staged + lane * kUnitPitch;
                if (probe[first + lane] == nullptr) {
                    std::memset(row, 0, units * sizeof(uint32_t));
                } else {
                    stage_vector<level>(probe[first + lane], width, row);
                }
            }
            transpose<level>(staged, kUnitPitch, units, panel + first, lanes, negate ? sign : 0u);
        }
    }
};

// Targets [begin, begin + kTargetGroup) of those before `end`; the last one is repeated past it.
// Asks for the next group besides: its rows are far apart, which processors do not foresee.
template <CpuLevel level, typename T>
LIGHTVLM_INLINE void stage_group(const Targets<T>& targets, int64_t begin, int64_t end,
                                 uint32_t* group) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < kTargetGroup; ++i) {
        const int64_t t = begin + i < end ? begin + i : end - 1;
        stage_vector<level>(targets.at(t), targets.width, group + i * kUnitPitch);
        if (begin + kTargetGroup + i >= end) continue;
        const T* next = targets.at(begin + kTargetGroup + i);
        for (int64_t d = 0; d < targets.width; d += kLine) __builtin_prefetch(next + d);
    }
}

}  // namespace lightvlm::importance_detail
