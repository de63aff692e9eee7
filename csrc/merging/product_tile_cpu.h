// One tile of a matrix product for the CPU twin of merge_tokens: kTileRows rows times the
// kPanelColumns columns of a packed panel, fp32 accumulation over k in ascending order for each
// element, so that an element does not depend on where in a tile it lies.
//
// Operands come in units of 32 bits: a float; two neighbouring bfloat16 for CPUs that multiply
// those (and add both products to an fp32 sum); or four neighbouring bytes, those of the rows
// signed, those of the panel unsigned, for CPUs that multiply these (and add all products to an
// int32 sum).
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
    // [kTileRows][out_pitch], float or, of bytes, int32: zeroed at the first k, then added to
    void* out;
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
        float* out = static_cast<float*>(tile.out) + r * tile.out_pitch;
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
            float* out = static_cast<float*>(tile.out) + r0 * tile.out_pitch + c0;
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
    auto* out = static_cast<float*>(tile.out);
    for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < 2; ++v) {
            sums[r][v] = tile.first ? _mm512_setzero_ps()
                                    : _mm512_loadu_ps(out + r * tile.out_pitch + 16 * v);
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
            _mm512_storeu_ps(out + r * tile.out_pitch + 16 * v, sums[r][v]);
        }
    }
}

LIGHTVLM_TARGET_AVX512_BF16 inline void multiply_avx512_bf16(const ProductTile& tile) {
    __m512 sums[kTileRows][2];
    auto* out = static_cast<float*>(tile.out);
    for (int r = 0; r < kTileRows; ++r) {
        for (int v = 0; v < 2; ++v) {
            sums[r][v] = tile.first ? _mm512_setzero_ps()
                                    : _mm512_loadu_ps(out + r * tile.out_pitch + 16 * v);
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
            _mm512_storeu_ps(out + r * tile.out_pitch + 16 * v, sums[r][v]);
        }
    }
}

// Unrolled early: otherwise g++ keeps these sums in memory.
LIGHTVLM_TARGET_AVX512_VNNI inline void multiply_avx512_bytes(const ProductTile& tile) {
    __m512i sums[kTileRows][2];
    auto* out = static_cast<int32_t*>(tile.out);
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            sums[r][v] = tile.first ? _mm512_setzero_si512()
                                    : _mm512_loadu_si512(out + r * tile.out_pitch + 16 * v);
        }
    }
    const uint32_t* panel = tile.panel;
    for (int64_t k = 0; k < tile.units; ++k, panel += kPanelColumns) {
        const __m512i low = _mm512_loadu_si512(panel);
        const __m512i high = _mm512_loadu_si512(panel + 16);
#pragma GCC unroll 12
        for (int r = 0; r < kTileRows; ++r) {
            const __m512i row =
                _mm512_set1_epi32(static_cast<int>(tile.rows[r * tile.row_pitch + k]));
            sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], low, row);
            sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], high, row);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            _mm512_storeu_si512(out + r * tile.out_pitch + 16 * v, sums[r][v]);
        }
    }
}

#endif

}  // namespace product_detail

// What a unit of 32 bits holds.
enum class ProductUnit { kFloat, kBfloat16Pair, kBytes };

// Whether this CPU multiplies such units; floats it always does.
inline bool has_product(ProductUnit unit) {
    switch (unit) {
        case ProductUnit::kBytes:
            return cpu_level(CpuLevel::kAvx512Bf16) >= CpuLevel::kAvx512Vnni;
        case ProductUnit::kBfloat16Pair:
            return cpu_level(CpuLevel::kAvx512Bf16) >= CpuLevel::kAvx512Bf16;
        default:
            return true;
    }
}

// Only of a unit that has_product().
inline MultiplyTile multiply_tile(ProductUnit unit) {
#if defined(__x86_64__)
    if (unit == ProductUnit::kBytes) return product_detail::multiply_avx512_bytes;
    if (unit == ProductUnit::kBfloat16Pair) return product_detail::multiply_avx512_bf16;
    switch (cpu_level()) {
        case CpuLevel::kAvx512:
            return product_detail::multiply_avx512;
        case CpuLevel::kAvx2:
            return product_detail::multiply_avx2;
        default:
            break;
    }
#endif
    (void)unit;
    return product_detail::multiply_portable;
}

}  // namespace lightvlm
