"""Writes new tokens behind the old ones, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def append_(
    caches: Sequence[Tensor],
    new: Sequence[Tensor],
    lens: Tensor,
    batch_idx: Tensor | None,
    table: Tensor | None,
    *,
    clip: bool,
) -> None:
    """Each cache gets its new (B, T, Hkv, D) at tokens lens[b] ... lens[b] + T - 1 of each row b.

    caches: (B_cache, capacity, Hkv, D), row b being row batch_idx[b] (default b); or pages (P, page_size, Hkv, D),
    with table (B, max_blocks). All alike, and so are the new tokens.   lens: (B,) int32.
    clip: leave out tokens beyond the capacity, where the caller could not look at lens without waiting for the device.
        Their write goes to the last place there is, with what belongs there anyway. Otherwise they must not be.
    """
    batch, tokens = new[0].shape[:2]
    size = caches[0].shape[1]
    if new[0].numel() == 0 or caches[0].numel() == 0:
        return
    device = new[0].device
    capacity = size if table is None else table.shape[1] * size
    first = lens.long()[:, None]
    at = first if tokens == 1 else first + torch.arange(tokens, device=device)
    if clip:
        at = at.clamp(0, capacity - 1)
    if table is not None:
        block = at.div(size, rounding_mode="floor")
        row, place = table.long().gather(1, block).clamp(0, caches[0].shape[0] - 1), at - block * size
    else:
        row = torch.arange(batch, device=device) if batch_idx is None else batch_idx.long()
        row, place = row[:, None], at
    for cache, values in zip(caches, new, strict=True):
        if clip:
            source = at - first
            rows = torch.arange(batch, device=device)[:, None]
            moved = values[rows, source.clamp(0, tokens - 1)]
            values = torch.where((source >= 0)[..., None, None], moved, cache[row, place])
        cache.index_put_((row, place), values)
