// Instantiations and launches of decode_attention.cuh and decode_mass.cuh.
#include "decode_attention/decode_attention.cuh"

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "decode_attention/decode_mass.cuh"

namespace lightvlm {

namespace {

static_assert(sizeof(DecodeArguments) <= 4096, "kernel parameters are limited to 4 KiB");

// Blocks that should be there for each multiprocessor. More would hide more latency, but the last
// block of a unit has to merge what all of them leave.
constexpr int64_t kBlocksPerMultiprocessor = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t segment_slots(const KVSegmentParams& segment) {
    return segment.mass != nullptr ? ceil_div(segment.tokens, kDecodeSpan) * kDecodeSpan : 0;
}

// Splits that a unit may have, for a device that wants `blocks` of them in all.
int64_t most_splits(const DecodeAttentionParams& params, int64_t blocks) {
    int64_t tokens = 0;
    for (int64_t s = 0; s < params.segments; ++s) tokens += params.segment[s].tokens;
    const int64_t wanted = ceil_div(blocks, params.units());
    const int64_t useful = ceil_div(tokens, kDecodeSplitSpans * kDecodeSpan);
    return std::max<int64_t>(1, std::min(wanted, useful));
}

// The widest access to rows of `bytes` at these strides.
int32_t access_unit(const void* data, int64_t bytes, std::initializer_list<int64_t> strides) {
    auto all = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(bytes);
    for (int64_t stride : strides) all |= static_cast<uintptr_t>(stride);
    int32_t unit = 16;
    while (all % unit != 0) unit /= 2;
    return unit;
}

void set_units(const DecodeAttentionParams& params, const KVSegmentParams& segment,
               DecodeSegmentPlan* plan) {
    if (is_packed(segment.format)) {
        plan->element_bytes = 1;
        plan->row_bytes =
            static_cast<int32_t>(packed_row_bytes(params.head_dim, packed_bits(segment.format)));
        plan->token_unit =
            access_unit(segment.value_token, 4,
                        {segment.value_token_batch_stride * 2, segment.value_token_head_stride * 2,
                         segment.value_token_token_stride * 2});
    } else {
        plan->element_bytes = segment.format == KVFormat::kFloat32 ? 4 : 2;
        plan->row_bytes = static_cast<int32_t>(params.head_dim) * plan->element_bytes;
    }
    const int64_t size = plan->element_bytes;
    plan->key_unit = access_unit(segment.key, plan->row_bytes,
                                 {segment.key_batch_stride * size, segment.key_head_stride * size,
                                  segment.key_token_stride * size});
    plan->value_unit =
        access_unit(segment.value, plan->row_bytes,
                    {segment.value_batch_stride * size, segment.value_head_stride * size,
                     segment.value_token_stride * size});
}

// Tile and stage of a segment's format.
template <int kWidth>
void set_tile(KVFormat format, DecodeSegmentPlan* plan, int32_t* stage_bytes) {
    const auto set = [&](auto tag) {
        constexpr int64_t kPortableShared = 99 * 1024;  // what sm_86, sm_89 and sm_120 have
        static_assert(decode_shared_bytes<kWidth>(decltype(tag)::kStageBytes) <= kPortableShared);
        plan->tile = decltype(tag)::kTile;
        *stage_bytes = std::max(*stage_bytes, int32_t{decltype(tag)::kStageBytes});
    };
    switch (format) {
        case KVFormat::kPacked8:
            return set(DecodeFormat<KVFormat::kPacked8, kWidth>{});
        case KVFormat::kPacked4:
            return set(DecodeFormat<KVFormat::kPacked4, kWidth>{});
        case KVFormat::kPacked2:
            return set(DecodeFormat<KVFormat::kPacked2, kWidth>{});
        case KVFormat::kFloat16:
        case KVFormat::kBFloat16:
            return set(DecodeFormat<KVFormat::kFloat16, kWidth>{});
        case KVFormat::kFloat32:
        default:
            plan->tile = DecodeFloat32<kWidth>::kTile;
    }
}

// Divides the workspace; what is not needed stays null.
void set_workspace(DecodeArguments* arguments) {
    const DecodeAttentionParams& params = arguments->params;
    auto* next = static_cast<float*>(params.workspace);
    arguments->parts = next;
    if (arguments->splits > 1) {
        next += params.units() * arguments->splits * decode_part_floats(params.head_dim);
    }
    if (!params.wants_mass()) return;
    const int64_t weights =
        params.batch * params.key_heads * arguments->slots * decode_even(params.group());
    arguments->finals = next;
    next += params.units() * kDecodeFinals;
    arguments->weight_maxima = next;
    next += weights / kDecodeStep;
    arguments->weights = next;
}

template <int kWidth, bool kPrecise>
cudaError_t launch_kernels(DecodeArguments* arguments, cudaStream_t stream) {
    const DecodeAttentionParams& params = arguments->params;
    for (int64_t s = 0; s < params.segments; ++s) {
        set_tile<kWidth>(params.segment[s].format, &arguments->plan[s], &arguments->stage_bytes);
    }
    const cudaError_t error = launch(
        "decode_attention", decode_attention_kernel<kWidth, kPrecise>,
        make_grid(params.units() * arguments->splits), dim3(decode_warps(kWidth) * kWarpThreads),
        decode_shared_bytes<kWidth>(arguments->stage_bytes), stream, *arguments);
    if (error != cudaSuccess || arguments->slots == 0) return error;
    using Weight = std::conditional_t<kPrecise, float, half_t>;
    const int64_t threads = params.batch * params.key_heads * arguments->slots;
    return launch("decode_mass", decode_mass_kernel<Weight>,
                  make_grid(ceil_div(threads, kDecodeMassThreads)), dim3(kDecodeMassThreads), 0,
                  stream, *arguments);
}

template <bool kPrecise>
cudaError_t launch_width(DecodeArguments* arguments, cudaStream_t stream) {
    switch (packed_channels(arguments->params.head_dim)) {
        case 32:
            return launch_kernels<32, kPrecise>(arguments, stream);
        case 64:
            return launch_kernels<64, kPrecise>(arguments, stream);
        case 96:  // and 80
            return launch_kernels<96, kPrecise>(arguments, stream);
        case 128:
            return launch_kernels<128, kPrecise>(arguments, stream);
        case 192:
            return launch_kernels<192, kPrecise>(arguments, stream);
        case 256:
            return launch_kernels<256, kPrecise>(arguments, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

int64_t decode_attention_cuda_workspace(const DecodeAttentionParams& params) {
    if (params.units() == 0) return 0;
    int64_t floats = params.units() * most_splits(params, kDecodeMostBlocks) *
                     decode_part_floats(params.head_dim);
    if (params.wants_mass()) {
        int64_t slots = 0;
        for (int64_t s = 0; s < params.segments; ++s) slots += segment_slots(params.segment[s]);
        const int64_t numbers = params.dtype == DType::kFloat32 ? 2 : 1;  // in half floats
        floats += params.batch * params.key_heads * decode_even(params.group()) *
                      (slots * numbers / 2 + slots / kDecodeStep) +
                  params.units() * kDecodeFinals;
    }
    return floats * int64_t{sizeof(float)};
}

cudaError_t launch_decode_attention_cuda(const DecodeAttentionParams& params, cudaStream_t stream) {
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    int multiprocessors = 0;
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;

    DecodeArguments arguments{};
    arguments.params = params;
    const int64_t blocks =
        std::min(kDecodeMostBlocks, kBlocksPerMultiprocessor * int64_t{multiprocessors});
    arguments.group = static_cast<int32_t>(params.group());
    arguments.head_tiles = static_cast<int32_t>(params.head_tiles());
    arguments.splits = static_cast<int32_t>(most_splits(params, blocks));
    for (int64_t s = 0; s < params.segments; ++s) {
        arguments.plan[s].first_slot = arguments.slots;
        arguments.slots += segment_slots(params.segment[s]);
        set_units(params, params.segment[s], &arguments.plan[s]);
        if (!params.segment[s].paged()) continue;
        arguments.plan[s].page_size = Divisor(params.segment[s].page_size);
        arguments.paged = true;
    }
    set_workspace(&arguments);
    return params.dtype == DType::kFloat32 ? launch_width<true>(&arguments, stream)
                                           : launch_width<false>(&arguments, stream);
}

}  // namespace lightvlm
