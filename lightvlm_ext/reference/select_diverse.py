"""select_diverse, in plain torch."""

from __future__ import annotations

import math

import torch

from .._select_args import check_diverse
from .._types import Selection
from .select import keep_of, segments_of, select, selection_from_mask


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
    """As `lightvlm_ext.ops.select_diverse`; both inputs may also be float64. Raises on every device."""
    double = torch.float64
    args, strength = check_diverse(
        scores,
        features,
        keep=keep,
        strength=strength,
        forced=forced,
        candidates=candidates,
        segment=segment,
        capacity=capacity,
        score_dtypes=(torch.float32, double),
        feature_dtypes=(torch.float32, torch.float16, torch.bfloat16, double),
    )
    if strength == 0:
        return select(
            scores, keep=keep, forced=forced, candidates=candidates, segment=segment, capacity=capacity
        )
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for row in range(scores.shape[0]):
        unit = unit_vectors(features[row])
        is_forced = torch.zeros_like(kept[row]) if args.forced is None else args.forced[row]
        free = ~is_forced if args.candidates is None else args.candidates[row] & ~is_forced
        kept[row] |= is_forced
        for group, members in segments_of(row, args.segment, free):
            same = slice(None) if args.segment is None else args.segment[row] == group
            first = unit[same][is_forced[same]]
            budget = keep_of(row, group, args.keep)
            chosen = _greedy(scores[row, members], unit[members], first, budget, strength)
            kept[row, members[chosen]] = True
    return selection_from_mask(kept, args.capacity)


def unit_vectors(features: torch.Tensor) -> torch.Tensor:
    """features (..., C) over their norms; zero where the norm is zero or not finite."""
    wide = features if features.dtype == torch.float64 else features.float()
    # Scaled first: squares of large or tiny features would leave the range.
    largest = (
        wide.abs().amax(dim=-1, keepdim=True) if wide.shape[-1] else wide.new_zeros((*wide.shape[:-1], 1))
    )
    usable = (largest > 0) & largest.isfinite()
    scaled = torch.where(usable, wide / torch.where(usable, largest, 1), 0)
    return torch.where(usable, scaled / torch.where(usable, scaled.norm(dim=-1, keepdim=True), 1), 0)


def relevance(scores: torch.Tensor) -> torch.Tensor:
    """max(scores, 0), NaN as 0 and +inf as the largest finite number."""
    return torch.nan_to_num(scores, nan=0.0, neginf=0.0).clamp_min(0)


def _greedy(
    scores: torch.Tensor, unit: torch.Tensor, first: torch.Tensor, keep: int, strength: float
) -> list[int]:
    """Positions chosen, one by one, among scores (n,) and unit (n, C); first (f, C) are chosen before."""
    worth = relevance(scores)
    # Infinity times nothing is not a number.
    strength = min(strength, torch.finfo(worth.dtype).max)
    nearest = torch.zeros_like(worth)
    if first.shape[0]:
        nearest = (unit @ first.T).amax(dim=1).clamp_min(0).to(worth.dtype)
    chosen: list[int] = []
    for _ in range(min(keep, scores.numel())):
        value = torch.where(worth > 0, worth * (1 - strength * nearest), 0)
        value[chosen] = -math.inf
        best = int((value == value.max()).nonzero()[0])
        chosen.append(best)
        nearest = torch.maximum(nearest, (unit @ unit[best]).to(worth.dtype))
    return chosen
