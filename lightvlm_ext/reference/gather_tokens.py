"""Plain-torch reference of the ``gather_tokens`` op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor


@overload
def gather_tokens(x: Tensor, index: Tensor, count: Tensor, *, align: str = ...) -> Tensor: ...
@overload
def gather_tokens(x: Sequence[Tensor], index: Tensor, count: Tensor, *, align: str = ...) -> list[Tensor]: ...
def gather_tokens(
    x: Tensor | Sequence[Tensor], index: Tensor, count: Tensor, *, align: str = "left"
) -> Tensor | list[Tensor]:
    """See :func:`lightvlm_ext.ops.gather_tokens`."""
    if not isinstance(x, Tensor):
        return [gather_tokens(one, index, count, align=align) for one in x]
    slots = index.shape[1]
    source, valid = aligned_index(index, count, align)
    shape = (*source.shape, *([1] * (x.dim() - 2)))
    picked = x.gather(1, source.clamp_min(0).reshape(shape).expand(-1, -1, *x.shape[2:])) if x.shape[1] and slots else None
    if picked is None:
        return x.new_zeros(x.shape[0], slots, *x.shape[2:])
    return torch.where(valid.reshape(shape), picked, torch.zeros((), dtype=x.dtype, device=x.device))


def aligned_index(index: Tensor, count: Tensor, align: str) -> tuple[Tensor, Tensor]:
    """The source of every output slot (int64) and whether it has one, for rows that stand flush left or right."""
    slots = index.shape[1]
    slot = torch.arange(slots, device=index.device)[None]
    at = slot - (slots - count.long()[:, None]) if align == "right" else slot.expand(index.shape[0], -1)
    valid = (at >= 0) & (at < count.long()[:, None])
    source = index.long().gather(1, at.clamp(0, max(slots - 1, 0))) if slots else index.long()
    return source, valid
