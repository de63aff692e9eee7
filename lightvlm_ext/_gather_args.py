"""Arguments of gather_tokens, checked once for the op and its reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _checks

ALIGNMENTS = ("left", "right")


def check_gather(
    x: object, index: object, count: object, *, align: object
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, bool]:
    """(tensors to move, index, count, whether rows stand flush right); see ops.gather_tokens for them."""
    tensors: Sequence[object] = x if isinstance(x, (list, tuple)) else (x,)
    if (
        isinstance(index, torch.Tensor)
        and isinstance(count, torch.Tensor)
        and align in ALIGNMENTS
        and _is_plain(tensors, index, count)
    ):
        return list(tensors), index, count, align == "right"  # type: ignore[arg-type]
    return _check_each(x, index, count, align=align)


def _is_plain(tensors: Sequence[object], index: torch.Tensor, count: torch.Tensor) -> bool:
    """Whether all is as it should be. A call moves a few rows: what it takes to word an error would cost more."""
    shape, device = index.shape, index.device
    if (
        len(shape) != 2
        or count.shape != shape[:1]
        or index.dtype is not torch.int32
        or count.dtype is not torch.int32
        or count.device != device
        or not index.is_contiguous()
        or not count.is_contiguous()
    ):
        return False
    rows, tokens = shape[0], -1
    for one in tensors:
        if not isinstance(one, torch.Tensor) or one.dim() < 2 or one.device != device:
            return False
        if tokens < 0:
            tokens = one.shape[1]
        if one.shape[:2] != (rows, tokens):
            return False
    return tokens <= _checks.INT32_MAX


def _check_each(
    x: object, index: object, count: object, *, align: object
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, bool]:
    index = _checks.tensor(index, "index")
    count = _checks.tensor(count, "count")
    _checks.dtype(index, "index", torch.int32)
    _checks.dtype(count, "count", torch.int32)
    _checks.shape(index, "index", ("R", "M"))
    rows = index.shape[0]
    _checks.shape(count, "count", (rows,))
    _checks.same_device(count, "count", index, "index")
    right = _checks.choice(align, "align", ALIGNMENTS) == "right"

    if isinstance(x, torch.Tensor):
        named = [("x", x)]
    elif isinstance(x, Sequence) and not isinstance(x, str):
        named = [(f"x[{i}]", _checks.tensor(one, f"x[{i}]")) for i, one in enumerate(x)]
    else:
        raise TypeError(f"x: got {type(x).__name__}, must be a torch.Tensor or a sequence of them")
    tokens: int | None = None
    for name, one in named:
        if one.dim() < 2 or one.shape[0] != rows or tokens not in (None, one.shape[1]):
            wanted = "N" if tokens is None else tokens
            raise ValueError(f"{name}: has shape {tuple(one.shape)}, must be ({rows}, {wanted}, ...)")
        tokens = one.shape[1]
        if tokens > _checks.INT32_MAX:
            raise ValueError(f"{name}: has {tokens} tokens, must have at most {_checks.INT32_MAX}")
        _checks.same_device(one, name, index, "index")
    if index.stride(-1) != 1 and index.shape[-1] > 1:
        index = index.contiguous()
    return [one for _, one in named], index, count.contiguous(), right
