"""Where a method works, and how much it keeps there: stages, and the rules that place them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Image tokens are reduced at the input of decoder layer ``layer`` to ``keep`` of their original number."""

    layer: int
    keep: float


def keep_count(tokens: int, keep: float) -> int:
    """Tokens left of an image: max(1, floor(keep * tokens + 1/2))."""
    return max(1, math.floor(keep * tokens + 0.5))


def pyramid_stages(
    layers: int,
    keep: float,
    at: tuple[int, ...] | None,
    fractions: tuple[float, ...] | None,
    default_at: Callable[[int], tuple[int, ...]],
    scored: bool = False,
    first: float = 1.0,
) -> tuple[Stage, ...]:
    """The stages of a pyramid that ends at ``keep``.

    Args:
        layers: depth of the decoder.
        keep: final share of each image's tokens; 1 keeps everything (no stages).
        at: layers before whose input tokens are reduced, ascending; None: ``default_at(layers)``.
        fractions: share kept from each stage on; None: geometric, first * (keep / first) ** (t / T).
        scored: whether the score comes from the layer before a stage, so that there must be one.
        first: share that is left when the pyramid begins.

    Raises:
        ValueError: layers outside the decoder or not ascending, fractions that do not fit or do not end at
            keep.
    """
    if keep >= 1:
        return ()
    at = default_at(layers) if at is None else at
    if not at or list(at) != sorted(set(at)) or at[0] < 0 or at[-1] >= layers:
        raise ValueError(f"layers must be ascending layer numbers within 0..{layers - 1}, got {at}")
    if scored and at[0] == 0:
        raise ValueError("layers must start at 1 or later: the score comes from the layer before")
    if fractions is None:
        fractions = (*tuple(first * (keep / first) ** (t / len(at)) for t in range(1, len(at))), keep)
    if len(fractions) != len(at):
        raise ValueError(f"fractions must have one entry per layer ({len(at)}), got {len(fractions)}")
    if any(not 0 < f <= first for f in fractions) or list(fractions) != sorted(fractions, reverse=True):
        raise ValueError(f"fractions must lie in (0, {first:g}] and not increase, got {fractions}")
    if fractions[-1] != keep:
        raise ValueError(f"the last of fractions must be keep ({keep}), got {fractions[-1]}")
    return tuple(Stage(layer, fraction) for layer, fraction in zip(at, fractions, strict=True))


def scaled_layers(layers: int, published: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers that a paper gives for a decoder of ``depth`` layers, at the same share of ``layers``.

    Each is at least 1, as scores come from the layer before, and above the one before it; those that a shallow decoder
    has no room for are left out.
    """
    return ascending([round(layer * layers / depth) for layer in published], layers)


def ascending(wanted: Sequence[int], layers: int) -> tuple[int, ...]:
    """The layers ``wanted`` in a decoder of ``layers`` layers, each at least 1 and above the one before it; those that
    find no room are left out, but for one."""
    at: list[int] = []
    for layer in wanted:
        at.append(max(layer, at[-1] + 1 if at else 1))
    return tuple(layer for layer in at if layer < layers) or (layers - 1,)


def kept_slots(stages: Sequence[Stage], layers: int) -> float:
    """Share of an image's places (tokens times layers) that is left in a decoder: LightKV's eq. 9."""
    borders = [*(stage.layer for stage in stages), layers]
    shares = (stage.keep * (end - stage.layer) for stage, end in zip(stages, borders[1:], strict=True))
    return (borders[0] + sum(shares)) / layers


def check_keep(keep: float) -> None:
    """Raise unless keep is a number in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"keep must be a number in (0, 1], got {keep!r}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
