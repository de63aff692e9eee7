// decode_attention's products on tensor cores, for packed and 16-bit segments: a warp, a run of
// tokens of one segment, tile after tile out of its ring (decode_ring.cuh).
//
// Scales are folded, so that products see nothing but codes, exact in half_t:
//   logit[n] = bound_k * sum over d of (q[d] * key_scale[d] / bound_k) * (code[n, d] - middle)
//              + sum over d of q[d] * (key_zero[d] + middle * key_scale[d])
//   out[d]   = value_channel[d] * (bound_v * sum over n of (w[n] * scale[n] / bound_v)
//              * (code[n, d] - middle) + sum over n of w[n] * (zero[n] + middle * scale[n]))
// with bounds, powers of two, that keep the factors in brackets in half_t's range.
#pragma once

#include "common/block.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "decode_attention/decode_format.cuh"
#include "decode_attention/decode_ring.cuh"
#include "decode_attention/decode_run.cuh"
#include "decode_attention/decode_state.cuh"

namespace lightvlm {

// One run's query in the order of the format's keys: column g of B of every mma.
template <typename Format, bool kPrecise>
struct DecodeQuery {
    static constexpr int kPairs = Format::kWidth / 8;
    using Element = typename Format::Element;
    uint32_t high[kPairs];
    uint32_t low[kPrecise ? kPairs : 1];  // what rounding `high` left
    float factor[2];                      // logit = factor * product + offset, heads 2t, 2t + 1
    float offset[2];

    // query: fp32, of this lane's head g, zeros past head_dim. scale: of the logits, times log2(e).
    __device__ __forceinline__ void set_dense(const float* query, float scale) {
        const int t = threadIdx.x % 4;
        LIGHTVLM_UNROLL
        for (int pair = 0; pair < kPairs; ++pair) {
            high[pair] = ptx::convert_pair<Element>(query[Format::key_channel(t, pair, 0)],
                                                    query[Format::key_channel(t, pair, 1)]);
        }
        factor[0] = factor[1] = scale;
        offset[0] = offset[1] = 0.0f;
    }

    // key_scale, key_zero: of the run's block. scratch: kPairs words a lane of shared memory,
    // through which registers are filled, so that a loop need not be unrolled for their sake.
    __device__ __forceinline__ void set_packed(const float* query, const float* key_scale,
                                               const float* key_zero, int head_dim, float scale,
                                               uint32_t* scratch) {
        const int lane = threadIdx.x % kWarpThreads;
        const auto channel_of = [lane](int number) {
            return Format::key_channel(lane % 4, number / 2, number % 2);
        };
        float largest = 0.0f;
        float shift = 0.0f;
        LIGHTVLM_UNROLL_BY(4)
        for (int number = 0; number < 2 * kPairs; ++number) {
            const int channel = channel_of(number);
            if (channel >= head_dim) continue;
            const float of_channel = key_scale[channel];
            largest = fmaxf(largest, fabsf(query[channel] * of_channel));
            shift += query[channel] * (key_zero[channel] + Format::kMiddle * of_channel);
        }
        LIGHTVLM_UNROLL
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, lanes));
            shift += __shfl_xor_sync(kFullWarp, shift, lanes);
        }
        const float bound = decode_power(largest);
        const float inverse = 1.0f / bound;
        const auto folded = [&](int number) {
            const int channel = channel_of(number);
            return channel < head_dim ? query[channel] * key_scale[channel] * inverse : 0.0f;
        };
        fill(scratch, high, [&](int pair) {
            return ptx::convert_pair<half_t>(folded(2 * pair), folded(2 * pair + 1));
        });
        if constexpr (kPrecise) {
            fill(scratch, low, [&](int pair) {
                const float first = folded(2 * pair);
                const float second = folded(2 * pair + 1);
                return rest_of_pair(first, second, ptx::convert_pair<half_t>(first, second));
            });
        }
        // Lanes hold head g here, but heads 2t and 2t + 1 of the logits.
        LIGHTVLM_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int from = (lane % 4 * 2 + h) * 4;
            factor[h] = __shfl_sync(kFullWarp, bound, from) * scale;
            offset[h] = __shfl_sync(kFullWarp, shift, from) * scale;
        }
    }

    // registers[i] = word(i), each lane for itself.
    template <typename Word>
    __device__ __forceinline__ static void fill(uint32_t* scratch, uint32_t (&registers)[kPairs],
                                                Word&& word) {
        uint32_t* own = scratch + threadIdx.x % kWarpThreads;
        LIGHTVLM_UNROLL_BY(2)
        for (int i = 0; i < kPairs; ++i) own[i * kWarpThreads] = word(i);
        LIGHTVLM_UNROLL
        for (int i = 0; i < kPairs; ++i) registers[i] = own[i * kWarpThreads];
    }

    __device__ __forceinline__ static uint32_t rest_of_pair(float first, float second,
                                                            uint32_t rounded) {
        return ptx::convert_pair<half_t>(
            first - to_float(half_t{static_cast<uint16_t>(rounded)}),
            second - to_float(half_t{static_cast<uint16_t>(rounded >> 16)}));
    }
};

// product += 16 keys x 8 heads; rows: of this lane's first key and quarter.
template <typename Format, bool kPrecise>
__device__ __forceinline__ void decode_keys(const unsigned char* rows,
                                            const DecodeQuery<Format, kPrecise>& query,
                                            float (&product)[4]) {
    using Piece = DecodePiece<Format::kKeyUnit>;
    using Element = typename Format::Element;
    LIGHTVLM_UNROLL
    for (int load = 0; load < Format::kKeyLoads; ++load) {
        Piece lower(rows + load * 4 * Format::kKeyUnit);
        Piece upper(rows + load * 4 * Format::kKeyUnit + 8 * Format::kKeyPitch);
        if constexpr (Format::kSpread) {
            lower.words[0] = __byte_perm(lower.words[0], 0, 0x4140);
            upper.words[0] = __byte_perm(upper.words[0], 0, 0x4140);
        }
        LIGHTVLM_UNROLL
        for (int pair = 0; pair < Format::kUnitPairs; pair += 2) {
            uint32_t a[4];
            LIGHTVLM_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int word = (pair + i) / Format::kWordPairs;
                const int code = (pair + i) % Format::kWordPairs;
                a[2 * i] = Format::number(lower.words[word], code);
                a[2 * i + 1] = Format::number(upper.words[word], code);
            }
            const int at = load * Format::kUnitPairs + pair;
            const uint32_t b[2] = {query.high[at], query.high[at + 1]};
            ptx::mma_m16n8k16<Element>(product, a, b);
            if constexpr (kPrecise) {
                const uint32_t rest[2] = {query.low[at], query.low[at + 1]};
                ptx::mma_m16n8k16<Element>(product, a, rest);
            }
        }
    }
}

// out += 16 keys' values times weights; rows: of this lane's first key and eighth. low: what
// rounding the weights left, kPrecise only.
template <typename Format, bool kPrecise>
__device__ __forceinline__ void decode_values(const unsigned char* rows, const uint32_t (&high)[2],
                                              const uint32_t (&low)[2],
                                              DecodeAccumulator<Format::kWidth>* held) {
    using Piece = DecodePiece<Format::kValueUnit>;
    using Element = typename Format::Element;
    constexpr int kHalfCodes = Format::kPairCodes;
    LIGHTVLM_UNROLL
    for (int load = 0; load < Format::kValueLoads; ++load) {
        const unsigned char* from = rows + load * 8 * Format::kValueUnit;
        const Piece keys[4] = {Piece(from), Piece(from + Format::kValuePitch),
                               Piece(from + 8 * Format::kValuePitch),
                               Piece(from + 9 * Format::kValuePitch)};
        // Code `code` of a unit, of keys 2t and 2t + 1 (columns 0) or 2t + 8 and 2t + 9 (1).
        const auto pair_of_keys = [&keys](int code, int columns) {
            const int half = code / kHalfCodes;
            const uint32_t both =
                __byte_perm(keys[2 * columns].words[half / 2],
                            keys[2 * columns + 1].words[half / 2], half % 2 == 0 ? 0x5410 : 0x7632);
            return Format::number(both, code % kHalfCodes);
        };
        LIGHTVLM_UNROLL
        for (int code = 0; code < Format::kUnitCodes; code += 2) {
            const uint32_t a[4] = {pair_of_keys(code, 0), pair_of_keys(code + 1, 0),
                                   pair_of_keys(code, 1), pair_of_keys(code + 1, 1)};
            float (&out)[4] = held->out[(load * Format::kUnitCodes + code) / 2];
            ptx::mma_m16n8k16<Element>(out, a, high);
            if constexpr (kPrecise) ptx::mma_m16n8k16<Element>(out, a, low);
        }
    }
}

template <typename Format, bool kPrecise>
class DecodeTiles {
    using Element = typename Format::Element;
    static constexpr int kSteps = Format::kTile / 16;
    static constexpr int kLeastUnit = Format::kPacked ? 1 : 2;
    static_assert(!Format::kPacked || Format::kStageBytes >= Format::kWidth / 8 * kWarpThreads * 4,
                  "a stage is the scratch of DecodeQuery");

  public:
    // stage_bytes: of a stage of the ring.
    __device__ DecodeTiles(const DecodeRun& run, unsigned char* ring, int stage_bytes)
        : run_(run), ring_(ring), stage_bytes_(stage_bytes) {}

    // query: fp32 in shared memory, of head g. scale: of the logits, times log2(e). fresh: whether
    // *partial is to be replaced.
    __device__ __forceinline__ void attend(const float* query, int head_dim, float scale,
                                           bool fresh, DecodePartial<Format::kWidth>* partial) {
        DecodeAccumulator<Format::kWidth> held;
        DecodeQuery<Format, kPrecise> folded;
        int32_t n = run_.first;
        int stage = 0;
        fetch(n, stage);
        while (n < run_.end) {
            int32_t end = run_.end;
            int64_t channels = 0;  // where those of the block begin
            held.clear();
            if constexpr (Format::kPacked) {
                const int32_t block = n / run_.block;
                end = static_cast<int32_t>(min(int64_t{end}, int64_t{block + 1} * run_.block));
                channels = int64_t{block} * head_dim;
                // The other stage is free: its tile is computed, its next not under way yet.
                __syncwarp();
                folded.set_packed(query, run_.key_scale + channels, run_.key_zero + channels,
                                  head_dim, scale,
                                  reinterpret_cast<uint32_t*>(ring_ + (stage ^ 1) * stage_bytes_));
            } else {
                folded.set_dense(query, scale);
            }
            for (; n < end; n += Format::kTile) {
                __syncwarp();
                if (run_.end - n > Format::kTile) {
                    fetch(n + Format::kTile, stage ^ 1);
                } else {
                    ptx::cp_async_commit();
                }
                ptx::cp_async_wait<1>();
                __syncwarp();
                add_tile(ring_ + stage * stage_bytes_, n, folded, &held);
                stage ^= 1;
            }
            held.template flush<Format>(Format::kPacked ? run_.value_channel + channels : nullptr,
                                        head_dim, fresh, partial);
            fresh = false;
        }
        ptx::cp_async_wait<0>();
    }

  private:
    __device__ __forceinline__ int count(int32_t n) const {
        return min(run_.end - n, Format::kTile);
    }

    // Starts the copy of the tile from token n on.
    __device__ __forceinline__ void fetch(int32_t n, int stage) const {
        unsigned char* to = ring_ + stage * stage_bytes_;
        if constexpr (!Format::kPacked) {
            if (run_.pages != nullptr) return fetch_pages(n, to);
        }
        copy_decode_rows<kLeastUnit, Format::kTile, Format::kRowBytes, Format::kKeyPitch>(
            run_.keys, n, count(n), to);
        copy_decode_rows<kLeastUnit, Format::kTile, Format::kRowBytes, Format::kValuePitch>(
            run_.values, n, count(n), to + Format::kValueOffset);
        if constexpr (Format::kPacked) {
            copy_decode_rows<2, Format::kTile, 4, 4>(run_.tokens, n, count(n),
                                                     to + Format::kTokenOffset);
        }
        ptx::cp_async_commit();
    }

    __device__ __forceinline__ void fetch_pages(int32_t n, unsigned char* to) const {
        const int keys = count(n);
        // One look at the table for a row's key and value.
        const DecodePlace place(run_,
                                n + min(static_cast<int>(threadIdx.x % kWarpThreads), keys - 1));
        copy_decode_pages<kLeastUnit, Format::kTile, Format::kRowBytes, Format::kKeyPitch>(
            run_.keys, place, keys, to);
        copy_decode_pages<kLeastUnit, Format::kTile, Format::kRowBytes, Format::kValuePitch>(
            run_.values, place, keys, to + Format::kValueOffset);
        ptx::cp_async_commit();
    }

    __device__ __forceinline__ void add_tile(const unsigned char* tile, int32_t n,
                                             const DecodeQuery<Format, kPrecise>& query,
                                             DecodeAccumulator<Format::kWidth>* held) const {
        const int lane = threadIdx.x % kWarpThreads;
        const int g = lane / 4;
        const int t = lane % 4;
        const int keys = count(n);
        float logits[kSteps][4];
        LIGHTVLM_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            float product[4] = {};
            decode_keys<Format, kPrecise>(
                tile + (step * 16 + g) * Format::kKeyPitch + t * Format::kKeyUnit, query, product);
            LIGHTVLM_UNROLL
            for (int j = 0; j < 4; ++j) {
                const bool valid = step * 16 + j / 2 * 8 + g < keys;
                logits[step][j] =
                    valid ? product[j] * query.factor[j % 2] + query.offset[j % 2] : -CUDART_INF_F;
            }
        }
        held->weigh(logits);
        keep_decode_weights<kPrecise>(logits, n, keys, *held, run_);
        if constexpr (Format::kPacked) scale_weights(tile + Format::kTokenOffset, logits, held);

        LIGHTVLM_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            uint32_t high[2];
            uint32_t low[2] = {};
            LIGHTVLM_UNROLL
            for (int upper = 0; upper < 2; ++upper) {
                const float first = logits[step][2 * upper];
                const float second = logits[step][2 * upper + 1];
                const uint32_t pair = ptx::convert_pair<Element>(first, second);
                high[upper] = ptx::movmatrix_transpose(pair);
                if constexpr (kPrecise) {
                    low[upper] = ptx::movmatrix_transpose(
                        DecodeQuery<Format, kPrecise>::rest_of_pair(first, second, pair));
                }
            }
            decode_values<Format, kPrecise>(tile + Format::kValueOffset +
                                                (step * 16 + 2 * t) * Format::kValuePitch +
                                                g * Format::kValueUnit,
                                            high, low, held);
        }
    }

    // Multiplies the weights by their tokens' scales, over held->bound, and sums the zeros.
    __device__ __forceinline__ void scale_weights(const unsigned char* tokens,
                                                  float (&weights)[kSteps][4],
                                                  DecodeAccumulator<Format::kWidth>* held) const {
        const int g = threadIdx.x % kWarpThreads / 4;
        float scales[kSteps][2];
        float largest = 0.0f;
        LIGHTVLM_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            LIGHTVLM_UNROLL
            for (int upper = 0; upper < 2; ++upper) {
                const uint32_t pair =
                    reinterpret_cast<const uint32_t*>(tokens)[step * 16 + upper * 8 + g];
                const float scale = to_float(half_t{static_cast<uint16_t>(pair)});
                const float zero = to_float(half_t{static_cast<uint16_t>(pair >> 16)});
                LIGHTVLM_UNROLL
                for (int h = 0; h < 2; ++h) {
                    held->zero[h] +=
                        weights[step][2 * upper + h] * (zero + Format::kMiddle * scale);
                }
                scales[step][upper] = scale;
                largest = fmaxf(largest, fabsf(scale));
            }
        }
        if (__any_sync(kFullWarp, largest > held->bound)) {
            LIGHTVLM_UNROLL
            for (int lanes = 4; lanes < kWarpThreads; lanes *= 2) {
                largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, lanes));
            }
            const float bound = decode_power(largest);
            held->scale_out(held->bound / bound, held->bound / bound);
            held->bound = bound;
        }
        const float inverse = 1.0f / held->bound;
        LIGHTVLM_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            LIGHTVLM_UNROLL
            for (int j = 0; j < 4; ++j) weights[step][j] *= scales[step][j / 2] * inverse;
        }
    }

    const DecodeRun& run_;
    unsigned char* ring_;
    int stage_bytes_;
};

}  // namespace lightvlm
