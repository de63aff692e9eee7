"""Arguments of importance, checked once for the op and its reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _checks

ROWS = ("sum", "mean", "max")
HEADS = ("mean", "sum", "max", "none")
AXES = ("key", "query")
MAX_WIDTH = 256


@dataclass(frozen=True)
class ImportanceArgs:
    """Checked arguments; every tensor has a contiguous last dimension."""

    query: torch.Tensor
    key: torch.Tensor
    lse: torch.Tensor | None
    scale: float
    causal: bool
    row_pos: torch.Tensor | None
    lens: torch.Tensor | None
    leftpad: torch.Tensor | None
    rows: str
    heads: str
    axis: str


def check_importance(
    query: object,
    key: object,
    *,
    lse: object,
    scale: object,
    causal: object,
    row_pos: object,
    lens: object,
    leftpad: object,
    rows: object,
    heads: object,
    axis: object,
    dtypes: tuple[torch.dtype, ...] = _checks.FLOATING,
) -> ImportanceArgs:
    """The arguments of importance, checked and with the default scale; see ops.importance for them."""
    query, key = _checks.tensor(query, "query"), _checks.tensor(key, "key")
    _checks.dtype(query, "query", *dtypes)
    _checks.dtype(key, "key", query.dtype)
    _checks.shape(query, "query", ("B", "W", "Hq", "D"))
    batch, window, query_heads, width = query.shape
    _checks.shape(key, "key", (batch, "N", "Hkv", width))
    key_heads = key.shape[2]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"query: has head width {width}, must be 1 to {MAX_WIDTH}")
    if key_heads < 1 or query_heads < 1 or query_heads % key_heads:
        raise ValueError(
            f"query: has {query_heads} heads, must be a positive multiple of key's heads, {key_heads}"
        )
    for tensor, name in ((query, "query"), (key, "key")):
        if max(tensor.shape) > _checks.INT32_MAX:
            raise ValueError(
                f"{name}: has shape {tuple(tensor.shape)}, must be below 2**31 in each dimension"
            )
        _checks.last_contiguous(tensor, name)
    _checks.same_device(key, "key", query, "query")

    rows, heads = _checks.choice(rows, "rows", ROWS), _checks.choice(heads, "heads", HEADS)
    axis = _checks.choice(axis, "axis", AXES)
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}, must be a bool")
    if lse is not None and axis == "query":
        raise ValueError("lse: is normalised over the keys, must be None with axis='query'")
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return ImportanceArgs(
        query=query,
        key=key,
        lse=_optional(lse, "lse", (batch, query_heads, window), query, torch.float32, lse_dtype),
        scale=width**-0.5 if scale is None else _checks.real(scale, "scale"),
        causal=causal,
        row_pos=_optional(row_pos, "row_pos", (batch, window), query, torch.int32),
        lens=_optional(lens, "lens", (batch,), query, torch.int32),
        leftpad=_optional(leftpad, "leftpad", (batch,), query, torch.int32),
        rows=rows,
        heads=heads,
        axis=axis,
    )


def _optional(
    value: object, name: str, shape: tuple[int, ...], query: torch.Tensor, *dtypes: torch.dtype
) -> torch.Tensor | None:
    if value is None:
        return None
    tensor = _checks.tensor(value, name)
    _checks.dtype(tensor, name, *dtypes)
    _checks.shape(tensor, name, shape)
    _checks.same_device(tensor, name, query, "query")
    # A few numbers for each row: worth a copy where they are strided.
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
