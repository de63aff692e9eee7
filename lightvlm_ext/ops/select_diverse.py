"""select_diverse: greedy selection by score and dissimilarity to what is already chosen."""

from __future__ import annotations

import torch

from .. import _errors, _library
from .._observe import observed
from .._select_args import check_diverse
from .._types import Selection
from .select import empty_selection, select

# Words of device scratch for each token: kDiverseWords in csrc/selection/select_diverse.h.
_WORKSPACE_WORDS = 6


@observed
def select_diverse(
    scores: torch.Tensor,
    features: torch.Tensor,
    *,
    keep: int | torch.Tensor,
    strength: float = 1.0,
    forced: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
    capacity: int | None = None,
) -> Selection:
    """Selects tokens that score high and resemble none of those already selected.

    Within each segment, the forced tokens are the first chosen. Then, until the budget is full, the
    candidate with the highest

        max(score, 0) * (1 - strength * max(0, largest cosine to a chosen token of its segment))

    is chosen; ties go to the lower index. A zero vector, or one with NaN or infinity, has cosine 0 to
    all. NaN scores count as 0, +inf as the largest float32. Cosines are fp32, and the result depends on
    neither batch nor thread count; another backend sums them in another order, so where values differ by
    no more than rounding it may choose differently. The idea is DivPrune's (arXiv 2503.02175) and
    CDPruner's (arXiv 2506.10967), with the score as a factor.

    Args:
        scores: (R, N) float32.
        features: (R, N, Cf) float32, float16 or bfloat16: what similarity is measured on.
        keep: an int, (R,) int32, or with segment (R, G) int32: tokens to choose beside the forced ones.
        strength: >= 0. 0 is `select(scores, keep=keep, ...)`.
        forced, candidates, segment, capacity: as in `select`.

    Returns:
        Selection(index (R, M), count (R,), inverse (R, N)), int32 on scores' device.

    Raises:
        TypeError, ValueError: as `select`.
    """
    args, strength = check_diverse(
        scores,
        features,
        keep=keep,
        strength=strength,
        forced=forced,
        candidates=candidates,
        segment=segment,
        capacity=capacity,
    )
    if strength == 0:
        return select(
            scores, keep=keep, forced=forced, candidates=candidates, segment=segment, capacity=capacity
        )
    _library.check_backend(scores.device)
    rows, tokens = scores.shape
    selection = empty_selection(scores, args.capacity)
    on_device = scores.device.type == "cuda" or _library.is_emulated()
    workspace_shape = (rows, _WORKSPACE_WORDS, tokens)
    _library.op("select_diverse")(
        args.scores,
        features if features.shape[-1] <= 1 or features.stride(-1) == 1 else features.contiguous(),
        args.forced,
        args.candidates,
        args.segment,
        args.keep if isinstance(args.keep, torch.Tensor) else None,
        args.keep if isinstance(args.keep, int) else 0,
        strength,
        torch.empty(workspace_shape, dtype=torch.int32, device=scores.device) if on_device else None,
        *selection,
        _errors.error_word("select_diverse", scores.device),
    )
    _errors.check_now("select_diverse", scores.device)
    return selection


@_library.register_fake("select_diverse")
def _select_diverse_fake(
    scores: torch.Tensor,
    features: torch.Tensor,
    forced: torch.Tensor | None,
    candidates: torch.Tensor | None,
    segment: torch.Tensor | None,
    keep: torch.Tensor | None,
    keep_each: int,
    strength: float,
    workspace: torch.Tensor | None,
    index: torch.Tensor,
    count: torch.Tensor,
    inverse: torch.Tensor,
    error: torch.Tensor | None,
) -> None:
    return None
