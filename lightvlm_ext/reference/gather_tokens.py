"""gather_tokens, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch

from .._gather_args import check_gather


@overload
def gather_tokens(
    x: torch.Tensor, index: torch.Tensor, count: torch.Tensor, *, align: str = ...
) -> torch.Tensor: ...


@overload
def gather_tokens(
    x: Sequence[torch.Tensor], index: torch.Tensor, count: torch.Tensor, *, align: str = ...
) -> list[torch.Tensor]: ...


def gather_tokens(
    x: torch.Tensor | Sequence[torch.Tensor],
    index: torch.Tensor,
    count: torch.Tensor,
    *,
    align: str = "left",
) -> torch.Tensor | list[torch.Tensor]:
    """As `lightvlm_ext.ops.gather_tokens`. Raises on every device."""
    tensors, index, count, right = check_gather(x, index, count, align=align)
    rows, slots = index.shape
    if tensors:
        _check_values(index, count, tensors[0].shape[1])
    gathered = []
    for one in tensors:
        out = one.new_zeros((rows, slots, *one.shape[2:]))
        for row, kept in enumerate(count.tolist()):
            first = slots - kept if right else 0
            out[row, first : first + kept] = one[row, index[row, :kept].long()]
        gathered.append(out)
    return gathered[0] if isinstance(x, torch.Tensor) else gathered


def _check_values(index: torch.Tensor, count: torch.Tensor, tokens: int) -> None:
    slots = index.shape[1]
    for row, kept in enumerate(count.tolist()):
        if not 0 <= kept <= slots:
            raise ValueError(f"count: row {row} has {kept}, must be in [0, {slots}], the index slots")
        entries = index[row, :kept].tolist()
        for position, entry in enumerate(entries):
            if not 0 <= entry < tokens:
                raise ValueError(
                    f"index: row {row} has {entry} at position {position}, must be in [0, {tokens})"
                )
            if position and entry <= entries[position - 1]:
                raise ValueError(
                    f"index: row {row} has {entry} at position {position}, must be strictly ascending"
                )
