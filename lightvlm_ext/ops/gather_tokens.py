"""gather_tokens: kept rows of several tensors, moved together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch

from .. import _errors, _library
from .._gather_args import check_gather
from .._observe import observed

# What one launch moves; longer lists take several.
MAX_TENSORS = 16


@overload
def gather_tokens(
    x: torch.Tensor, index: torch.Tensor, count: torch.Tensor, *, align: str = ...
) -> torch.Tensor: ...


@overload
def gather_tokens(
    x: Sequence[torch.Tensor], index: torch.Tensor, count: torch.Tensor, *, align: str = ...
) -> list[torch.Tensor]: ...


@observed
def gather_tokens(
    x: torch.Tensor | Sequence[torch.Tensor],
    index: torch.Tensor,
    count: torch.Tensor,
    *,
    align: str = "left",
) -> torch.Tensor | list[torch.Tensor]:
    """Gathers the kept tokens of each row: hidden states, positions, rotary tables, whatever has tokens second.

    Slot s of row r gets token index[r, s] for s < count[r], and zeros (False) from there on. All tensors of a
    list are moved in one launch (16 at a time).

    Args:
        x: (R, N, ...), any dtype and any strides, moved as bytes; or a sequence of such with the same R and N.
            Broadcast rows (stride 0) and permuted views cost no copy.
        index: (R, M) int32, ascending up to count, as `select` gives it. Entries past count are not read.
        count: (R,) int32, in [0, M].
        align: "left", or "right": each row stands flush right in its M slots, that is, slot
            M - count[r] + j gets token index[r, j], and the slots before are zeros.

    Returns:
        (R, M, ...), contiguous, in x's dtype and on its device; a list of such for a sequence.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not fit, or align is neither. On the CPU also: an index below count
            lies outside [0, N) or is not above the one before, or a count lies outside [0, M]. On CUDA these
            set the device error word (`lightvlm_ext.device_errors`), and the slot of such an index, or all
            slots of such a row, are zeros.
    """
    tensors, index, count, right = check_gather(x, index, count, align=align)
    _library.check_backend(index.device)
    rows, slots = index.shape
    gathered = [one.new_empty((rows, slots, *one.shape[2:])) for one in tensors]
    error = _errors.error_word("gather_tokens", index.device)
    op = _library.op("gather_tokens")
    if 0 < len(tensors) <= MAX_TENSORS:
        op(tensors, index, count, right, gathered, error)
    else:
        for first in range(0, len(tensors), MAX_TENSORS):
            group = slice(first, first + MAX_TENSORS)
            op(tensors[group], index, count, right, gathered[group], error)
    if error is not None:
        _errors.check_now("gather_tokens", index.device)
    return gathered[0] if isinstance(x, torch.Tensor) else gathered


@_library.register_fake("gather_tokens")
def _gather_tokens_fake(
    x: list[torch.Tensor],
    index: torch.Tensor,
    count: torch.Tensor,
    right: bool,
    out: list[torch.Tensor],
    error: torch.Tensor | None,
) -> None:
    return None
