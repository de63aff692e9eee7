// One tile of a matrix product for the CPU twin of merge_tokens: kTileRows rows times the
// kPanelColumns columns of a packed panel, fp32 accumulation over k in ascending order for each
// element, so that an element does not depend on where in a tile it lies.
//
// Operands come in units of 32 bits: a float, or two neighbouring bfloat16 for CPUs that multiply
// those (and add both products to an fp32 sum).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/multiversion.h"

namespace lightvlm {

constexpr int kTileRows = 12;
constexpr int kPanelColumns = 32;

struct ProductTile {
    const uint32_t* rows;   // [kTileRows][row_pitch]
    int64_t row_pitch;      // in units
    const uint32_t* panel;  // [units][kPanelColumns]
    int64_t units;
    float* out;  // [kTileRows][out_pitch]: zeroed at the first k, then added to
    int64_t out_pitch;
    bool first;
};

using MultiplyTile = void (*)(const ProductTile& tile);

namespace product_detail {

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline void multiply_portable(const ProductTile& tile) {
    for (int r = 0; r < kTileRows; ++r) {
        float sums[kPanelColumns];
        float* out = tile.out + r * tile.out_pitch;
        for (int c = 0; c < kPanelColumns; ++c) sums[c] = tile.first ? 0.0f : out[c];
        for (int64_t k = 0; k < tile.units; ++k) {
            const float row = as_float(tile.rows[r * tile.row_pitch + k]);
            const uint32_t* panel = tile.panel + k * kPanelColumns;
            for (int c = 0; c < kPanelColumns; ++c) sums[c] += row * as_float(panel[c]);
        }
        std::memcpy(out, sums, sizeof(sums));
    }
}

#if defined(__x86_64__)

LIGHTVLM_TARGET_AVX2 inline void multiply_avx2(const ProductTile& tile) {
    constexpr int kRows = 6;
    constexpr int kColumns = 16;
    for (int r0 = 0; r0 < kTileRows; r0 += kRows) {
        for (int c0 = 0; c0 < kPanelColumns; c0 += kColumns) {
            __m256 sums[kRows][2];
            float* out = tile.out + r0 * tile.out_pitch + c0;
            for (int r = 0; r < kRows; ++r) {
                for (int v = 0; v < 2; ++v) {
                    sums[r][v] = tile.first ? _mm256_setzero_ps()
                                            : _mm256_loadu_ps(out + r * tile.out_pitch + 8 * v);
                }
            }
            const auto* rows = reinterpret_cast<const float*>(tile.rows) + r0 * tile.row_pitch;
            const auto* panel = reinterpret_cast<const float*>(tile.panel) + c0;
            for (int64_t k = 0; k < tile.units; ++k, panel += kPanelColumns) {
                const __m256 low = _mm256_loadu_ps(panel);
                const __m256 high = _mm256_loadu_ps(panel + 8);
                for (int r = 0; r < kRows; ++r) {
                    const __m256 row = _mm256_broadcast_ss(rows + r * tile.row_pitch + k);
                    sums[r][0] = _mm256_fmadd_ps(row, low, sums[r][0]);
                    sums[r][1] = _mm256_fmadd_ps(row, high, sums[r][1]);
                }
            }
            for (int r = 0; r < kRows; ++r) {
                for (int v = 0; v < 2; ++v) {
                    _mm256_storeu_ps(out + r * tile.out_pitch + 8 * v, sums[r][v]);
                }
            }
        }
    }
}

LIGHTVLM_TARGET_AVX512 inline void multiply_avx512(const ProductTile& tile) {
    __m512 sums[kTileRows][2];
    for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < 2; ++v) {
            sums[r][v] = tile.first ? _mm512_setzero_ps()
                                    : _mm512_loadu_ps(tile.out + r * tile.out_pitch + 16 * v);
        }
    }
    const auto* rows = reinterpret_cast<const float*>(tile.rows);
    const auto* panel = reinterpret_cast<const float*>(tile.panel);
    for (int64_t k = 0; k < tile.units; ++k, panel += kPanelColumns) {
        const __m512 low = _mm512_loadu_ps(panel);
        const __m512 high = _mm512_loadu_ps(panel + 16);
        for (int r = 0; r < kTileRows; ++r) {
            const __m512 row = _mm512_set1_ps(rows[r * tile.row_pitch + k]);
            sums[r][0] = _mm512_fmadd_ps(row, low, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(row, high, sums[r][1]);
        }
    }
    for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < 2; ++v) {
            _mm512_storeu_ps(tile.out + r * tile.out_pitch + 16 * v, sums[r][v]);
        }
    }
}

LIGHTVLM_TARGET_AVX512_BF16 inline void multiply_avx512_bf16(const ProductTile& tile) {
    __m512 sums[kTileRows][2];
    for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < 2; ++v) {
            sums[r][v] = tile.first ? _mm512_setzero_ps()
                                    : _mm512_loadu_ps(tile.out + r * tile.out_pitch + 16 * v);
        }
    }
    const uint32_t* panel = tile.panel;
    for (int64_t k = 0; k < tile.units; ++k, panel += kPanelColumns) {
        const auto low = (__m512bh)_mm512_loadu_si512(panel);
        const auto high = (__m512bh)_mm512_loadu_si512(panel + 16);
        for (int r = 0; r < kTileRows; ++r) {
            const auto row =
                (__m512bh)_mm512_set1_epi32(static_cast<int>(tile.rows[r * tile.row_pitch + k]));
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], row, low);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], row, high);
        }
    }
    for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < 2; ++v) {
            _mm512_storeu_ps(tile.out + r * tile.out_pitch + 16 * v, sums[r][v]);
        }
    }
}

#endif

}  // namespace product_detail

// Whether this CPU multiplies bfloat16.
inline bool has_bf16_products() {
    return cpu_level(CpuLevel::kAvx512Bf16) == CpuLevel::kAvx512Bf16;
}

// bf16: units are pairs of bfloat16; only where has_bf16_products().
inline MultiplyTile multiply_tile(bool bf16) {
#if defined(__x86_64__)
    if (bf16) return product_detail::multiply_avx512_bf16;
    switch (cpu_level()) {
        case CpuLevel::kAvx512:
            return product_detail::multiply_avx512;
        case CpuLevel::kAvx2:
            return product_detail::multiply_avx2;
        default:
            break;
    }
#endif
    (void)bf16;
    return product_detail::multiply_portable;
}

}  // namespace lightvlm
