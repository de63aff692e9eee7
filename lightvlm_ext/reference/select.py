"""select, in plain torch."""

from __future__ import annotations

import math

import torch

from .._select_args import check_select
from .._types import Selection

MASS_SCALE = 2.0**40


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
    """As `lightvlm_ext.ops.select`; scores may also be float64. Raises on every device."""
    args = check_select(
        scores,
        keep=keep,
        mass=mass,
        forced=forced,
        candidates=candidates,
        segment=segment,
        capacity=capacity,
        score_dtypes=(torch.float32, torch.float64),
    )
    rows, tokens = scores.shape
    kept = torch.zeros((rows, tokens), dtype=torch.bool, device=scores.device)
    for row in range(rows):
        free = torch.ones(tokens, dtype=torch.bool, device=scores.device)
        if args.candidates is not None:
            free &= args.candidates[row]
        if args.forced is not None:
            free &= ~args.forced[row]
            kept[row] |= args.forced[row]
        for group, members in segments_of(row, args.segment, free):
            budget = keep_of(row, group, args.keep) if args.mass is None else None
            chosen = _highest(scores[row, members], budget, args.mass)
            kept[row, members[chosen]] = True
    return selection_from_mask(kept, args.capacity)


def segments_of(row: int, segment: torch.Tensor | None, free: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """(id, ascending positions of its candidates) of each segment of a row."""
    if segment is None:
        return [(0, free.nonzero().flatten())]
    ids = segment[row]
    present = ids[ids >= 0].unique().tolist()
    return [(group, (free & (ids == group)).nonzero().flatten()) for group in present]


def keep_of(row: int, group: int, keep: int | torch.Tensor | None) -> int:
    """The budget of a segment, or of the row."""
    if not isinstance(keep, torch.Tensor):
        assert keep is not None
        return keep
    if keep.dim() == 2 and group >= keep.shape[1]:
        raise ValueError(
            f"segment: row {row} has id {group}, must be below {keep.shape[1]}, the columns of keep"
        )
    budget = int(keep[row, group] if keep.dim() == 2 else keep[row])
    if budget < 0:
        raise ValueError(f"keep: row {row} has {budget}, must be >= 0")
    return budget


def selection_from_mask(kept: torch.Tensor, capacity: int) -> Selection:
    """kept (R, N) bool -> Selection with `capacity` slots."""
    count = kept.sum(dim=1, dtype=torch.int32)
    most = int(count.max()) if count.numel() else 0
    if most > capacity:
        raise ValueError(f"capacity: got {capacity}, but a row keeps {most} tokens")
    slots = kept.cumsum(dim=1, dtype=torch.int32) - 1
    inverse = torch.where(kept, slots, -1).to(torch.int32)
    index = torch.full((kept.shape[0], capacity), -1, dtype=torch.int32, device=kept.device)
    row, token = kept.nonzero(as_tuple=True)
    index[row, slots[row, token].long()] = token.int()
    return Selection(index, count, inverse)


def _highest(scores: torch.Tensor, keep: int | None, mass: float | None) -> torch.Tensor:
    """Positions of the chosen among the scores (n,) of the candidates of one segment."""
    ordered = torch.where(scores.isnan(), -math.inf, scores)
    order = ordered.sort(descending=True, stable=True).indices
    if keep is not None:
        return order[:keep]
    assert mass is not None
    if scores.numel() == 0:
        return order
    if bool((scores == math.inf).any()):
        raise ValueError("scores: +inf is not allowed together with mass")
    positive = torch.where(scores > 0, scores, 0).double()
    highest = positive.max()
    if highest == 0:
        return order[:1]
    masses = (positive * MASS_SCALE / highest).round().long()
    total = masses.sum()
    target = total if mass >= 1 else torch.minimum((mass * total.double()).ceil().long(), total)
    reached = masses[order].cumsum(0) >= target
    return order[: int(reached.int().argmax()) + 1]
