"""merge_tokens, in plain torch."""

from __future__ import annotations

from typing import Literal, overload

import torch

from .._checks import FLOATING
from .._merge_args import check_merge
from .._types import Selection


@overload
def merge_tokens(
    x: torch.Tensor,
    selection: Selection,
    weight: torch.Tensor,
    group: torch.Tensor,
    *,
    metric: torch.Tensor | None = ...,
    align: str = ...,
    return_target: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def merge_tokens(
    x: torch.Tensor,
    selection: Selection,
    weight: torch.Tensor,
    group: torch.Tensor,
    *,
    metric: torch.Tensor | None = ...,
    align: str = ...,
    return_target: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def merge_tokens(
    x: torch.Tensor,
    selection: Selection,
    weight: torch.Tensor,
    group: torch.Tensor,
    *,
    metric: torch.Tensor | None = None,
    align: str = "left",
    return_target: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As `lightvlm_ext.ops.merge_tokens`; all arithmetic is float64, and x, metric and weight may be. Raises on
    every device."""
    dtypes = (*FLOATING, torch.float64)
    args = check_merge(x, selection, weight, group, metric=metric, align=align, dtypes=dtypes)
    index, count, _ = args.selection
    rows, tokens, width = x.shape
    slots = index.shape[1]
    out = torch.zeros((rows, slots, width), dtype=x.dtype, device=x.device)
    target = torch.full((rows, tokens), -1, dtype=torch.int32, device=x.device)
    for row in range(rows):
        kept = _kept_of(row, index, count, tokens)
        if not bool((args.weight[row].isfinite() & (args.weight[row] >= 0)).all()):
            raise ValueError(f"weight: row {row} must be finite and >= 0")
        target[row] = _targets(unit_vectors(args.metric[row]), kept, args.group[row])
        first = slots - len(kept) if args.right else 0
        out[row, first : first + len(kept)] = _merge(x[row], kept, target[row], args.weight[row].double())
    return (out, target) if return_target else out


def _kept_of(row: int, index: torch.Tensor, count: torch.Tensor, tokens: int) -> torch.Tensor:
    """Kept tokens of a row, int64."""
    if not 0 <= int(count[row]) <= index.shape[1]:
        raise ValueError(f"count: row {row} has {int(count[row])}, must be in [0, {index.shape[1]}]")
    kept = index[row, : int(count[row])].long()
    if bool(((kept < 0) | (kept >= tokens)).any()):
        raise ValueError(f"index: row {row} has an entry outside [0, {tokens})")
    if bool((kept[1:] <= kept[:-1]).any()):
        raise ValueError(f"index: row {row} must be strictly ascending up to count")
    return kept


def unit_vectors(metric: torch.Tensor) -> torch.Tensor:
    """Rows of length 1 in float64, or 0 for a zero vector (all values below 2^-126, the subnormals of float32) and
    for one with NaN or infinity."""
    vectors = torch.where(metric.isfinite().all(dim=-1, keepdim=True), metric, 0).double()
    if metric.shape[-1] == 0:
        return vectors
    # The largest first: squares of a float64 overflow, too.
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    vectors = torch.where(largest >= 2.0**-126, vectors / largest, 0)
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, vectors / length, 0)


def _targets(unit: torch.Tensor, kept: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """For each token the position in `kept` of the one it goes to, or -1."""
    target = torch.full_like(group, -1)
    target[kept] = torch.arange(len(kept), dtype=torch.int32, device=group.device)
    dropped = ((target < 0) & (group >= 0)).nonzero().flatten()
    allowed = group[dropped][:, None] == group[kept]
    if allowed.numel() == 0:
        return target
    cosine = torch.where(allowed, unit[dropped] @ unit[kept].T, -torch.inf)
    # argmax need not give the first of equals; the first that reaches the maximum is.
    best = (cosine == cosine.amax(dim=1, keepdim=True)).int().argmax(dim=1).int()
    target[dropped] = torch.where(allowed.any(dim=1), best, -1)
    return target


def _merge(x: torch.Tensor, kept: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    merged = x[kept]
    is_kept = torch.zeros_like(target, dtype=torch.bool)
    is_kept[kept] = True
    arrives = (target >= 0) & ~is_kept & (weight > 0)
    for entry in target[arrives].unique().tolist():
        tokens = (arrives & (target == entry)).nonzero().flatten()
        if weight[kept[entry]] > 0:
            tokens = torch.cat([kept[entry : entry + 1], tokens])
        share = (weight[tokens] / weight[tokens].sum())[:, None]
        merged[entry] = (share * x[tokens].double()).sum(dim=0).to(x.dtype)
    return merged
