"""importance, in plain torch."""

from __future__ import annotations

import math

import torch

from .. import _checks
from .._importance_args import ImportanceArgs, check_importance


def importance(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    lse: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    row_pos: torch.Tensor | None = None,
    lens: torch.Tensor | None = None,
    leftpad: torch.Tensor | None = None,
    rows: str = "mean",
    heads: str = "mean",
    axis: str = "key",
    return_visible: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As `lightvlm_ext.ops.importance`; float64 inputs give float64 scores. Raises on every device."""
    args = check_importance(
        query,
        key,
        lse=lse,
        scale=scale,
        causal=causal,
        row_pos=row_pos,
        lens=lens,
        leftpad=leftpad,
        rows=rows,
        heads=heads,
        axis=axis,
        dtypes=(*_checks.FLOATING, torch.float64),
    )
    shown = _visible(args)
    seen = shown.sum(dim=1, dtype=torch.int32)

    # (batch, key head, head of its group, row, token)
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(compute).unflatten(2, (key.shape[2], -1))
    logits = torch.einsum("bwkgd,bnkd->bkgwn", grouped, key.to(compute)) * args.scale
    shown = shown[:, None, None]
    logits = logits.masked_fill(~shown, -math.inf)
    if axis == "query":
        score = _softmax(logits, shown, 3).sum(dim=(1, 2, 4))
        return (score, seen) if return_visible else score
    if args.lse is None:
        weights = _softmax(logits, shown, 4)
    else:
        normaliser = args.lse.to(compute).unflatten(1, (key.shape[2], -1))[..., None]
        weights = torch.exp(logits - normaliser).masked_fill(~shown | (normaliser == -math.inf), 0)

    if rows == "max":
        per_head = weights.amax(dim=3) if query.shape[1] else weights.sum(dim=3)
    else:
        per_head = weights.sum(dim=3)
        if rows == "mean":
            per_head = per_head / seen.clamp_min(1)[:, None, None]
    if heads == "none":
        score = per_head.mean(dim=2)
    elif heads == "max":
        score = per_head.amax(dim=(1, 2))
    else:
        score = per_head.sum(dim=(1, 2)) if heads == "sum" else per_head.mean(dim=(1, 2))
    return (score, seen) if return_visible else score


def _visible(args: ImportanceArgs) -> torch.Tensor:
    """(batch, rows, tokens): whether a row sees a key."""
    batch, window = args.query.shape[:2]
    tokens, device = args.key.shape[1], args.query.device
    end = torch.full((batch,), tokens, device=device) if args.lens is None else args.lens.long()
    begin = torch.zeros(batch, dtype=torch.long, device=device)
    if args.leftpad is not None:
        begin = args.leftpad.long()
    for row, (low, high) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        if not 0 <= low <= high <= tokens:
            raise ValueError(
                f"lens, leftpad: row {row} has lens {high} and leftpad {low}, "
                f"must satisfy 0 <= leftpad <= lens <= {tokens}"
            )
    position = end[:, None] - window + torch.arange(window, device=device)
    if args.row_pos is not None:
        position = args.row_pos.long()
    keys = torch.arange(tokens, device=device)
    inside = (keys >= begin[:, None]) & (keys < end[:, None])
    shown = inside[:, None, :] & (position >= begin[:, None])[:, :, None]
    return shown & (keys <= position[:, :, None]) if args.causal else shown


def _softmax(logits: torch.Tensor, shown: torch.Tensor, dim: int) -> torch.Tensor:
    """Softmax over the shown entries; 0 elsewhere, also where nothing is shown."""
    if logits.numel() == 0:
        return logits
    # Where all logits are -inf, exp(-inf - 0) is 0. A NaN or +inf is the maximum, and makes all NaN.
    highest = logits.amax(dim=dim, keepdim=True)
    weights = torch.exp(logits - highest.masked_fill(highest == -math.inf, 0))
    total = weights.sum(dim=dim, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1)).masked_fill(~shown, 0)
