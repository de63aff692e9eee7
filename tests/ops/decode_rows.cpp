// Scores and values of dense spans over buffers that end where the rows do, for AddressSanitizer:
// every way that this processor has, rows at a stride and rows in pages. Prints a sum.
#include <cstdint>
#include <cstdio>
#include <memory>
#include <vector>

#include "decode_attention/decode_bf16_cpu.h"
#include "decode_attention/decode_dense_cpu.h"
#include "decode_attention/decode_float_cpu.h"
#include "decode_attention/decode_pages_cpu.h"
#include "decode_attention/decode_softmax_cpu.h"

using namespace lightvlm;
using namespace lightvlm::decode_detail;

namespace {

constexpr int64_t kPage = 16;
double total = 0;

int64_t size_of(KVFormat format) { return format == KVFormat::kFloat32 ? 4 : 2; }

using Scores = void (*)(const Span&, SpanScratch*);

void by_tiles(const Span& span, SpanScratch* scratch) {
    multiversion<FloatScores>(&span, scratch, scratch->scores);
    multiversion<SpanSoftmax>(span.heads, span.tokens, scratch->scores, scratch->highest,
                              scratch->sum);
    multiversion<FloatValues>(&span, static_cast<const float*>(scratch->scores), scratch);
}

#if defined(__x86_64__)
void dense(const Span& span, SpanScratch* scratch) {
    dense_scores(span, scratch, scratch->scores);
    multiversion<SpanSoftmax>(span.heads, span.tokens, scratch->scores, scratch->highest,
                              scratch->sum);
    dense_values(span, scratch->scores, scratch);
}

void bf16(const Span& span, SpanScratch* scratch) {
    bf16_scores(span, scratch, scratch->scores);
    multiversion<SpanSoftmax>(span.heads, span.tokens, scratch->scores, scratch->highest,
                              scratch->sum);
    bf16_values(span, scratch->scores, scratch);
}
#endif

void run(Scores way, KVFormat format, int64_t head_dim, int heads, int tokens, bool paged) {
    const int64_t room = paged ? (tokens + kPage - 1) / kPage * kPage : tokens;
    const int64_t row = head_dim * size_of(format);
    const std::vector<char> key(room * row), value(room * row);
    std::vector<int32_t> table(room / kPage);
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
    Span span{};
    span.format = format;
    span.tokens = tokens < kSpanTokens ? tokens : kSpanTokens;
    span.heads = heads;
    span.head_dim = head_dim;
    span.channels = (head_dim + 31) / 32 * 32;
    span.unit = 1.0f;
    span.in_pages = paged;
    KVSegmentParams segment{};
    segment.key = key.data();
    segment.value = value.data();
    segment.key_batch_stride = segment.value_batch_stride = kPage * head_dim;
    segment.key_token_stride = segment.value_token_stride = head_dim;
    segment.block_table = table.data();
    segment.page_size = kPage;
    segment.pages = static_cast<int32_t>(table.size());
    // On the heap, so that what lies behind its lists is guarded.
    std::unique_ptr<SpanPages> pages;
    if (paged) pages = std::make_unique<SpanPages>(segment, 0, 0, tokens, size_of(format));
    const auto scratch = std::make_unique<SpanScratch>();
    for (int begin = 0; begin < tokens; begin += kSpanTokens) {
        span.tokens = std::min(tokens - begin, kSpanTokens);
        if (paged) {
            pages->set(begin, begin + span.tokens, &span);
        } else {
            span.strided.key = {key.data() + begin * row, row};
            span.strided.value = {value.data() + begin * row, row};
            span.strided.next_key = {span.strided.key[span.tokens], row};
        }
        way(span, scratch.get());
    }
    total += scratch->out[0] + scratch->sum[0];
}

}  // namespace

int main() {
    for (const int64_t head_dim : {32, 64, 80, 96, 128, 192, 256}) {
        for (const int heads : {1, 3, 7, 8}) {
            for (const int tokens : {1, 15, 16, 17, 31, 33, 255, 256, 300, 512}) {
                for (const bool paged : {false, true}) {
                    for (const KVFormat format :
                         {KVFormat::kFloat32, KVFormat::kFloat16, KVFormat::kBFloat16}) {
                        run(by_tiles, format, head_dim, heads, tokens, paged);
#if defined(__x86_64__)
                        if (cpu_level() >= CpuLevel::kAvx512) {
                            run(dense, format, head_dim, heads, tokens, paged);
                        }
#endif
                    }
#if defined(__x86_64__)
                    if (cpu_level(CpuLevel::kAvx512Bf16) >= CpuLevel::kAvx512Bf16) {
                        run(bf16, KVFormat::kBFloat16, head_dim, heads, tokens, paged);
                    }
#endif
                }
            }
        }
    }
    std::printf("%g\n", total);
}
