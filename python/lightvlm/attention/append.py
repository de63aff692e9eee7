"""Writes new tokens behind the old ones, in place."""

from __future__ import annotations

import torch
from torch import Tensor


def append_(
    cache: Tensor,
    new: Tensor,
    lens: Tensor,
    batch_idx: Tensor | None,
    table: Tensor | None,
    *,
    clip: bool,
) -> None:
    """cache gets new (B, T, Hkv, D) at tokens lens[b] ... lens[b] + T - 1 of each row b.

    cache: (B_cache, capacity, Hkv, D), row b being its row batch_idx[b] (default b); or pages (P, page_size, Hkv, D),
    with table (B, max_blocks).   lens: (B,) int32.

    clip: leave out tokens beyond the capacity, where the caller could not look at lens without waiting for the device.
        Their write goes to the last place there is, with what belongs there anyway. Otherwise they must not be.
    """
    tokens, size = new.shape[1], cache.shape[1]
    if new.numel() == 0 or cache.numel() == 0:
        return
    capacity = size if table is None else table.shape[1] * size
    rows = torch.arange(new.shape[0], device=new.device)
    wanted = lens.long()[:, None] + torch.arange(tokens, device=new.device)
    at = wanted.clamp(0, capacity - 1)
    if table is not None:
        place = (table.long().gather(1, at // size).clamp(0, cache.shape[0] - 1), at % size)
    else:
        place = ((rows if batch_idx is None else batch_idx.long())[:, None], at)
    if clip:
        source = at - lens.long()[:, None]
        moved = new[rows[:, None], source.clamp(0, tokens - 1)]
        new = torch.where((source >= 0)[..., None, None], moved, cache[place])
    cache.index_put_(place, new)
