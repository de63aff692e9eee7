// select: checks, parameters, registration.
#include <optional>

#include "common/registration.h"
#include "selection/rows_op.h"
#include "selection/score_order.h"
#include "selection/select.h"

namespace lightvlm {

namespace {

template <Backend backend>
void select_op(const Tensor& scores, const std::optional<Tensor>& forced,
               const std::optional<Tensor>& candidates, const std::optional<Tensor>& segment,
               const std::optional<Tensor>& keep, int64_t keep_each,
               double mass,  // 0: none
               const Tensor& index, const Tensor& count, const Tensor& inverse,
               const std::optional<Tensor>& error) {
    SelectParams params;
    params.rows = selection_rows(scores, forced, candidates, segment, keep, keep_each, index, count,
                                 inverse, error);
    params.mass = mass;
    check(mass >= 0.0 && mass <= 1.0, "mass: got ", mass, ", must be in (0, 1]");
    check(mass == 0.0 || !keep.has_value(), "keep, mass: give exactly one");
    check(mass == 0.0 || params.rows.tokens <= kMassMaxTokens, "scores: has ", params.rows.tokens,
          " tokens, with mass at most ", kMassMaxTokens);
    LIGHTVLM_RUN(select, backend, scores, params);
}

}  // namespace

LIGHTVLM_REGISTER(select, select_op)

}  // namespace lightvlm
