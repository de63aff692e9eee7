// importance: how much attention each key gets from a few probe rows. See
// lightvlm_ext/ops/importance.py.
//
// Both axes are one computation. Each *probe* spreads a mass of 1 over *targets*: for axis "key"
// query rows over keys, for axis "query" keys over query rows. The score of a target is what it
// gets from the probes of a *slot*, a set of heads whose probes share the targets' vectors (for
// axis "key" the query heads of a key head, for axis "query" one query head), folded over the
// slots. Ignored rows are dropped and keys counted from leftpad on before anything is summed, so
// that padding cannot change the order of a sum.
#pragma once

#include <cstdint>

#include "common/cuda_types.h"
#include "common/dispatch.h"
#include "common/error_word.h"
#include "common/host_device.h"

namespace lightvlm {

enum class RowsOp : int32_t { kSum, kMean, kMax };
enum class HeadsOp : int32_t { kSum, kMean, kMax, kNone };
enum class ScoreAxis : int32_t { kKey, kQuery };

constexpr int64_t kImportanceMaxWidth = 256;

// Sizes and strides in elements; the last dimension of each tensor is contiguous. Absent tensors
// are null.
struct ImportanceParams {
    int64_t batch = 0;
    int64_t window = 0;  // rows of query
    int64_t tokens = 0;  // rows of key
    int64_t query_heads = 0;
    int64_t key_heads = 0;
    int64_t width = 0;
    DType dtype = DType::kFloat32;
    RowsOp rows = RowsOp::kMean;
    HeadsOp heads = HeadsOp::kMean;
    ScoreAxis axis = ScoreAxis::kKey;
    float scale = 1.0f;
    bool causal = true;

    const void* query = nullptr;  // [batch, window, query_heads, width]
    const void* key = nullptr;    // [batch, tokens, key_heads, width]
    int64_t query_batch_stride = 0;
    int64_t query_row_stride = 0;
    int64_t query_head_stride = 0;
    int64_t key_batch_stride = 0;
    int64_t key_token_stride = 0;
    int64_t key_head_stride = 0;
    const float* lse = nullptr;  // [batch, query_heads, window]
    int64_t lse_batch_stride = 0;
    int64_t lse_head_stride = 0;
    const int32_t* row_pos = nullptr;  // [batch, window]
    int64_t row_pos_stride = 0;
    const int32_t* lens = nullptr;     // [batch]
    const int32_t* leftpad = nullptr;  // [batch]

    float* score = nullptr;      // [batch, tokens], [batch, key_heads, tokens] or [batch, window]
    int32_t* visible = nullptr;  // [batch, tokens]
    int32_t* error = nullptr;    // device error word

    // CUDA only: 4-byte words, importance_workspace_words() of them or more.
    int32_t* workspace = nullptr;
    int64_t workspace_words = 0;

    LIGHTVLM_HOST_DEVICE int64_t group() const { return query_heads / key_heads; }
    LIGHTVLM_HOST_DEVICE int64_t targets() const {
        return axis == ScoreAxis::kKey ? tokens : window;
    }
    // Slots of a batch row for the log-sum-exp, and the most probes that one has.
    LIGHTVLM_HOST_DEVICE int64_t slots() const {
        return axis == ScoreAxis::kKey ? key_heads : query_heads;
    }
    LIGHTVLM_HOST_DEVICE int64_t probes() const {
        return axis == ScoreAxis::kKey ? group() * window : tokens;
    }
    // Whether a maximum over the rows meets a sum over the heads, or the reverse: then heads have
    // to be folded one by one.
    LIGHTVLM_HOST_DEVICE bool folds_each_head() const {
        if (axis == ScoreAxis::kQuery) return true;
        if (group() == 1 || window == 1) return false;
        return (rows == RowsOp::kMax) != (heads == HeadsOp::kMax);
    }
    // How the probes of a folded set are combined, and how sets are.
    LIGHTVLM_HOST_DEVICE bool max_over_probes() const {
        if (axis == ScoreAxis::kQuery) return false;
        return window == 1 && group() > 1 ? heads == HeadsOp::kMax : rows == RowsOp::kMax;
    }
    LIGHTVLM_HOST_DEVICE bool max_over_heads() const {
        return axis == ScoreAxis::kKey && heads == HeadsOp::kMax;
    }
    // What a score is divided by, besides the number of rows that see the key.
    LIGHTVLM_HOST_DEVICE float head_divisor() const {
        if (axis == ScoreAxis::kQuery) return 1.0f;
        if (heads == HeadsOp::kMean) return static_cast<float>(query_heads);
        return heads == HeadsOp::kNone ? static_cast<float>(group()) : 1.0f;
    }
};

constexpr int kImportanceTile = 64;        // probes or targets of a block on the CUDA cores
constexpr int kImportancePart = 128;       // probes whose partial log-sum-exps lie together
constexpr int64_t kImportanceSplit = 512;  // targets of a block that computes a log-sum-exp
// Batch rows x tiles of 128 targets from which on a block takes all key heads of its tile. With
// fewer, that would leave multiprocessors idle; then the heads are folded by a launch of its own.
constexpr int64_t kImportanceAllHeadsTiles = 264;

// Whether 16-bit vectors are scored without a launch that folds the key heads.
inline bool importance_folds_heads_at_once(const ImportanceParams& params) {
    if (params.dtype == DType::kFloat32 || params.axis == ScoreAxis::kQuery) return false;
    const int64_t tiles = (params.tokens + 127) / 128 * params.batch;
    return params.key_heads == 1 || params.heads == HeadsOp::kNone ||
           tiles >= kImportanceAllHeadsTiles;
}

// Whether whoever folds joins the partial log-sum-exps of a probe by itself: where they are few, a
// launch that does it costs more.
inline bool importance_joins_in_fold(const ImportanceParams& params) {
    return params.dtype != DType::kFloat32 && params.axis == ScoreAxis::kKey &&
           params.probes() <= 2 * kImportancePart && params.tokens <= 16 * kImportanceSplit;
}

// Words of the partial log-sum-exps of one part of every slot.
inline int64_t importance_part_words(const ImportanceParams& params) {
    const int64_t splits = (params.targets() + kImportanceSplit - 1) / kImportanceSplit;
    return 2 * params.batch * params.slots() * kImportancePart * splits;
}

// The least workspace. With more, more parts share a launch.
inline int64_t importance_workspace_words(const ImportanceParams& params) {
    int64_t words = 0;
    if (params.row_pos != nullptr) words += params.batch * (2 * params.window + 1);
    if (!importance_folds_heads_at_once(params)) {
        words += params.batch * params.key_heads * params.targets();
    }
    if (params.lse != nullptr) return words;
    const int64_t parts = (params.probes() + kImportancePart - 1) / kImportancePart;
    if (importance_joins_in_fold(params)) return words + parts * importance_part_words(params);
    words += 2 * params.batch * params.slots() * params.probes();
    return words + (parts > 0 ? importance_part_words(params) : 0);
}

Status importance_cpu(const ImportanceParams& params);

#if LIGHTVLM_HAS_DEVICE
cudaError_t launch_importance_cuda(const ImportanceParams& params, cudaStream_t stream);
#endif

}  // namespace lightvlm
