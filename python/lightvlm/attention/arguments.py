"""Arguments that all the functions share: checked, and in the form that backends read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightvlm_ext import _checks

from ..host import upload

MAX_WIDTH = 256
Window = int | Sequence[int] | Tensor | None


class Shape(NamedTuple):
    """What shapes the logits, with flash-attn's defaults filled in; see :class:`.call.Call`."""

    scale: float
    left: int
    right: int
    softcap: float
    alibi: Tensor | None


class Probes(NamedTuple):
    """Rows whose attention is the importance: the last ``last``, or those of ``rows``, (W,) or (B, W)."""

    last: int
    rows: Tensor | None


def check_heads(query: object, key: object, value: object, names: tuple[str, str, str], form: str) -> None:
    """query, key and value fit each other.   form: "dense" (4 dimensions), "packed" (3), "pages" (query 3, keys 4)."""
    if not _fit(query, key, value, form):
        q, k, v = (_checks.tensor(x, name) for x, name in zip((query, key, value), names, strict=True))
        _say_why(q, k, v, names, form)


def _fit(query: object, key: object, value: object, form: str) -> bool:
    """What _say_why goes through one by one, as quickly as it can be asked: decoding asks at every token."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return False
    shape, of_keys = query.shape, key.shape
    dims = 3 if form == "packed" else 4
    if len(shape) != (4 if form == "dense" else 3) or len(of_keys) != dims or value.shape != of_keys:
        return False
    heads, width, key_heads = shape[-2], shape[-1], of_keys[-2]
    alike = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    sizes = of_keys[-1] == width and 1 <= width <= MAX_WIDTH and key_heads >= 1 and heads >= 1
    return alike and query.dtype in _checks.FLOATING and sizes and heads % key_heads == 0


def _say_why(query: Tensor, key: Tensor, value: Tensor, names: tuple[str, str, str], form: str) -> None:
    _checks.dtype(query, names[0], *_checks.FLOATING)
    for tensor, name in zip((key, value), names[1:], strict=True):
        _checks.dtype(tensor, name, query.dtype)
        _checks.same_device(tensor, name, query, names[0])
    _checks.shape(query, names[0], ("total_q", "Hq", "D") if form != "dense" else ("B", "Sq", "Hq", "D"))
    width, heads = query.shape[-1], query.shape[-2]
    rows = {"packed": ("total_k",), "pages": ("P", "page_size"), "dense": ("B", "Sk")}[form]
    _checks.shape(key, names[1], (*rows, "Hkv", width))
    _checks.shape(value, names[2], tuple(key.shape))
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{names[0]}: has head_dim {width}, must be 1 to {MAX_WIDTH}")
    raise ValueError(
        f"{names[0]}: has {heads} heads, must be a positive multiple of {names[1]}'s, {key.shape[-2]}"
    )


def check_forward_only(**tensors: Tensor | None) -> None:
    """No gradient is asked for: there is no backward here, and a silent constant would be worse than an error."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires grad, but lightvlm's attention has no backward pass; call it under "
                "torch.no_grad(), or use flash_attn for training"
            )


def check_no_dropout(dropout_p: object) -> None:
    """dropout_p is 0."""
    if _checks.real(dropout_p, "dropout_p") != 0.0:
        raise ValueError(f"dropout_p: got {dropout_p}, must be 0.0: lightvlm's attention is for inference")


def shape_of_logits(
    query: Tensor,
    batch: int,
    max_q: int,
    max_k: int,
    *,
    softmax_scale: object,
    causal: object,
    window_size: object,
    softcap: object,
    alibi_slopes: object,
) -> Shape:
    """The five options that shape the logits.

    A window that hides nothing becomes -1, so that backends without windows can take it.
    """
    heads, width = query.shape[-2:]
    scale = width**-0.5 if softmax_scale is None else _checks.real(softmax_scale, "softmax_scale")
    cap = _checks.real(softcap, "softcap")
    if cap < 0:
        raise ValueError(f"softcap: got {softcap}, must be at least 0")
    _flag(causal, "causal")
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size: got {window_size!r}, must be a pair of ints, (left, right)")
    left = _checks.integer(window_size[0], "window_size", -_checks.INT32_MAX)
    right = _checks.integer(window_size[1], "window_size", -_checks.INT32_MAX)
    if causal:
        right = 0
    # The last row stands at the last key, the first one max_q - 1 before it.
    left = -1 if left < 0 or left >= max_k - 1 else left
    right = -1 if right < 0 or right >= max_q - 1 else right
    alibi = None
    if alibi_slopes is not None:
        alibi = _checks.tensor(alibi_slopes, "alibi_slopes")
        _checks.dtype(alibi, "alibi_slopes", torch.float32)
        _checks.shape(alibi, "alibi_slopes", (heads,) if alibi.dim() == 1 else (batch, heads))
        _checks.same_device(alibi, "alibi_slopes", query, "q")
    return Shape(scale, left, right, cap, alibi)


def check_flags(**flags: object) -> None:
    """Each is a bool, or what flash-attn's own binding takes for one: None, an int, numpy's bool."""
    for name, value in flags.items():
        _flag(value, name)


def probes_of(window: object, query: Tensor, batch: int) -> Probes | None:
    """importance_window: None, how many of the last rows, or which rows (a list, (W,) or (B, W); negative: from the
    end)."""
    if window is None:
        return None
    if isinstance(window, Tensor):
        rows = window
        if rows.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"importance_window: has dtype {rows.dtype}, must be int32 or int64")
        _checks.same_device(rows, "importance_window", query, "q")
    elif isinstance(window, Sequence) and not isinstance(window, str):
        numbers = [_checks.integer(row, "importance_window", -_checks.INT32_MAX) for row in window]
        rows = upload(numbers, query.device, torch.int64)
    else:
        return Probes(_checks.integer(window, "importance_window", 1), None)
    if rows.dim() == 1 and rows.shape[0] > 0:
        return Probes(0, rows)
    if rows.dim() != 2 or rows.shape[0] != batch or rows.shape[1] < 1:
        raise ValueError(
            f"importance_window: has shape {tuple(rows.shape)}, must be (W,) or ({batch}, W), W at least 1"
        )
    return Probes(0, rows)


def _flag(value: object, name: str) -> None:
    if isinstance(value, bool | int) or value is None:
        return
    if getattr(getattr(value, "dtype", None), "kind", None) != "b":
        raise TypeError(f"{name}: got {type(value).__name__}, must be a bool")


def check_table(table: object, query: Tensor, batch: int) -> None:
    """block_table is (B, max_blocks) int32, on query's device."""
    found = _checks.tensor(table, "block_table")
    _checks.dtype(found, "block_table", torch.int32)
    _checks.shape(found, "block_table", (batch, "max_blocks"))
    _checks.last_contiguous(found, "block_table")
    _checks.same_device(found, "block_table", query, "q")


def check_cu_seqlens(offsets: object, name: str, query: Tensor) -> None:
    """(B + 1,) int32, at least one number, on query's device; what they say is checked elsewhere (`values.py`)."""
    tensor = _checks.tensor(offsets, name)
    _checks.dtype(tensor, name, torch.int32)
    _checks.shape(tensor, name, ("B + 1",))
    if tensor.shape[0] < 1:
        raise ValueError(f"{name}: is empty, must have B + 1 entries")
    _checks.same_device(tensor, name, query, "q")
