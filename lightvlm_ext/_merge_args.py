"""Arguments of merge_tokens, checked once for the op and its reference."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _checks
from ._gather_args import ALIGNMENTS
from ._types import Selection


class MergeArgs(NamedTuple):
    """x and metric with a contiguous last dimension, and the like."""

    x: torch.Tensor
    metric: torch.Tensor
    selection: Selection
    weight: torch.Tensor
    group: torch.Tensor
    right: bool


def check_merge(
    x: object,
    selection: object,
    weight: object,
    group: object,
    *,
    metric: object,
    align: object,
    dtypes: tuple[torch.dtype, ...] = _checks.FLOATING,
) -> MergeArgs:
    """Checks types, shapes, dtypes and devices; raises TypeError or ValueError naming the argument."""
    x = _checks.tensor(x, "x")
    _checks.dtype(x, "x", *dtypes)
    _checks.shape(x, "x", ("R", "N", "C"))
    rows, tokens, _ = x.shape
    if metric is None:
        metric = x
    metric = _checks.tensor(metric, "metric")
    _checks.dtype(metric, "metric", *dtypes)
    _checks.shape(metric, "metric", (rows, tokens, "Cm"))
    _checks.same_device(metric, "metric", x, "x")

    if not isinstance(selection, tuple) or len(selection) != 3:
        raise TypeError(
            f"selection: got {type(selection).__name__}, must be a Selection(index, count, inverse)"
        )
    index = _checks.tensor(selection[0], "selection.index")
    count = _checks.tensor(selection[1], "selection.count")
    inverse = _checks.tensor(selection[2], "selection.inverse")
    for name, value, shape in (
        ("selection.index", index, (rows, "M")),
        ("selection.count", count, (rows,)),
        ("selection.inverse", inverse, (rows, tokens)),
        ("group", group := _checks.tensor(group, "group"), (rows, tokens)),
    ):
        _checks.dtype(value, name, torch.int32)
        _checks.shape(value, name, shape)
        _checks.same_device(value, name, x, "x")
    weight = _checks.tensor(weight, "weight")
    _checks.dtype(weight, "weight", torch.float32, *([torch.float64] if torch.float64 in dtypes else []))
    _checks.shape(weight, "weight", (rows, tokens))
    _checks.same_device(weight, "weight", x, "x")
    right = _checks.choice(align, "align", ALIGNMENTS) == "right"
    return MergeArgs(
        _last_contiguous(x),
        _last_contiguous(metric),
        Selection(_last_contiguous(index), count, inverse),
        _last_contiguous(weight),
        _last_contiguous(group),
        right,
    )


def _last_contiguous(value: torch.Tensor) -> torch.Tensor:
    return value if value.shape[-1] <= 1 or value.stride(-1) == 1 else value.contiguous()
