"""Plain-torch reference of the ``merge_tokens`` op; also takes float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gather_tokens import gather_tokens

if TYPE_CHECKING:
    from ..ops import Selection


def merge_tokens(
    x: Tensor, selection: Selection, weight: Tensor, group: Tensor, *, metric: Tensor | None = None, align: str = "left"
) -> Tensor:
    """See :func:`lightvlm_ext.ops.merge_tokens`. Sums run in ascending token order; float64 stays float64."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    metric = x if metric is None else metric
    out = gather_tokens(x, selection.index, selection.count)
    for row in range(x.shape[0]):
        _merge_row(out[row], x[row], selection, row, weight[row].to(compute), group[row], metric[row].to(compute))
    if align == "right":
        slots = torch.arange(out.shape[1], device=out.device, dtype=torch.int32).expand(out.shape[0], -1)
        out = gather_tokens(out, slots, selection.count, align="right")
    return out


def _merge_row(
    out: Tensor, x: Tensor, selection: Selection, row: int, weight: Tensor, group: Tensor, metric: Tensor
) -> None:
    """Merge one row's dropped tokens into ``out`` (M, C)."""
    kept = selection.index[row, : int(selection.count[row])].long()
    is_kept = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    is_kept[kept] = True
    dropped = torch.nonzero(~is_kept & (group >= 0)).flatten()
    if not len(kept) or not len(dropped):
        return
    length = metric.norm(dim=-1, keepdim=True)
    unit = torch.where(length > 0, metric / length, 0.0)
    cosine = unit[dropped] @ unit[kept].T
    allowed = (group[dropped][:, None] == group[kept][None]) & (group[kept] >= 0)[None]
    cosine = torch.where(allowed, cosine, -torch.inf)
    # argmax need not give the first of equals; the first index that reaches the maximum does
    best = (cosine == cosine.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    for slot in torch.unique(best[allowed.any(dim=1)]).tolist():
        total = weight[kept[slot]].clone()
        value = total * x[kept[slot]].to(weight.dtype)
        arrives = dropped[(best == slot) & allowed.any(dim=1)]
        for token in arrives.tolist():  # ascending, as the op sums
            value = value + weight[token] * x[token].to(weight.dtype)
            total = total + weight[token]
        if total > 0:
            out[slot] = (value / total).to(out.dtype)
