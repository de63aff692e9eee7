"""How hard each method works: the values of its knob, ``keep`` for most, at which a benchmark tries it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..methods import METHODS
from ..methods.base import Method


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--keep and --level."""
    parser.add_argument(
        "--keep", type=float, nargs="+", help="for methods that keep a share (default: their own)"
    )
    parser.add_argument(
        "--level",
        action="append",
        default=[],
        metavar="NAME=VALUE[,VALUE...]",
        help="values of another knob, for the methods that have it, such as tau=0.975,0.96",
    )


def levels(
    names: Sequence[str],
    keep: Sequence[float] | None,
    pairs: Sequence[str],
    default: Sequence[float] | None = None,
) -> list[tuple[Method, float]]:
    """Every method with each of its values.

    Args:
        names: of the methods.   keep, pairs: what --keep and --level said.
        default: of ``keep`` where neither names it; None: the method's own.

    Raises:
        ValueError: a pair that is none, or for a knob that no method here has.
    """
    given: dict[str, Sequence[float]] = {"keep": default} if default is not None else {}
    if keep is not None:
        given["keep"] = keep
    methods = [METHODS[name] for name in names]
    for pair in pairs:
        knob, values = _parse(pair)
        if knob not in {method.knob for method in methods}:
            raise ValueError(f"--level {pair}: no method here has the knob {knob!r}")
        given[knob] = values
    return [(method, value) for method in methods for value in given.get(method.knob, method.levels)]


def _parse(pair: str) -> tuple[str, list[float]]:
    name, sign, text = pair.partition("=")
    try:
        values = [_number(value) for value in text.split(",")]
    except ValueError:
        values = []
    if not sign or not name.strip() or not values:
        raise ValueError(f"--level must be NAME=VALUE[,VALUE...] with numbers, got {pair!r}")
    return name.strip().replace("-", "_"), values


def _number(text: str) -> float:
    """A whole number stays one: some knobs, such as bits, take no other."""
    return int(text) if text.strip().isdecimal() else float(text)
