// Scores and values of a span in fp32: every format, every processor. What is not fp32 is widened a
// tile of tokens at a time (decode_tile_cpu.h); the values' channel factors alone wait until the
// end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/float16.cuh"
#include "common/multiversion.h"
#include "decode_attention/decode_span_cpu.h"
#include "decode_attention/decode_tile_cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lightvlm::decode_detail {

// A row of 16-bit numbers in fp32; widths are multiples of 16.
template <CpuLevel level, typename T>
struct WidenRow {
    static LIGHTVLM_INLINE void run(const char* row, int64_t head_dim, float* out) {
        const T* from = reinterpret_cast<const T*>(row);
        for (int64_t d = 0; d < head_dim; ++d) out[d] = to_float(from[d]);
    }
};

#if defined(__x86_64__)
template <>
struct WidenRow<CpuLevel::kAvx2, half_t> {
    LIGHTVLM_TARGET_AVX2 static void run(const char* row, int64_t head_dim, float* out) {
        for (int64_t d = 0; d < head_dim; d += 8) {
            const auto* eight = reinterpret_cast<const __m128i*>(row + 2 * d);
            _mm256_storeu_ps(out + d, _mm256_cvtph_ps(_mm_loadu_si128(eight)));
        }
    }
};
#endif

template <CpuLevel level, typename T, bool keys>
LIGHTVLM_INLINE void widen_dense(const Span& span, int begin, int count, float* widened) {
    for (int n = begin; n < begin + count; ++n) {
        WidenRow<tile_level(level), T>::run(keys ? span.key_row(n) : span.value_row(n),
                                            span.head_dim, widened + (n - begin) * span.head_dim);
    }
}

// A row of codes in fp32: code * scale[d] + zero[d] for keys, whose factors are a channel's each,
// and with scale[0] and zero[0] for values, whose factors are the token's.
template <CpuLevel level, int bits, bool keys>
struct WidenCodes {
    static LIGHTVLM_INLINE void run(const uint8_t* row, int64_t head_dim, const float* scale,
                                    const float* zero, float* out) {
        constexpr int kPerByte = 8 / bits;
        constexpr int kMask = (1 << bits) - 1;
        for (int64_t i = 0; i < head_dim / kPerByte; ++i) {
            for (int k = 0; k < kPerByte; ++k) {
                const int64_t d = i * kPerByte + k;
                const auto code = static_cast<float>(row[i] >> (k * bits) & kMask);
                out[d] = code * scale[keys ? d : 0] + zero[keys ? d : 0];
            }
        }
    }
};

#if defined(__x86_64__)
// 8 codes are a word of 16, 32 or 64 bits: each lane shifts its own down.
template <int bits, bool keys>
struct WidenCodes<CpuLevel::kAvx2, bits, keys> {
    LIGHTVLM_TARGET_AVX2 static void run(const uint8_t* row, int64_t head_dim, const float* scale,
                                         const float* zero, float* out) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i shift = _mm256_mullo_epi32(lane, _mm256_set1_epi32(bits));
        const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
        for (int64_t d = 0; d < head_dim; d += 8) {
            const uint8_t* eight = row + d * bits / 8;
            __m256i codes;
            if constexpr (bits == 8) {
                codes =
                    _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight)));
            } else {
                uint32_t word = 0;
                std::memcpy(&word, eight, bits);
                codes = _mm256_and_si256(
                    _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shift), mask);
            }
            const __m256 by = keys ? _mm256_loadu_ps(scale + d) : _mm256_set1_ps(*scale);
            const __m256 from = keys ? _mm256_loadu_ps(zero + d) : _mm256_set1_ps(*zero);
            _mm256_storeu_ps(out + d, _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), by, from));
        }
    }
};
#endif

template <CpuLevel level, int bits, bool keys>
LIGHTVLM_INLINE void widen_codes(const Span& span, int begin, int count, float* widened) {
    for (int n = begin; n < begin + count; ++n) {
        const auto* row =
            reinterpret_cast<const uint8_t*>(keys ? span.key_row(n) : span.value_row(n));
        const uint16_t* pair = span.value_token + n * span.value_token_stride;
        const float token[] = {keys ? 0.0f : to_float(half_t{pair[0]}),
                               keys ? 0.0f : to_float(half_t{pair[1]})};
        WidenCodes<tile_level(level), bits, keys>::run(
            row, span.head_dim, keys ? span.key_scale : token, keys ? span.key_zero : token + 1,
            widened + (n - begin) * span.head_dim);
    }
}

// Tokens [begin, begin + count) of the span's keys or values: where they are, or in `room`, which
// has a row for each token of a tile and one of zeros.
template <CpuLevel level, bool keys>
LIGHTVLM_INLINE void set_tile(const Span& span, int begin, int count, float* room, Tile* tile) {
    tile->tokens = count;
    const int end = (count + kTokenStep - 1) / kTokenStep * kTokenStep;
    for (int n = count; n < end; ++n) tile->row[n] = room + kTileTokens * kMaxChannels;
    if (span.format == KVFormat::kFloat32) {
        for (int n = 0; n < count; ++n) {
            const char* row = keys ? span.key_row(begin + n) : span.value_row(begin + n);
            tile->row[n] = reinterpret_cast<const float*>(row);
        }
        return;
    }
    for (int n = 0; n < count; ++n) tile->row[n] = room + n * span.head_dim;
    switch (span.format) {
        case KVFormat::kFloat16:
            return widen_dense<level, half_t, keys>(span, begin, count, room);
        case KVFormat::kBFloat16:
            return widen_dense<level, bfloat16_t, keys>(span, begin, count, room);
        case KVFormat::kPacked8:
            return widen_codes<level, 8, keys>(span, begin, count, room);
        case KVFormat::kPacked4:
            return widen_codes<level, 4, keys>(span, begin, count, room);
        case KVFormat::kPacked2:
            return widen_codes<level, 2, keys>(span, begin, count, room);
        case KVFormat::kFloat32:
            return;
    }
}

// What comes after a tile: scores fetch its values, values the keys of the next span.
template <bool keys>
LIGHTVLM_INLINE void set_next(const Span& span, int begin, int count, NextRows* next) {
    next->done = 0;
    next->count = is_packed(span.format) ? 0 : count;
    next->bytes = span.head_dim * (span.format == KVFormat::kFloat32 ? 4 : 2);
    next->listed = nullptr;
    if (span.in_pages) {
        next->listed = (keys ? span.listed.value.row : span.listed.next_key.row) + begin;
    } else {
        const StridedRows& rows = keys ? span.strided.value : span.strided.next_key;
        next->strided = {rows[begin], rows.stride};
    }
}

// fn(tile, its first token) for all tiles of the span's keys or values.
template <CpuLevel level, bool keys, typename Fn>
LIGHTVLM_INLINE void for_tiles(const Span& span, float* room, const Fn& fn) {
    for (int d = 0; d < kMaxChannels; ++d) room[kTileTokens * kMaxChannels + d] = 0.0f;
    Tile tile;
    for (int begin = 0; begin < span.tokens; begin += kTileTokens) {
        const int count = std::min(span.tokens - begin, kTileTokens);
        set_tile<level, keys>(span, begin, count, room, &tile);
        set_next<keys>(span, begin, count, &tile.next);
        fn(&tile, begin);
    }
}

struct FloatScores {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const Span* span, SpanScratch* scratch, float* scores) {
        auto* room = reinterpret_cast<float*>(scratch->work);
        for_tiles<level, true>(*span, room, [&](Tile* tile, int begin) {
            TileScores<tile_level(level)>::run(scratch->query, tile, span->heads, span->head_dim,
                                               span->unit, scores + begin);
        });
    }
};

struct FloatValues {
    // p: [heads][kScorePitch].
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const Span* span, const float* p, SpanScratch* scratch) {
        auto* room = reinterpret_cast<float*>(scratch->work);
        for_tiles<level, false>(*span, room, [&](Tile* tile, int begin) {
            TileValues<tile_level(level)>::run(p + begin, tile, span->heads, span->head_dim,
                                               begin == 0, scratch->out);
        });
        for (int h = 0; h < span->heads; ++h) {
            float* out = scratch->out + h * kMaxChannels;
            for (int64_t d = span->head_dim; d < span->channels; ++d) out[d] = 0.0f;
            if (!is_packed(span->format)) continue;
            for (int64_t d = 0; d < span->head_dim; ++d) out[d] *= span->value_channel[d];
        }
    }
};

}  // namespace lightvlm::decode_detail
