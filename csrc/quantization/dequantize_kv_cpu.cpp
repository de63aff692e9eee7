// CPU twin of dequantize_kv.cuh: threads share tiles of tokens.
#include <algorithm>
#include <cstring>

#include "common/multiversion.h"
#include "common/parallel.h"
#include "quantization/dequantize_kv.h"
#include "quantization/packed_vector_cpu.h"

namespace lightvlm {

namespace {

constexpr int64_t kTileTokens = 64;

using quantize_detail::code_numbers;
using quantize_detail::CodeVector;
using quantize_detail::FloatVector;
using quantize_detail::kCodeGroup;
using quantize_detail::kVectorLanes;
using quantize_detail::load_group;
using quantize_detail::load_vector;
using quantize_detail::multiply_add;
using quantize_detail::store_vector;

template <typename T, int kBits>
struct UnpackKeys {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const uint8_t* codes, int64_t codes_stride, int64_t count,
                                    int64_t width, const float* scale, const float* zero, T* key,
                                    int64_t key_stride) {
        constexpr int kLanes = kVectorLanes<level>;
        for (int64_t n = 0; n < count; ++n) {
            const uint8_t* row = codes + n * codes_stride;
            T* out = key + n * key_stride;
            for (int64_t d = 0; d < width; d += kCodeGroup) {
                const CodeVector group = load_group<kBits>(row + d * kBits / 8);
                for (int i = 0; i < kCodeGroup / kLanes; ++i) {
                    const int64_t at = d + i * kLanes;
                    store_vector<kLanes>(multiply_add<level>(load_vector<kLanes>(scale + at),
                                                             code_numbers<kLanes>(group, i),
                                                             load_vector<kLanes>(zero + at)),
                                         out + at);
                }
            }
        }
    }
};

template <typename T, int kBits>
struct UnpackValues {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const uint8_t* codes, int64_t codes_stride, int64_t count,
                                    int64_t width, const half_t* token, int64_t token_stride,
                                    const float* channel, T* value, int64_t value_stride) {
        constexpr int kLanes = kVectorLanes<level>;
        for (int64_t n = 0; n < count; ++n) {
            const uint8_t* row = codes + n * codes_stride;
            T* out = value + n * value_stride;
            const FloatVector<kLanes> scale =
                FloatVector<kLanes>{} + to_float(token[n * token_stride]);
            const FloatVector<kLanes> zero =
                FloatVector<kLanes>{} + to_float(token[n * token_stride + 1]);
            for (int64_t d = 0; d < width; d += kCodeGroup) {
                const CodeVector group = load_group<kBits>(row + d * kBits / 8);
                for (int i = 0; i < kCodeGroup / kLanes; ++i) {
                    const int64_t at = d + i * kLanes;
                    store_vector<kLanes>(
                        load_vector<kLanes>(channel + at) *
                            multiply_add<level>(scale, code_numbers<kLanes>(group, i), zero),
                        out + at);
                }
            }
        }
    }
};

template <typename T, int kBits>
class Dequantize {
  public:
    explicit Dequantize(const DequantizeKvParams& params) : params_(params) {}

    Status run() const {
        FirstError error;
        for (int64_t b = 0; b < params_.batch; ++b) {
            if (length(b) < 0 || length(b) > params_.tokens) {
                error.report(kErrorLens, b, -1, static_cast<double>(length(b)));
            }
        }
        if (!error.status().ok()) return error.status();
        const int64_t tiles = (params_.tokens + kTileTokens - 1) / kTileTokens;
        const int64_t cost = kTileTokens * params_.heads * params_.head_dim / 4;
        parallel_items(params_.batch * tiles, cost, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) unpack_tile(item / tiles, item % tiles);
        });
        return {};
    }

  private:
    int64_t length(int64_t b) const {
        return params_.lens == nullptr ? params_.tokens : params_.lens[b * params_.lens_stride];
    }

    // A block is a multiple of a tile, or holds all tokens: a tile lies in one block.
    void unpack_tile(int64_t b, int64_t tile) const {
        const int64_t first = tile * kTileTokens;
        const int64_t last = std::min(first + kTileTokens, params_.tokens);
        const int64_t end = std::clamp(length(b), first, last);
        for (int64_t h = 0; h < params_.heads; ++h) {
            if (end > first) unpack_rows(b, h, first, end - first);
            clear_rows(b, h, end, last);
        }
    }

    void unpack_rows(int64_t b, int64_t h, int64_t n, int64_t count) const {
        const int64_t block = n / params_.block;
        multiversion<UnpackKeys<T, kBits>>(
            params_.key_codes + params_.key_codes_strides.at(b, h, n),
            params_.key_codes_strides.token, count, params_.head_dim,
            params_.key_scale + params_.key_scale_strides.at(b, h, block),
            params_.key_zero + params_.key_zero_strides.at(b, h, block), key(b, h, n),
            params_.key_strides.token);
        multiversion<UnpackValues<T, kBits>>(
            params_.value_codes + params_.value_codes_strides.at(b, h, n),
            params_.value_codes_strides.token, count, params_.head_dim,
            params_.value_token + params_.value_token_strides.at(b, h, n),
            params_.value_token_strides.token,
            params_.value_channel + params_.value_channel_strides.at(b, h, block), value(b, h, n),
            params_.value_strides.token);
    }

    void clear_rows(int64_t b, int64_t h, int64_t first, int64_t last) const {
        const auto bytes = static_cast<size_t>(params_.head_dim) * sizeof(T);
        for (int64_t n = first; n < last; ++n) {
            std::memset(key(b, h, n), 0, bytes);
            std::memset(value(b, h, n), 0, bytes);
        }
    }

    T* key(int64_t b, int64_t h, int64_t n) const {
        return static_cast<T*>(params_.key) + params_.key_strides.at(b, h, n);
    }
    T* value(int64_t b, int64_t h, int64_t n) const {
        return static_cast<T*>(params_.value) + params_.value_strides.at(b, h, n);
    }

    const DequantizeKvParams& params_;
};

}  // namespace

Status dequantize_kv_cpu(const DequantizeKvParams& params) {
    return dispatch_dtype(params.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        switch (params.bits) {
            case 8:
                return Dequantize<T, 8>(params).run();
            case 4:
                return Dequantize<T, 4>(params).run();
            default:
                return Dequantize<T, 2>(params).run();
        }
    });
}

}  // namespace lightvlm
