"""merge_pairs: bipartite matching within windows; each matched token into its partner."""

from __future__ import annotations

import torch

from .. import _errors, _library
from .._observe import observed
from .._pairs_args import check_pairs
from .._types import MergedPairs, Selection


@observed
def merge_pairs(
    x: torch.Tensor,
    window: torch.Tensor,
    *,
    merge: int | float | torch.Tensor,
    weight: torch.Tensor | None = None,
    metric: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    protected: torch.Tensor | None = None,
    eps: float = 0.0,
    align: str = "left",
    capacity: int | None = None,
) -> MergedPairs:
    """Matches tokens within windows and merges each matched one into its partner: LightKV's message passing
    (arXiv 2605.00789), and, with one window an image, ToMe's bipartite matching (arXiv 2210.09461).

    Each window is a problem of its own. Its tokens, in ascending order, are sources at even positions (0, 2, ...)
    and destinations at odd ones, or as `source` says. Each source a has one best destination b(a), that of the
    highest cosine of metric, ties to the lower token. The r sources of the highest cosine to their best
    destination, ties to the lower token, are merged into it; several may share one:

        y_b = (w_b x_b + sum w_a x_a) / max(w_b + sum w_a, eps)    over the merged sources a with b(a) = b

    All others stay as they are, bit for bit, and so does a destination at which nothing of positive weight
    arrives. Sums run in fp32, the destination first and then its sources in ascending order: the same bits on
    every backend, for the same pairs. Cosines are fp32 sums of products of the inputs as they are; a zero vector
    (also one whose values are all below 2^-126), or one with NaN or infinity, has cosine 0 to all. Where two
    cosines are within a few fp32 roundings of each other, backends may choose differently.

    LightKV, one stage: window = cells of the image's grid, merge = 0.5, weight = importance(..., axis="query"),
    eps = 1e-8. ToMe: window = 0 for the image's tokens, merge = r, weight = sizes (the weight of the result is
    the sizes for the next layer), metric = keys averaged over heads, protected = the class token.
    Positions, caches and the like follow by gather_tokens(..., *result.selection[:2]).

    Args:
        x: (R, N, C) float32, float16 or bfloat16, any strides (a last dimension that is not contiguous
            costs a copy).
        window: (R, N) int32: tokens of one id >= 0 form a window; ids need not be dense, nor windows
            contiguous. -1: no part in it, stays as it is (text). Below -1: padding, vanishes.
        merge: r, the pairs of each window. An int; or a float, a share of the window's m tokens:
            floor(merge * m); or a tensor on x's device of int32 counts or float32 shares (the product is rounded
            to float32): (R,), one for all windows of a row, or (R, G), by window id. Never more than there are
            sources with a destination, and in the alternating split never more than m // 2.
        weight: (R, N) float32, finite and >= 0. Subnormal weights count as they are. Default: 1.
        metric: (R, N, Cm) float32, float16 or bfloat16. Default: x.
        source: (R, N) bool, True for the sources of each window, False for its destinations. Default:
            alternating.
        protected: (R, N) bool: these keep their position in the alternating split, but neither give nor
            receive, and are not among the m tokens.
        eps: the least that a sum of weights is divided by, >= 0.
        align: "left": row r's tokens stand in slots [0, count[r]) of x and weight; "right": in
            [M - count[r], M). The other slots are zeros.
        capacity: slots M of the result. Default: N.

    Returns:
        MergedPairs(x, selection, target, weight): x (R, M, C); selection with index (R, M), ascending, -1 past
        count, count (R,) and inverse (R, N), and target (R, N), all int32; weight (R, M) float32 sums, in the
        order of the merge, at most the largest float.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not fit, or merge, eps, align or capacity is out of range. On the CPU
            also: a weight is negative, infinite or NaN; a count in merge is negative, or a share outside
            [0, 1]; a window id is not below G; or a row keeps more than capacity. On CUDA these set the
            device error word (`lightvlm_ext.device_errors`): such a weight is 0, such a window has no pairs,
            and what is over capacity vanishes.
    """
    args = check_pairs(
        x,
        window,
        merge=merge,
        weight=weight,
        metric=metric,
        source=source,
        protected=protected,
        eps=eps,
        align=align,
        capacity=capacity,
    )
    _library.check_backend(x.device)
    rows, tokens, width = x.shape
    slots = args.capacity

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x.device)

    result = MergedPairs(
        torch.empty((rows, slots, width), dtype=x.dtype, device=x.device),
        Selection(integers(rows, slots), integers(rows), integers(rows, tokens)),
        integers(rows, tokens),
        torch.empty((rows, slots), dtype=torch.float32, device=x.device),
    )
    workspace = None
    if x.device.type == "cuda" or _library.is_emulated():
        words = 3 * rows * tokens + (5 * rows * tokens + 1) // 2 + rows * slots
        workspace = torch.empty((words,), dtype=torch.int64, device=x.device)
    _library.op("merge_pairs")(
        args.x,
        args.metric,
        args.window,
        args.source,
        args.protected,
        args.weight,
        args.each,
        0 if args.merge is None else args.merge,
        -1.0 if args.ratio is None else args.ratio,
        args.eps,
        args.right,
        result.x,
        *result.selection,
        result.target,
        result.weight,
        workspace,
        _errors.error_word("merge_pairs", x.device),
    )
    _errors.check_now("merge_pairs", x.device)
    return result


@_library.register_fake("merge_pairs")
def _merge_pairs_fake(
    x: torch.Tensor,
    metric: torch.Tensor,
    window: torch.Tensor,
    source: torch.Tensor | None,
    protected: torch.Tensor | None,
    weight: torch.Tensor | None,
    each: torch.Tensor | None,
    merge: int,
    ratio: float,
    eps: float,
    right: bool,
    out: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    inverse: torch.Tensor,
    target: torch.Tensor,
    out_weight: torch.Tensor,
    workspace: torch.Tensor | None,
    error: torch.Tensor | None,
) -> None:
    return None
