// CPU twin of quantize_kv.cuh. Three sweeps, so that nothing is written before every entry is known
// to be finite: extremes of parts of each block; from them the channel parameters; the codes.
// Threads share the parts, then the blocks, then tiles of tokens.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "quantization/quantize_kv.h"
#include "quantization/quantize_rows_cpu.h"

namespace lightvlm {

namespace {

using quantize_detail::ChannelNumbers;
using quantize_detail::Extremes;
using quantize_detail::Rows;

constexpr int64_t kPartTokens = 256;
constexpr int64_t kTileTokens = 128;
// Tokens of one head that are looked at before those of the next: few where heads lie side by side
// in memory, all of the part or tile where each has a place of its own, so that memory is read in
// order.
constexpr int64_t kSideBySideTokens = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
class Quantize {
  public:
    explicit Quantize(const QuantizeKvParams& params)
        : params_(params),
          parts_(ceil_div(std::min(params.block, params.tokens), kPartTokens)),
          heads_(params.heads),
          group_(params.key_strides.token > params.key_strides.head ? kSideBySideTokens
                                                                    : kPartTokens) {}

    Status run() {
        FirstError error;
        for (int64_t b = 0; b < params_.batch; ++b) {
            if (length(b) < 0 || length(b) > params_.tokens) {
                error.report(kErrorLens, b, -1, static_cast<double>(length(b)));
            }
        }
        if (!error.status().ok()) return error.status();
        if (!find_extremes()) {
            find_not_finite(error);
            return error.status();
        }
        write_channels();
        switch (params_.bits) {
            case 8:
                pack<8>();
                break;
            case 4:
                pack<4>();
                break;
            default:
                pack<2>();
        }
        return {};
    }

  private:
    int64_t length(int64_t b) const {
        return params_.lens == nullptr ? params_.tokens : params_.lens[b * params_.lens_stride];
    }
    // How many of `count` tokens from `first` on are valid.
    int64_t valid(int64_t b, int64_t first, int64_t count) const {
        return std::clamp<int64_t>(length(b) - first, 0, count);
    }
    int64_t block_tokens(int64_t block) const {
        return std::min(params_.block, params_.tokens - block * params_.block);
    }
    Rows<T> key(int64_t b, int64_t h, int64_t n) const {
        return {static_cast<const T*>(params_.key) + params_.key_strides.at(b, h, n),
                params_.key_strides.token};
    }
    Rows<T> value(int64_t b, int64_t h, int64_t n) const {
        return {static_cast<const T*>(params_.value) + params_.value_strides.at(b, h, n),
                params_.value_strides.token};
    }

    // False where something valid is not finite.
    bool find_extremes() {
        const int64_t items = params_.batch * params_.blocks * parts_;
        extremes_.resize(static_cast<size_t>(items * heads_));
        std::atomic<bool> finite{true};
        const int64_t cost = std::min(kPartTokens, params_.block) * heads_ * params_.head_dim / 8;
        parallel_items(items, cost, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                if (!find_part(item)) finite = false;
            }
        });
        return finite;
    }

    bool find_part(int64_t item) {
        const int64_t part = item % parts_;
        const int64_t block = item / parts_ % params_.blocks;
        const int64_t b = item / parts_ / params_.blocks;
        const int64_t skipped = part * kPartTokens;
        const int64_t first = block * params_.block + skipped;
        const int64_t count =
            valid(b, first, std::clamp<int64_t>(block_tokens(block) - skipped, 0, kPartTokens));
        Extremes<T>* extremes = &extremes_[item * heads_];
        for (int64_t h = 0; h < heads_; ++h) extremes[h].clear();
        for (int64_t n = 0; n < count; n += group_) {
            for (int64_t h = 0; h < heads_; ++h) {
                multiversion<quantize_detail::RaiseExtremes<T>>(
                    key(b, h, first + n), value(b, h, first + n), std::min(group_, count - n),
                    params_.head_dim, &extremes[h]);
            }
        }
        bool finite = true;
        constexpr auto kInfinity = quantize_detail::kInfinityBits<T>;
        for (int64_t h = 0; h < heads_ && count > 0; ++h) {
            for (int64_t d = 0; d < params_.head_dim; ++d) {
                finite = finite && extremes[h].low[d] > ~kInfinity &&
                         extremes[h].high[d] < kInfinity && extremes[h].largest[d] < kInfinity;
            }
        }
        return finite;
    }

    void find_not_finite(FirstError& error) const {
        const int64_t width = params_.head_dim;
        const int64_t half = params_.tokens * heads_ * width;
        for (int64_t b = 0; b < params_.batch; ++b) {
            for (int64_t i = 0; i < 2 * half; ++i) {
                const QuantizePosition at = quantize_position(params_, i);
                if (at.token >= length(b)) continue;
                const Rows<T> rows =
                    at.is_value ? value(b, at.head, at.token) : key(b, at.head, at.token);
                const float found = to_float(rows.data[at.channel]);
                if (std::isfinite(found)) continue;
                error.report(kErrorNotFinite, b, i, found);
                return;
            }
        }
    }

    // Folds the parts, writes the channel parameters, and keeps what codes are made with.
    void write_channels() {
        numbers_.resize(static_cast<size_t>(params_.batch * params_.blocks * heads_));
        const int64_t cost = params_.head_dim * (parts_ + 16);
        parallel_items(params_.batch * params_.blocks * heads_, cost,
                       [&](int64_t begin, int64_t end) {
                           for (int64_t item = begin; item < end; ++item) write_channels_of(item);
                       });
    }

    void write_channels_of(int64_t item) {
        const int64_t h = item % heads_;
        const int64_t block = item / heads_ % params_.blocks;
        const int64_t b = item / heads_ / params_.blocks;
        const int64_t width = params_.head_dim;
        const float levels = params_.levels();
        Extremes<T> all = extremes_[item / heads_ * parts_ * heads_ + h];
        for (int64_t part = 1; part < parts_; ++part) {
            const Extremes<T>& one = extremes_[(item / heads_ * parts_ + part) * heads_ + h];
            for (int64_t d = 0; d < width; ++d) {
                all.low[d] = std::min(all.low[d], one.low[d]);
                all.high[d] = std::max(all.high[d], one.high[d]);
                all.largest[d] = std::max(all.largest[d], one.largest[d]);
            }
        }
        if (valid(b, block * params_.block, block_tokens(block)) == 0) {
            std::fill_n(all.low, width, Ordered{0});
            std::fill_n(all.high, width, Ordered{0});
        }
        ChannelNumbers& numbers = numbers_[item];
        float* scale = params_.key_scale + params_.key_scale_strides.at(b, h, block);
        float* zero = params_.key_zero + params_.key_zero_strides.at(b, h, block);
        float* channel = params_.value_channel + params_.value_channel_strides.at(b, h, block);
        Ordered largest = 0;
        for (int64_t d = 0; d < width; ++d) {
            zero[d] =
                quantize_detail::from_ordered<T>(all.low[d]) + 0.0f;  // of -0 and 0, the latter
            scale[d] = key_scale_of(zero[d], quantize_detail::from_ordered<T>(all.high[d]), levels);
            numbers.half_zero[d] = rounded_product(zero[d], 0.5f);
            numbers.inverse[d] = key_inverse(scale[d]);
            largest = std::max(largest, all.largest[d]);
        }
        const float factor =
            value_factor(value_root(quantize_detail::from_ordered<T>(largest)), levels);
        for (int64_t d = 0; d < width; ++d) {
            channel[d] = value_root(quantize_detail::from_ordered<T>(all.largest[d])) * factor;
            numbers.weight[d] = 1.0f / channel[d];
        }
    }

    template <int kBits>
    void pack() {
        const int64_t tiles = ceil_div(std::min(params_.block, params_.tokens), kTileTokens);
        const int64_t cost = std::min(kTileTokens, params_.block) * heads_ * params_.head_dim / 4;
        parallel_items(params_.batch * params_.blocks * tiles, cost,
                       [&](int64_t begin, int64_t end) {
                           for (int64_t item = begin; item < end; ++item) {
                               pack_tile<kBits>(item / tiles, item % tiles);
                           }
                       });
    }

    template <int kBits>
    void pack_tile(int64_t batch_block, int64_t tile) {
        const int64_t block = batch_block % params_.blocks;
        const int64_t b = batch_block / params_.blocks;
        const int64_t skipped = tile * kTileTokens;
        const int64_t first = block * params_.block + skipped;
        const int64_t last =
            first + std::clamp<int64_t>(block_tokens(block) - skipped, 0, kTileTokens);
        const int64_t end = first + valid(b, first, last - first);
        for (int64_t n = first; n < end; n += group_) {
            for (int64_t h = 0; h < heads_; ++h) {
                pack_rows<kBits>(b, h, n, std::min(group_, end - n),
                                 numbers_[batch_block * heads_ + h]);
            }
        }
        clear_rows(b, end, last);
    }

    template <int kBits>
    void pack_rows(int64_t b, int64_t h, int64_t n, int64_t count, const ChannelNumbers& numbers) {
        multiversion<quantize_detail::PackKeys<T, kBits>>(
            key(b, h, n), count, params_.head_dim, &numbers,
            params_.key_codes + params_.key_codes_strides.at(b, h, n),
            params_.key_codes_strides.token);
        multiversion<quantize_detail::PackValues<T, kBits>>(
            value(b, h, n), count, params_.head_dim, &numbers,
            params_.value_codes + params_.value_codes_strides.at(b, h, n),
            params_.value_codes_strides.token,
            params_.value_token + params_.value_token_strides.at(b, h, n),
            params_.value_token_strides.token);
    }

    void clear_rows(int64_t b, int64_t first, int64_t last) {
        const auto bytes = static_cast<size_t>(packed_row_bytes(params_.head_dim, params_.bits));
        for (int64_t h = 0; h < heads_; ++h) {
            for (int64_t n = first; n < last; ++n) {
                std::memset(params_.key_codes + params_.key_codes_strides.at(b, h, n), 0, bytes);
                std::memset(params_.value_codes + params_.value_codes_strides.at(b, h, n), 0,
                            bytes);
                half_t* token = params_.value_token + params_.value_token_strides.at(b, h, n);
                token[0] = token[1] = half_t{0};
            }
        }
    }

    using Ordered = quantize_detail::Ordered<T>;

    const QuantizeKvParams& params_;
    const int64_t parts_;  // of a block
    const int64_t heads_;
    const int64_t group_;                  // tokens of one head at a time
    std::vector<Extremes<T>> extremes_;    // [batch, blocks, parts, heads]
    std::vector<ChannelNumbers> numbers_;  // [batch, blocks, heads]
};

}  // namespace

Status quantize_kv_cpu(const QuantizeKvParams& params) {
    return dispatch_dtype(params.dtype, [&](auto tag) {
        return Quantize<typename decltype(tag)::type>(params).run();
    });
}

}  // namespace lightvlm
