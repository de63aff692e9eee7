// CPU twin of decode_attention.cuh, in three phases that each split into items of their own:
//
//   1. attend  an item is kItemTokens tokens of one segment, batch row and key/value head against
//              up to 8 heads of its group: span after span (decode_span_cpu.h), its maximum, sum
//              and output go to the workspace, and the exponentials where mass is wanted;
//   2. merge   an item is a query head: the parts of phase 1 in order, giving out and lse;
//   3. mass    an item is the tokens of one item of phase 1: exponentials times what phase 2 knows.
//
// Sizes alone decide the items, so that the result does not depend on the number of threads. Batch
// rows go in rounds that keep the workspace small.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "common/parallel.h"
#include "decode_attention/decode_attention.h"
#include "decode_attention/decode_bf16_cpu.h"
#include "decode_attention/decode_dense_cpu.h"
#include "decode_attention/decode_float_cpu.h"
#include "decode_attention/decode_packed_cpu.h"
#include "decode_attention/decode_pages_cpu.h"
#include "decode_attention/decode_softmax_cpu.h"
#include "decode_attention/decode_span_cpu.h"

namespace lightvlm {

namespace {

using namespace decode_detail;

constexpr int64_t kItemTokens = 512;
constexpr int64_t kRunItems = 4;
// Spans begin at multiples of it, or where the row's tokens begin.
constexpr int64_t kSpanGrid = kPackedBlockMultiple;
constexpr int64_t kItemWeights = kItemTokens / kSpanTokens * kScorePitch;  // of a head
constexpr int64_t kItemSpans = kItemTokens / kSpanGrid;
constexpr int64_t kRoundBytes = int64_t{64} << 20;  // of workspace, unless a row takes more
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.693147181f;
constexpr float kLog2E = 1.44269504f;

// Of what strides count.
int64_t element_bytes(KVFormat format) {
    return is_packed(format) ? 1 : format == KVFormat::kFloat32 ? 4 : 2;
}

struct TokenRange {
    int64_t begin;
    int64_t end;
};

// Of a batch row; not checked.
TokenRange valid_tokens(const KVSegmentParams& segment, int64_t b) {
    return {segment.begin(b), segment.end(b)};
}

// How the workspace is laid out; everything in floats.
struct Layout {
    explicit Layout(const DecodeAttentionParams& params)
        : group(params.group()),
          channels(packed_channels(params.head_dim)),
          wants_mass(params.wants_mass()) {
        for (int64_t s = 0; s < params.segments; ++s) {
            first_slot[s] = slots;
            slots += (params.segment[s].tokens + kItemTokens - 1) / kItemTokens;
        }
        first_slot[params.segments] = slots;
        slot_floats = group * (2 + channels);
        if (wants_mass) slot_floats += group * (kItemWeights + kItemSpans);
        head_floats = slots * slot_floats + group * 2;
        row_floats = params.key_heads * head_floats;
        const int64_t row_bytes = std::max<int64_t>(1, row_floats * int64_t{sizeof(float)});
        round_rows =
            std::clamp<int64_t>(kRoundBytes / row_bytes, 1, std::max<int64_t>(1, params.batch));
    }

    int64_t group;
    int64_t channels;
    bool wants_mass;
    int64_t first_slot[kDecodeMaxSegments + 1];
    int64_t slots = 0;  // items of phase 1 for one key/value head and head tile
    int64_t slot_floats;
    int64_t head_floats;
    int64_t row_floats;
    int64_t round_rows;
};

// What phase 1 leaves of a slot: [group] each, and [group][channels],
// [kItemTokens / kSpanTokens][group][kScorePitch], [kItemSpans][group].
struct Part {
    Part(const Layout& layout, float* at)
        : highest(at),
          sum(highest + layout.group),
          out(sum + layout.group),
          weights(out + layout.group * layout.channels),
          span_highest(weights + layout.group * kItemWeights) {}

    float* highest;
    float* sum;
    float* out;
    float* weights;
    float* span_highest;
};

// The ways to a span's scores and values.
enum class Way { kFloat, kPacked, kBf16, kDense };

Way choose_way(KVFormat format, DType dtype, int64_t heads) {
#if defined(__x86_64__)
    const CpuLevel level = cpu_level(CpuLevel::kAvx512Bf16);
    if (is_packed(format)) {
        // What integers leave out would be too much beside fp32.
        const bool fine = dtype == DType::kFloat32;
        return level >= CpuLevel::kAvx512Vnni && !fine ? Way::kPacked : Way::kFloat;
    }
    const bool bf16 = format == KVFormat::kBFloat16 && dtype == DType::kBFloat16;
    if (bf16 && level >= CpuLevel::kAvx512Bf16) return Way::kBf16;
    // So few heads do not pay for transposing keys, which are as wide as what is computed with.
    const bool as_they_lie = format == KVFormat::kFloat32 && heads <= 3;
    if (level >= CpuLevel::kAvx512 && !as_they_lie) return Way::kDense;
#endif
    return Way::kFloat;
}

void compute_scores(Way way, const Span& span, SpanScratch* scratch, float* scores) {
#if defined(__x86_64__)
    if (way == Way::kPacked) return packed_scores(span, scratch, scores);
    if (way == Way::kBf16) return bf16_scores(span, scratch, scores);
    if (way == Way::kDense) return dense_scores(span, scratch, scores);
#endif
    multiversion<FloatScores>(&span, scratch, scores);
}

void compute_values(Way way, const Span& span, const float* p, SpanScratch* scratch) {
#if defined(__x86_64__)
    if (way == Way::kPacked) return packed_values(span, p, scratch);
    if (way == Way::kBf16) return bf16_values(span, p, scratch);
    if (way == Way::kDense) return dense_values(span, p, scratch);
#endif
    multiversion<FloatValues>(&span, p, scratch);
}

// Adds a span to what came before it: highest, sum and out of one head.
struct AddSpan {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const float* span_out, float keep, float add, int64_t channels,
                                    float* out) {
        for (int64_t d = 0; d < channels; ++d) out[d] = out[d] * keep + span_out[d] * add;
    }
};

struct AddMass {
    template <CpuLevel level>
    static LIGHTVLM_INLINE void run(const float* weights, const float* factor, int64_t group,
                                    int64_t tokens, float* mass) {
        constexpr int kLanes = 16;
        int64_t n = 0;
        for (; n + kLanes <= tokens; n += kLanes) {
            float sum[kLanes] = {};
            for (int64_t h = 0; h < group; ++h) {
                const float* row = weights + h * kScorePitch + n;
                for (int lane = 0; lane < kLanes; ++lane) sum[lane] += factor[h] * row[lane];
            }
            for (int lane = 0; lane < kLanes; ++lane) mass[n + lane] += sum[lane];
        }
        for (; n < tokens; ++n) {
            float sum = 0.0f;
            for (int64_t h = 0; h < group; ++h) sum += factor[h] * weights[h * kScorePitch + n];
            mass[n] += sum;
        }
    }
};

class Decoder {
  public:
    explicit Decoder(const DecodeAttentionParams& params) : params_(params), layout_(params) {
        tiles_ = (layout_.group + kHeadTile - 1) / kHeadTile;
        const KVSegmentParams* end = params.segment + params.segments;
        const KVSegmentParams* largest = std::max_element(
            params.segment, end, [](const auto& a, const auto& b) { return a.tokens < b.tokens; });
        heads_beside_ = largest != end && largest->key_head_stride < largest->key_token_stride;
    }

    void run() {
        for (int64_t first = 0; first < params_.batch; first += layout_.round_rows) {
            round_ = {first, std::min(first + layout_.round_rows, params_.batch)};
            const int64_t heads = (round_.end - round_.begin) * params_.key_heads;
            const int64_t width = params_.head_dim * layout_.group / 8;
            const int64_t items = heads * layout_.slots * tiles_;
            // Runs of items, as each fetches what the next will read, but some for every thread.
            const int64_t threads = torch::stable::get_num_threads();
            const int64_t of_run = std::clamp<int64_t>(items / (4 * threads), 1, kRunItems);
            const int64_t tokens = valid_in_round() / std::max<int64_t>(1, layout_.slots);
            parallel_dynamic((items + of_run - 1) / of_run,
                             of_run * tokens * width / (round_.end - round_.begin),
                             [&](int64_t run) {
                                 const int64_t end = std::min(items, (run + 1) * of_run);
                                 for (int64_t i = run * of_run; i < end; ++i) attend(i);
                             });
            parallel_items(heads * layout_.group, (layout_.slots + 1) * layout_.channels / 8,
                           [&](int64_t begin, int64_t end) {
                               for (int64_t item = begin; item < end; ++item) merge(item);
                           });
            if (!layout_.wants_mass) continue;
            parallel_items(heads * layout_.slots, kItemTokens * layout_.group / 8,
                           [&](int64_t begin, int64_t end) {
                               for (int64_t item = begin; item < end; ++item) add_mass(item);
                           });
        }
    }

  private:
    // Key/value head `head` of the round: row b, head kv.
    float* head_space(int64_t head) const {
        return static_cast<float*>(params_.workspace) + head * layout_.head_floats;
    }
    Part part(int64_t head, int64_t slot) const {
        return Part(layout_, head_space(head) + slot * layout_.slot_floats);
    }
    float* totals(int64_t head) const {
        return head_space(head) + layout_.slots * layout_.slot_floats;
    }
    int64_t segment_of(int64_t slot) const {
        int64_t s = 0;
        while (slot >= layout_.first_slot[s + 1]) ++s;
        return s;
    }
    int64_t valid_in_round() const {
        int64_t tokens = 0;
        for (int64_t b = round_.begin; b < round_.end; ++b) {
            for (int64_t s = 0; s < params_.segments; ++s) {
                const TokenRange valid = valid_tokens(params_.segment[s], b);
                tokens += valid.end - valid.begin;
            }
        }
        return tokens;
    }
    // The valid tokens of a slot.
    TokenRange slot_tokens(int64_t b, int64_t s, int64_t slot) const {
        const int64_t first = (slot - layout_.first_slot[s]) * kItemTokens;
        const TokenRange valid = valid_tokens(params_.segment[s], b);
        return {std::max(first, valid.begin), std::min(first + kItemTokens, valid.end)};
    }
    // Weights and maxima of the group in the span that begins with token `begin`.
    float* span_weights(const Part& part, int64_t begin) const {
        const int64_t at = begin % kItemTokens;
        return part.weights + at / kSpanTokens * layout_.group * kScorePitch + at % kSpanTokens;
    }
    float* span_highest(const Part& part, int64_t begin) const {
        return part.span_highest + begin % kItemTokens / kSpanGrid * layout_.group;
    }
    static int64_t span_end(const KVSegmentParams& segment, int64_t begin, int64_t end) {
        end = std::min(end, (begin / kSpanTokens + 1) * kSpanTokens);
        if (is_packed(segment.format)) {
            end = std::min(end, (begin / segment.block + 1) * segment.block);
        }
        return end;
    }

    // Heads [first_head, first_head + heads) of the group, before tokens are chosen.
    Span make_span(const KVSegmentParams& segment, int64_t heads) const {
        Span span{};
        span.format = segment.format;
        span.bits = is_packed(segment.format) ? packed_bits(segment.format) : 0;
        span.heads = static_cast<int>(heads);
        span.head_dim = params_.head_dim;
        span.in_pages = segment.paged();
        span.channels = layout_.channels;
        span.unit = params_.scale * kLog2E;
        span.value_token_stride = segment.value_token_token_stride;
        return span;
    }

    // pages: of a paged segment, else null.
    void set_tokens(const KVSegmentParams& segment, int64_t b, int64_t kv, TokenRange tokens,
                    SpanPages* pages, Span* span) const {
        span->tokens = static_cast<int>(tokens.end - tokens.begin);
        if (pages != nullptr) return pages->set(tokens.begin, tokens.end, span);
        const int64_t size = element_bytes(segment.format);
        const auto rows_at = [&](const void* data, int64_t batch, int64_t head, int64_t token) {
            return StridedRows{static_cast<const char*>(data) +
                                   (b * batch + kv * head + tokens.begin * token) * size,
                               token * size};
        };
        span->strided.key = rows_at(segment.key, segment.key_batch_stride, segment.key_head_stride,
                                    segment.key_token_stride);
        span->strided.value = rows_at(segment.value, segment.value_batch_stride,
                                      segment.value_head_stride, segment.value_token_stride);
        span->strided.next_key = {span->strided.key[span->tokens], span->strided.key.stride};
        if (!is_packed(segment.format)) return;
        const int64_t block =
            (b * params_.key_heads + kv) * segment.blocks + tokens.begin / segment.block;
        span->key_scale = segment.key_scale + block * params_.head_dim;
        span->key_zero = segment.key_zero + block * params_.head_dim;
        span->value_channel = segment.value_channel + block * params_.head_dim;
        span->value_token = segment.value_token + b * segment.value_token_batch_stride +
                            kv * segment.value_token_head_stride +
                            tokens.begin * segment.value_token_token_stride;
    }

    void load_query(int64_t b, int64_t head, int64_t heads, float* query) const {
        dispatch_dtype(params_.dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            for (int64_t h = 0; h < heads; ++h) {
                const T* from = static_cast<const T*>(params_.query) +
                                b * params_.query_batch_stride +
                                (head + h) * params_.query_head_stride;
                float* to = query + h * kMaxChannels;
                for (int64_t d = 0; d < params_.head_dim; ++d) to[d] = to_float(from[d]);
                for (int64_t d = params_.head_dim; d < layout_.channels; ++d) to[d] = 0.0f;
            }
        });
    }

    void attend(int64_t item) const {
        const int64_t tile = item % tiles_;
        const int64_t rest = item / tiles_;
        const int64_t heads_inside = heads_beside_ ? params_.key_heads : 1;
        const int64_t slot = rest / heads_inside % layout_.slots;
        const int64_t head =
            rest / heads_inside / layout_.slots * heads_inside + rest % heads_inside;
        const int64_t b = round_.begin + head / params_.key_heads;
        const int64_t kv = head % params_.key_heads;
        const int64_t s = segment_of(slot);
        const KVSegmentParams& segment = params_.segment[s];
        const int64_t first = tile * kHeadTile;
        const int64_t heads = std::min<int64_t>(kHeadTile, layout_.group - first);
        const Part to = part(head, slot);
        std::fill(to.highest + first, to.highest + first + heads, kNothing);
        std::fill(to.sum + first, to.sum + first + heads, 0.0f);
        const TokenRange tokens = slot_tokens(b, s, slot);
        if (tokens.begin >= tokens.end) return;

        SpanScratch scratch;
        load_query(b, kv * layout_.group + first, heads, scratch.query);
        Span span = make_span(segment, heads);
        std::optional<SpanPages> pages;
        if (segment.paged()) {
            pages.emplace(segment, b, kv, valid_tokens(segment, b).end,
                          element_bytes(segment.format));
        }
        const Way way = choose_way(segment.format, params_.dtype, heads);
        for (int64_t begin = tokens.begin; begin < tokens.end;) {
            const int64_t end = span_end(segment, begin, tokens.end);
            set_tokens(segment, b, kv, {begin, end}, pages ? &*pages : nullptr, &span);
            // The weights are computed where they will stay.
            float* weights = segment.mass == nullptr
                                 ? scratch.scores
                                 : span_weights(to, begin) + first * kScorePitch;
            compute_scores(way, span, &scratch, weights);
            multiversion<SpanSoftmax>(span.heads, span.tokens, weights, scratch.highest,
                                      scratch.sum);
            if (segment.mass != nullptr) {
                std::copy(scratch.highest, scratch.highest + heads,
                          span_highest(to, begin) + first);
            }
            compute_values(way, span, weights, &scratch);
            for (int64_t h = 0; h < heads; ++h) {
                add_span(scratch, h, begin == tokens.begin, to.highest + first + h,
                         to.sum + first + h, to.out + (first + h) * layout_.channels);
            }
            begin = end;
        }
    }

    void add_span(const SpanScratch& scratch, int64_t h, bool is_first, float* highest, float* sum,
                  float* out) const {
        const float* span_out = scratch.out + h * kMaxChannels;
        if (is_first) {
            *highest = scratch.highest[h];
            *sum = scratch.sum[h];
            std::copy(span_out, span_out + layout_.channels, out);
            return;
        }
        const float most = std::max(*highest, scratch.highest[h]);
        const float shift = most > kNothing ? most : 0.0f;
        const float keep = std::exp2(*highest - shift);
        const float add = std::exp2(scratch.highest[h] - shift);
        *highest = most;
        *sum = *sum * keep + scratch.sum[h] * add;
        multiversion<AddSpan>(span_out, keep, add, layout_.channels, out);
    }

    // Query head `item` of the round.
    void merge(int64_t item) const {
        const int64_t head = item / layout_.group;
        const int64_t h = item % layout_.group;
        float highest = kNothing;
        for (int64_t slot = 0; slot < layout_.slots; ++slot) {
            highest = std::max(highest, part(head, slot).highest[h]);
        }
        const float shift = highest > kNothing ? highest : 0.0f;
        float out[kMaxChannels] = {};
        float sum = 0.0f;
        for (int64_t slot = 0; slot < layout_.slots; ++slot) {
            const Part from = part(head, slot);
            if (from.sum[h] == 0.0f) continue;  // saw nothing; its out may not even be written
            const float factor = std::exp2(from.highest[h] - shift);
            sum += from.sum[h] * factor;
            multiversion<AddSpan>(from.out + h * layout_.channels, 1.0f, factor, layout_.channels,
                                  out);
        }
        totals(head)[h] = shift;
        totals(head)[layout_.group + h] = sum;
        const int64_t b = round_.begin + head / params_.key_heads;
        const int64_t row = b * params_.query_heads + head % params_.key_heads * layout_.group + h;
        params_.lse[row] = sum == 0.0f ? kNothing : shift * kLn2 + std::log(sum);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        dispatch_dtype(params_.dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            T* to = static_cast<T*>(params_.out) + row * params_.head_dim;
            for (int64_t d = 0; d < params_.head_dim; ++d) to[d] = from_float<T>(out[d] * inverse);
        });
    }

    void add_mass(int64_t item) const {
        const int64_t slot = item % layout_.slots;
        const int64_t head = item / layout_.slots;
        const int64_t b = round_.begin + head / params_.key_heads;
        const int64_t kv = head % params_.key_heads;
        const int64_t s = segment_of(slot);
        const KVSegmentParams& segment = params_.segment[s];
        const TokenRange tokens = slot_tokens(b, s, slot);
        if (segment.mass == nullptr || tokens.begin >= tokens.end) return;
        float* mass = segment.mass + b * segment.mass_batch_stride + kv * segment.mass_head_stride;
        const Part from = part(head, slot);
        const float* shift = totals(head);
        const float* sum = shift + layout_.group;
        for (int64_t begin = tokens.begin; begin < tokens.end;) {
            const int64_t end = span_end(segment, begin, tokens.end);
            // Phase 2 is done with this part's sums.
            float* factor = from.sum;
            for (int64_t h = 0; h < layout_.group; ++h) {
                const float highest = span_highest(from, begin)[h];
                factor[h] = sum[h] == 0.0f ? 0.0f
                                           : std::exp2(highest - shift[h]) /
                                                 (sum[h] * static_cast<float>(layout_.group));
            }
            multiversion<AddMass>(static_cast<const float*>(span_weights(from, begin)),
                                  static_cast<const float*>(factor), layout_.group, end - begin,
                                  mass + begin);
            begin = end;
        }
    }

    const DecodeAttentionParams& params_;
    Layout layout_;
    int64_t tiles_;
    // Whether the largest segment has its heads side by side: then these are items that follow each
    // other, as they share memory pages.
    bool heads_beside_ = false;
    TokenRange round_{0, 0};  // batch rows
};

}  // namespace

int64_t decode_attention_cpu_workspace(const DecodeAttentionParams& params) {
    const Layout layout(params);
    return layout.round_rows * layout.row_floats * int64_t{sizeof(float)};
}

Status check_decode_tokens(const DecodeAttentionParams& params) {
    FirstError error;
    for (int64_t b = 0; b < params.batch; ++b) {
        for (int64_t s = 0; s < params.segments; ++s) {
            const KVSegmentParams& segment = params.segment[s];
            const TokenRange valid = valid_tokens(segment, b);
            if (valid.begin < 0 || valid.begin > valid.end || valid.end > segment.tokens) {
                const bool by_lens = valid.end < 0 || valid.end > segment.tokens;
                error.report(kErrorLens, b, -1,
                             static_cast<double>(by_lens ? valid.end : valid.begin));
            } else if (segment.paged()) {
                const int64_t block = bad_block(segment, b, valid.begin, valid.end);
                if (block < 0) continue;
                const int32_t page = segment.block_table[b * segment.block_table_stride + block];
                error.report(kErrorPageRange, b, block, page);
            }
        }
    }
    return error.status();
}

Status decode_attention_cpu(const DecodeAttentionParams& params) {
    const Status status = check_decode_tokens(params);
    if (status.ok()) Decoder(params).run();
    return status;
}

}  // namespace lightvlm
