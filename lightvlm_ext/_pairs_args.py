"""Arguments of merge_pairs, checked once for the op and its reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _checks
from ._gather_args import ALIGNMENTS


@dataclass(frozen=True)
class PairsArgs:
    """Checked arguments; every tensor has a contiguous last dimension.

    merge: pairs of each window, host int.   ratio: or share of its tokens, host float.   each: or either of
    them on the device, (R,) or (R, G) int32 or float.   Exactly one of the three is given.
    """

    x: torch.Tensor
    metric: torch.Tensor
    window: torch.Tensor
    source: torch.Tensor | None
    protected: torch.Tensor | None
    weight: torch.Tensor | None
    merge: int | None
    ratio: float | None
    each: torch.Tensor | None
    eps: float
    right: bool
    capacity: int


def check_pairs(
    x: object,
    window: object,
    *,
    merge: object,
    weight: object,
    metric: object,
    source: object,
    protected: object,
    eps: object,
    align: object,
    capacity: object,
    dtypes: tuple[torch.dtype, ...] = _checks.FLOATING,
) -> PairsArgs:
    """Checks types, shapes, dtypes and devices; raises TypeError or ValueError naming the argument."""
    x = _checks.tensor(x, "x")
    _checks.dtype(x, "x", *dtypes)
    _checks.shape(x, "x", ("R", "N", "C"))
    rows, tokens, _ = x.shape
    scalars = (torch.float32, *([torch.float64] if torch.float64 in dtypes else []))

    def by_token(value: object, name: str, *allowed: torch.dtype) -> torch.Tensor:
        checked = _checks.tensor(value, name)
        _checks.dtype(checked, name, *allowed)
        _checks.shape(checked, name, (rows, tokens))
        _checks.same_device(checked, name, x, "x")
        return _last_contiguous(checked)

    metric = x if metric is None else _checks.tensor(metric, "metric")
    _checks.dtype(metric, "metric", *dtypes)
    _checks.shape(metric, "metric", (rows, tokens, "Cm"))
    _checks.same_device(metric, "metric", x, "x")
    eps = _checks.real(eps, "eps")
    if eps < 0:
        raise ValueError(f"eps: got {eps}, must be >= 0")

    count: int | None = None
    ratio: float | None = None
    each: torch.Tensor | None = None
    if isinstance(merge, torch.Tensor):
        _checks.dtype(merge, "merge", torch.int32, *scalars)
        _checks.same_device(merge, "merge", x, "x")
        _checks.shape(merge, "merge", (rows, "G") if merge.dim() == 2 else (rows,))
        each = _last_contiguous(merge)
    elif isinstance(merge, float):
        ratio = merge
        if not 0 <= ratio <= 1:
            raise ValueError(f"merge: got {merge}, a share must be in [0, 1]")
    else:
        count = _checks.integer(merge, "merge", 0)
    return PairsArgs(
        _last_contiguous(x),
        _last_contiguous(metric),
        by_token(window, "window", torch.int32),
        None if source is None else by_token(source, "source", torch.bool),
        None if protected is None else by_token(protected, "protected", torch.bool),
        None if weight is None else by_token(weight, "weight", *scalars),
        count,
        ratio,
        each,
        eps,
        _checks.choice(align, "align", ALIGNMENTS) == "right",
        tokens if capacity is None else _checks.integer(capacity, "capacity", 0),
    )


def _last_contiguous(value: torch.Tensor) -> torch.Tensor:
    return value if value.shape[-1] <= 1 or value.stride(-1) == 1 else value.contiguous()
