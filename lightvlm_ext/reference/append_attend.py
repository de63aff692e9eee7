"""append_attend_, in plain torch."""

from __future__ import annotations

import torch

from .. import _checks
from .._decode_args import DecodeArgs, check_append
from .._kv import KVSegment
from .decode_attention import bounds_of, check_pages, decode_attention


def append_attend_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    new_key: torch.Tensor | None,
    new_value: torch.Tensor | None,
    lens: torch.Tensor | None,
    *,
    leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    mass: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `lightvlm_ext.ops.append_attend_`; float64 inputs give float64. Raises on every device."""
    dtypes = (*_checks.FLOATING, torch.float64)
    args = check_append(
        query, key, value, new_key, new_value, lens, leftpad, block_table, scale, mass, dtypes=dtypes
    )
    if new_key is not None and new_value is not None and new_key.shape[1] > 0:
        added = new_key.shape[1]
        before = [args.tokens(0) - added] * len(query) if lens is None else lens.tolist()
        if min(before, default=0) < 0:
            raise ValueError(f"lens: row {before.index(min(before))} has {min(before)}, must be >= 0")
        args.lens[0] = lens = None if lens is None else lens + added
        bounds = bounds_of(args, 0)
        check_pages(args, 0, [(min(begin, end - added), end) for begin, end in bounds])
        for row, first in enumerate(before):
            for token in range(added):
                at = _place(args, row, first + token)
                key[at], value[at] = new_key[row, token], new_value[row, token]
    segments = [KVSegment(key, value, lens, leftpad, block_table)]
    return decode_attention(query, segments, scale=scale, mass=None if mass is None else [mass])


def _place(args: DecodeArgs, row: int, token: int) -> tuple[int, int]:
    """Where a token of a batch row is in the cache: row and token, or page and slot."""
    table = args.block_table[0]
    if table is None:
        return row, token
    size = args.key[0].shape[1]
    return int(table[row, token // size]), token % size
