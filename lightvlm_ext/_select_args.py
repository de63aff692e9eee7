"""Arguments of select and select_diverse, checked once for ops and references."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _checks

# 2**40 * 2**23 stays below 2**63: the sums of masses cannot overflow.
MASS_MAX_TOKENS = 2**23


class SelectArgs(NamedTuple):
    """Checked arguments; every tensor has a contiguous last dimension."""

    scores: torch.Tensor
    keep: int | torch.Tensor | None
    mass: float | None
    forced: torch.Tensor | None
    candidates: torch.Tensor | None
    segment: torch.Tensor | None
    capacity: int


def check_select(
    scores: object,
    *,
    keep: object,
    mass: object,
    forced: object,
    candidates: object,
    segment: object,
    capacity: object,
    score_dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> SelectArgs:
    """The arguments of select, checked and with the default capacity; see ops.select for them."""
    # The checks take as long as a selection among some thousand tokens: helpers are called where they have
    # something to say.
    scores = _checks.tensor(scores, "scores")
    if scores.dtype not in score_dtypes:
        _checks.dtype(scores, "scores", *score_dtypes)
    if scores.dim() != 2:
        _checks.shape(scores, "scores", ("R", "N"))
    rows, tokens = scores.shape
    if rows > _checks.INT32_MAX or tokens > _checks.INT32_MAX:
        raise ValueError(f"scores: has shape {tuple(scores.shape)}, must be below 2**31 in each dimension")

    if forced is not None:
        forced = _mask(forced, "forced", torch.bool, scores)
    if candidates is not None:
        candidates = _mask(candidates, "candidates", torch.bool, scores)
    if segment is not None:
        segment = _mask(segment, "segment", torch.int32, scores)

    if (keep is None) == (mass is None):
        raise ValueError("keep, mass: give exactly one of them")
    budget: int | torch.Tensor | None
    if mass is not None:
        budget = None
        mass = _checks.real(mass, "mass")
        if not 0 < mass <= 1:
            raise ValueError(f"mass: got {mass}, must be in (0, 1]")
        if tokens > MASS_MAX_TOKENS:
            raise ValueError(f"scores: has {tokens} tokens, with mass at most {MASS_MAX_TOKENS}")
    elif type(keep) is int and 0 <= keep <= _checks.INT32_MAX:
        budget = keep
    elif isinstance(keep, torch.Tensor):
        budget = _keep_tensor(keep, scores, segment)
    else:
        budget = _checks.integer(keep, "keep", 0)

    if capacity is not None:
        capacity = _checks.integer(capacity, "capacity", 0)
    elif isinstance(budget, int) and forced is None and segment is None:
        capacity = min(tokens, budget)
    else:
        capacity = tokens
    return SelectArgs(_last_contiguous(scores), budget, mass, forced, candidates, segment, capacity)


def _last_contiguous(value: torch.Tensor) -> torch.Tensor:
    # A column slice of scores is worth a copy of 4 bytes a token.
    return value if value.shape[-1] <= 1 or value.stride(-1) == 1 else value.contiguous()


def _mask(value: object, name: str, dtype: torch.dtype, scores: torch.Tensor) -> torch.Tensor:
    mask = _checks.tensor(value, name)
    _checks.dtype(mask, name, dtype)
    _checks.shape(mask, name, tuple(scores.shape))
    _checks.same_device(mask, name, scores, "scores")
    return _last_contiguous(mask)


def _keep_tensor(keep: torch.Tensor, scores: torch.Tensor, segment: torch.Tensor | None) -> torch.Tensor:
    _checks.dtype(keep, "keep", torch.int32)
    _checks.same_device(keep, "keep", scores, "scores")
    rows = scores.shape[0]
    if keep.dim() == 2:
        if segment is None:
            raise ValueError(f"keep: has shape {tuple(keep.shape)}, (R, G) is for use with segment")
        _checks.shape(keep, "keep", (rows, "G"))
        return _last_contiguous(keep)
    _checks.shape(keep, "keep", (rows,))
    return keep


def check_diverse(
    scores: object,
    features: object,
    *,
    keep: object,
    strength: object,
    forced: object,
    candidates: object,
    segment: object,
    capacity: object,
    score_dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    feature_dtypes: tuple[torch.dtype, ...] = _checks.FLOATING,
) -> tuple[SelectArgs, float]:
    """The arguments of select_diverse: those of select, checked, and strength."""
    if keep is None:
        raise TypeError("keep: got None, must be an int or an int32 tensor")
    args = check_select(
        scores,
        keep=keep,
        mass=None,
        forced=forced,
        candidates=candidates,
        segment=segment,
        capacity=capacity,
        score_dtypes=score_dtypes,
    )
    features = _checks.tensor(features, "features")
    _checks.dtype(features, "features", *feature_dtypes)
    _checks.shape(features, "features", (*args.scores.shape, "Cf"))
    _checks.same_device(features, "features", args.scores, "scores")
    strength = _checks.real(strength, "strength")
    if strength < 0:
        raise ValueError(f"strength: got {strength}, must be >= 0")
    return args, strength
