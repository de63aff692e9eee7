"""select: the highest-scoring tokens of each row."""

from __future__ import annotations

import torch

from .. import _errors, _library
from .._observe import observed
from .._select_args import check_select
from .._types import Selection


def empty_selection(scores: torch.Tensor, capacity: int) -> Selection:
    """An uninitialised Selection for scores (R, N)."""
    rows, tokens = scores.shape
    device = scores.device
    # Sizes one by one: torch takes a third longer to read a tuple.
    return Selection(
        index=torch.empty(rows, capacity, dtype=torch.int32, device=device),
        count=torch.empty(rows, dtype=torch.int32, device=device),
        inverse=torch.empty(rows, tokens, dtype=torch.int32, device=device),
    )


@observed
def select(
    scores: torch.Tensor,
    *,
    keep: int | torch.Tensor | None = None,
    mass: float | None = None,
    forced: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
    capacity: int | None = None,
) -> Selection:
    """Selects the highest-scoring tokens of each row, in their original order.

    Order: higher scores first, NaN and -inf last (and equal), -0 equal to +0, ties to the lower index.
    The result depends on nothing else: not on backend, batch or thread count.

    Args:
        scores: (R, N) float32, any strides.
        keep: how many of the highest candidates to keep: an int, or (R,) int32, or with segment
            (R, G) int32, one for each segment id. More than there are: all; 0: only the forced.
        mass: in (0, 1]: keep the fewest highest candidates whose scores sum to >= mass * (sum over the
            candidates), at least one where there is a candidate. Negative, NaN and -inf count as 0.
            The sums are taken in uint64 fixed point, round(s * 2**40 / max) with ties to even in
            float64, relative to the highest score of the row or segment; N is at most 2**23.
        forced: (R, N) bool: kept besides. They leave the candidates, the budget and both mass sums.
        candidates: (R, N) bool: who may be chosen. Default: all.
        segment: (R, N) int32: the budget applies within each segment (an image, say). Negative ids
            are no candidates. Ids need not be dense.
        capacity: slots M of the result. Default: min(N, keep) for an int keep without forced and
            segment, otherwise N.

    Returns:
        Selection(index (R, M), count (R,), inverse (R, N)), int32 on scores' device.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or number is out of its range; not exactly one of keep and mass. On
            the CPU also: a row keeps more than capacity, keep is negative, an id is not below G, or a
            candidate is +inf together with mass. On CUDA these set the device error word
            (`lightvlm_ext.device_errors`), and what is over capacity, of such a segment, or +inf is
            not kept; a negative keep is 0.
    """
    args = check_select(
        scores,
        keep=keep,
        mass=mass,
        forced=forced,
        candidates=candidates,
        segment=segment,
        capacity=capacity,
    )
    device = args.scores.device
    _library.check_backend(device)
    selection = empty_selection(args.scores, args.capacity)
    error = _errors.error_word("select", device)
    keep_is_tensor = isinstance(args.keep, torch.Tensor)
    _library.op("select")(
        args.scores,
        args.forced,
        args.candidates,
        args.segment,
        args.keep if keep_is_tensor else None,
        0 if keep_is_tensor else args.keep or 0,
        args.mass or 0.0,
        *selection,
        error,
    )
    if error is not None:
        _errors.check_now("select", device)
    return selection


@_library.register_fake("select")
def _select_fake(
    scores: torch.Tensor,
    forced: torch.Tensor | None,
    candidates: torch.Tensor | None,
    segment: torch.Tensor | None,
    keep: torch.Tensor | None,
    keep_each: int,
    mass: float,
    index: torch.Tensor,
    count: torch.Tensor,
    inverse: torch.Tensor,
    error: torch.Tensor | None,
) -> None:
    return None
