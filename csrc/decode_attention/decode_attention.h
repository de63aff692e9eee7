// decode_attention: one query token a batch row over a cache in segments of different formats. See
// lightvlm_ext/ops/decode_attention.py; csrc/quantization/packed_kv.h for the packed ones.
#pragma once

#include <cstdint>

#include "common/cuda_types.h"
#include "common/dispatch.h"
#include "common/error_word.h"
#include "common/host_device.h"
#include "quantization/packed_kv.h"

namespace lightvlm {

enum class KVFormat : int32_t { kFloat32, kFloat16, kBFloat16, kPacked8, kPacked4, kPacked2 };

constexpr bool is_packed(KVFormat format) { return format >= KVFormat::kPacked8; }

constexpr int packed_bits(KVFormat format) {
    return format == KVFormat::kPacked8 ? 8 : format == KVFormat::kPacked4 ? 4 : 2;
}

// A launch takes them by value, within the 4 KiB that a kernel's arguments may have.
constexpr int64_t kDecodeMaxSegments = 12;

// Pages hold a multiple of it: the keys of mma.m16n8k16.
constexpr int64_t kDecodePageStep = 16;
constexpr int64_t kDecodeMaxPageSize = 256;

constexpr int64_t kDecodeHeadTile = 8;  // the columns of mma.m16n8k16

// Strides in elements for dense segments, in bytes for codes. A token's row is contiguous. Absent
// tensors are null. Valid tokens of batch row b are [leftpad[b], lens[b] + added).
struct KVSegmentParams {
    KVFormat format = KVFormat::kFloat32;
    int64_t tokens = 0;
    const void* key = nullptr;  // [batch, tokens, key_heads, head_dim] in any order of strides, or
    const void* value = nullptr;   // [pages, page_size, key_heads, head_dim] of a paged segment
    int64_t key_batch_stride = 0;  // from page to page where paged, as for values
    int64_t key_token_stride = 0;
    int64_t key_head_stride = 0;
    int64_t value_batch_stride = 0;
    int64_t value_token_stride = 0;
    int64_t value_head_stride = 0;
    const int32_t* lens = nullptr;     // [batch]
    const int32_t* leftpad = nullptr;  // [batch]; dense segments only
    int64_t added = 0;                 // tokens of each row behind lens, valid besides

    // Paged segments only, which are dense: token n of row b is in page block_table[b, n /
    // page_size], at n % page_size.
    const int32_t* block_table = nullptr;  // [batch, tokens / page_size]; blocks are contiguous
    int64_t block_table_stride = 0;
    int32_t page_size = 0;
    int32_t pages = 0;

    // Packed segments only.
    int64_t block = 0;                 // tokens that share channel parameters
    int64_t blocks = 0;                // ceil(tokens / block)
    const float* key_scale = nullptr;  // [batch, key_heads, blocks, head_dim], contiguous, as the
    const float* key_zero = nullptr;   // next two
    const float* value_channel = nullptr;
    const uint16_t* value_token = nullptr;  // [batch, key_heads, tokens, (scale, zero)] float16
    int64_t value_token_batch_stride = 0;   // in float16 numbers; a pair is contiguous
    int64_t value_token_head_stride = 0;
    int64_t value_token_token_stride = 0;

    float* mass = nullptr;  // [batch, key_heads, tokens], added to; tokens are contiguous
    int64_t mass_batch_stride = 0;
    int64_t mass_head_stride = 0;

    LIGHTVLM_HOST_DEVICE bool paged() const { return page_size != 0; }
    // Where the valid tokens of batch row b begin and end; neither is checked.
    LIGHTVLM_HOST_DEVICE int64_t begin(int64_t b) const {
        return leftpad != nullptr ? leftpad[b] : 0;
    }
    LIGHTVLM_HOST_DEVICE int64_t end(int64_t b) const {
        if (lens == nullptr) return tokens;
        return lens[b] < 0 ? lens[b] : lens[b] + added;
    }
};

struct DecodeAttentionParams {
    int64_t batch = 0;
    int64_t query_heads = 0;
    int64_t key_heads = 0;
    int64_t head_dim = 0;
    DType dtype = DType::kFloat32;  // of query and out
    float scale = 1.0f;

    const void* query = nullptr;  // [batch, query_heads, head_dim]
    int64_t query_batch_stride = 0;
    int64_t query_head_stride = 0;
    void* out = nullptr;   // [batch, query_heads, head_dim], contiguous
    float* lse = nullptr;  // [batch, query_heads], contiguous; natural log

    int64_t segments = 0;
    KVSegmentParams segment[kDecodeMaxSegments];

    void* workspace = nullptr;  // what the implementation keeps between its phases
    int64_t workspace_bytes = 0;
    int32_t* ticket = nullptr;  // CUDA only: units() zeros, and zeros again afterwards
    int32_t* error = nullptr;   // the device error word

    LIGHTVLM_HOST_DEVICE int64_t group() const { return query_heads / key_heads; }
    // CUDA only: heads of a group that share a block, and the results that are merged on their own.
    LIGHTVLM_HOST_DEVICE int64_t head_tiles() const {
        return (group() + kDecodeHeadTile - 1) / kDecodeHeadTile;
    }
    LIGHTVLM_HOST_DEVICE int64_t units() const { return batch * key_heads * head_tiles(); }
    bool wants_mass() const {
        for (int64_t s = 0; s < segments; ++s) {
            if (segment[s].mass != nullptr) return true;
        }
        return false;
    }
};

// Bytes of workspace that the implementation needs for these sizes.
int64_t decode_attention_cpu_workspace(const DecodeAttentionParams& params);
// Whether the valid tokens of all rows exist; nothing else is looked at.
Status check_decode_tokens(const DecodeAttentionParams& params);
Status decode_attention_cpu(const DecodeAttentionParams& params);

#if LIGHTVLM_HAS_DEVICE
int64_t decode_attention_cuda_workspace(const DecodeAttentionParams& params);
cudaError_t launch_decode_attention_cuda(const DecodeAttentionParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
