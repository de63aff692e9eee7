"""select_diverse: greedy selection by score and dissimilarity to what is already chosen."""

from __future__ import annotations

import math

import torch

from .. import _errors
from .._observe import observed
from .._select_args import SelectArgs, check_diverse
from .._types import Selection
from ..reference.select_diverse import relevance, unit_vectors
from .select import select

# Up to this many tokens all cosines are taken in one product; beyond, a row of them at each step.
_GRAM_TOKENS = 2048
_CHUNK = 256


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
    all. NaN scores count as 0, +inf as the largest float32. Cosines are fp32. The idea is DivPrune's
    (arXiv 2503.02175) and CDPruner's (arXiv 2506.10967), with the score as a factor.

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
    kept = _greedy(args, unit_vectors(features), _token_budget(args), strength)
    # All that is left is to number them, and to check the capacity.
    return select(args.scores, keep=0, forced=kept, capacity=args.capacity)


def _token_budget(args: SelectArgs) -> torch.Tensor:
    """(R, N) int32: for each token the budget of its segment; 0 where it is no candidate."""
    rows, tokens = args.scores.shape
    device = args.scores.device
    free = torch.ones((rows, tokens), dtype=torch.bool, device=device)
    if args.candidates is not None:
        free &= args.candidates
    if args.forced is not None:
        free &= ~args.forced
    if args.segment is not None:
        free &= args.segment >= 0
    if not isinstance(args.keep, torch.Tensor):
        assert args.keep is not None
        return free.int() * args.keep
    _errors.report("select_diverse", _errors.NEGATIVE_KEEP, (args.keep < 0).any())
    if args.keep.dim() == 1:
        budget = args.keep[:, None]
    else:
        assert args.segment is not None
        groups = args.keep.shape[1]
        outside = args.segment >= groups
        _errors.report("select_diverse", _errors.SEGMENT_RANGE, outside.any())
        free &= ~outside
        # A column of zeros stands for every id that has none.
        padded = torch.nn.functional.pad(args.keep, (0, 1))
        budget = padded.gather(1, torch.where(free, args.segment, groups).long())
    return torch.where(free, budget.clamp_min(0), 0)


def _steps(args: SelectArgs, budget: torch.Tensor) -> int:
    """How many tokens a row chooses at most, without a synchronisation on CUDA."""
    tokens = args.scores.shape[1]
    if args.segment is None and isinstance(args.keep, int):
        return min(args.keep, tokens)
    if budget.device.type == "cuda":
        return min(args.capacity, tokens)
    return int((budget > 0).sum(dim=1).max()) if budget.numel() else 0


def _greedy(args: SelectArgs, unit: torch.Tensor, budget: torch.Tensor, strength: float) -> torch.Tensor:
    """(R, N) bool: forced and chosen tokens. Segments do not see each other, so each step may take
    whatever is best in any segment with budget left."""
    rows, tokens = args.scores.shape
    worth = relevance(args.scores)
    kept = torch.zeros_like(worth, dtype=torch.bool) if args.forced is None else args.forced.clone()
    steps = _steps(args, budget)
    if steps == 0 or rows == 0:
        return kept
    gram = unit @ unit.mT if tokens <= _GRAM_TOKENS else None
    nearest = _nearest_forced(args, unit)
    left = budget.clone()
    row = torch.arange(rows, device=worth.device)
    for _ in range(steps):
        value = torch.where(left > 0, worth * (1 - strength * nearest), -math.inf)
        highest, best = value.max(dim=1)  # the first of equals
        takes = highest > -math.inf
        kept[row, best] |= takes
        cosine = gram[row, best] if gram is not None else (unit @ unit[row, best, :, None])[..., 0]
        if args.segment is None:
            left -= 1
        else:
            same = args.segment == args.segment[row, best][:, None]
            cosine = torch.where(same, cosine, 0)
            left -= (same & takes[:, None]).int()
        left[row, best] = 0
        nearest = torch.maximum(nearest, cosine)
    return kept


def _nearest_forced(args: SelectArgs, unit: torch.Tensor) -> torch.Tensor:
    """(R, N) fp32: largest cosine to a forced token of the same segment, at least 0."""
    rows, tokens, _ = unit.shape
    nearest = unit.new_zeros((rows, tokens))
    if args.forced is None:
        return nearest
    for start in range(0, tokens, _CHUNK):
        stop = start + _CHUNK
        counts = args.forced[:, None, start:stop]
        if args.segment is not None:
            counts = counts & (args.segment[:, :, None] == args.segment[:, None, start:stop])
        cosine = torch.where(counts, unit @ unit[:, start:stop].mT, 0)
        nearest = torch.maximum(nearest, cosine.amax(dim=2))
    return nearest
