"""Plain-torch reference of the ``importance`` op; also takes float64."""

from __future__ import annotations

import torch
from torch import Tensor


def importance(
    query: Tensor,
    key: Tensor,
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    row_pos: Tensor | None = None,
    lens: Tensor | None = None,
    leftpad: Tensor | None = None,
    rows: str = "mean",
    heads: str = "mean",
    axis: str = "key",
    return_visible: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`lightvlm_ext.ops.importance`. float64 inputs give float64 scores; others are computed in float32."""
    batch, window, q_heads, width = query.shape
    tokens, kv_heads = key.shape[1], key.shape[2]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    device = query.device
    scale = width**-0.5 if scale is None else scale
    end = torch.full((batch,), tokens, device=device) if lens is None else lens.long()
    begin = torch.zeros(batch, dtype=torch.long, device=device) if leftpad is None else leftpad.long()
    at = end[:, None] - window + torch.arange(window, device=device) if row_pos is None else row_pos.long()

    keys = torch.arange(tokens, device=device)
    inside = (keys >= begin[:, None]) & (keys < end[:, None])
    used = (at >= begin[:, None]) & (at >= 0)
    visible = inside[:, None, :] & used[:, :, None]
    if causal:
        visible = visible & (keys <= at[:, :, None])

    grouped = query.to(compute).reshape(batch, window, kv_heads, q_heads // kv_heads, width)
    logits = torch.einsum("bwkgd,bnkd->bkgwn", grouped, key.to(compute)) * scale
    shown = visible[:, None, None]
    logits = logits.masked_fill(~shown, float("-inf"))
    if axis == "query":
        probability = _softmax(logits, torch.logsumexp(logits, dim=3, keepdim=True), shown)
        score = probability.sum(dim=(1, 2, 4))
        return (score, visible.sum(dim=1, dtype=torch.int32)) if return_visible else score
    if lse is None:
        normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    else:
        normaliser = lse.to(compute).reshape(batch, kv_heads, -1, window, 1)
    probability = _softmax(logits, normaliser, shown)

    seen = visible.sum(dim=1)
    if rows == "max":
        per_head = probability.amax(dim=3) if window else probability.sum(dim=3)
    else:
        per_head = probability.sum(dim=3)
        if rows == "mean":
            per_head = per_head / seen.clamp_min(1)[:, None, None]
    if heads == "none":
        score = per_head.mean(dim=2)
    else:
        flat = per_head.flatten(1, 2)
        score = flat.amax(dim=1) if heads == "max" else flat.sum(dim=1) if heads == "sum" else flat.mean(dim=1)
    return (score, seen.to(torch.int32)) if return_visible else score


def _softmax(logits: Tensor, normaliser: Tensor, shown: Tensor) -> Tensor:
    """exp(logits - normaliser) where shown, 0 elsewhere and where the normaliser saw nothing (-inf)."""
    dead = normaliser == float("-inf")
    probability = torch.exp(logits - normaliser.masked_fill(dead, 0.0))
    return probability.masked_fill(~shown | dead, 0.0)
