// select_diverse: checks, parameters, registration.
#include "selection/select_diverse.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>

#include "common/registration.h"
#include "selection/rows_op.h"

namespace lightvlm {

namespace {

template <Backend backend>
void select_diverse_op(const Tensor& scores,
                       const Tensor& features,  // [R, N, Cf] fp32, fp16 or bf16
                       const std::optional<Tensor>& forced, const std::optional<Tensor>& candidates,
                       const std::optional<Tensor>& segment, const std::optional<Tensor>& keep,
                       int64_t keep_each, double strength,
                       const std::optional<Tensor>& workspace,  // [R, kDiverseWords, N] int32
                       const Tensor& index, const Tensor& count, const Tensor& inverse,
                       const std::optional<Tensor>& error) {
    SelectDiverseParams params;
    params.rows = selection_rows(scores, forced, candidates, segment, keep, keep_each, index, count,
                                 inverse, error);
    params.dtype = floating_dtype(features, "features");
    check_shape(features, "features", {params.rows.rows, params.rows.tokens, -1});
    check_device(features, "features", scores);
    check_last_contiguous(features, "features");
    params.features = features.const_data_ptr();
    params.features_row_stride = features.stride(0);
    params.features_token_stride = features.stride(1);
    params.channels = features.size(2);
    check(params.channels < INT32_MAX - 1024, "features: has ", params.channels,
          " channels, must be below 2^31");
    check(std::isfinite(strength) && strength >= 0.0, "strength: got ", strength, ", must be >= 0");
    // Infinity times no similarity is not a number.
    params.strength = static_cast<float>(std::min<double>(strength, FLT_MAX));
    if (backend == Backend::kCuda) {  // the CPU twin needs none
        check(workspace.has_value(), "workspace: is missing");
        params.workspace = row_output(
            *workspace, "workspace", {params.rows.rows, kDiverseWords, params.rows.tokens}, scores);
    }
    LIGHTVLM_RUN(select_diverse, backend, scores, params);
}

}  // namespace

LIGHTVLM_REGISTER(select_diverse, select_diverse_op)

}  // namespace lightvlm
