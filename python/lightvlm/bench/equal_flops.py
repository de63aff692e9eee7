"""Which value of a method's knob leaves a given share of the decoder's prefill FLOPs.

Methods differ in where they reduce, so equal final counts are unequal work: one that keeps 35 % from layer 2 on and one
that does so from layer 6 on are no comparison. Counts are integers, so the share is a staircase in the knob; it is
bisected for the step at the target, and the nearer side is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from ..contract.prefill import PrefillPart
from ..plan import Plan
from .prompts import Cost, Prompts

_STEPS = 64
"""Values that are tried first: a method may change its layers with the knob, so that the share does not rise evenly."""
_HALVINGS = 18
"""Of a step; together finer than one token of an image of sixteen million."""


@dataclass(frozen=True)
class Solved:
    """The knob's value nearest to a target.

    value, cost: None where not even the hardest setting comes down to the target.
    reached: share of the FLOPs there, or the least that the method comes down to.
    problem: "" where the target is met within one token of a prompt.
    """

    value: float | None
    cost: Cost | None
    reached: float
    problem: str


def solve(make: Callable[[float], Plan], target: float, prompts: Prompts) -> Solved:
    """Look for the knob's value in (0, 1] whose share is nearest to the target; the higher one of two.

    Args:
        make: the plan of a value; ValueError where the method does not take it.
        target: share of the FLOPs, in (0, 1].
        prompts: over which the share is taken.

    Raises:
        ValueError: a target out of range, or a method that takes no value at all, with its reason.
        TypeError: a plan without a prefill method that reduces tokens.
    """
    if not 0 < target <= 1:
        raise ValueError(f"--flops must be in (0, 1], got {target}")
    found: dict[float, Cost] = {}
    refused: ValueError | None = None

    def comes_down(value: float) -> bool:
        """Whether the value leaves no more than the target; what is refused is read as too low to be had."""
        nonlocal refused
        try:
            part = make(value).prefill
            if not isinstance(part, PrefillPart):
                raise TypeError("the plan reduces no image tokens")
            found[value] = prompts.cost(part)
        except ValueError as error:
            refused = error
            return True
        return found[value].flops_share <= target

    values = [step / _STEPS for step in range(_STEPS + 1)]
    down = [True, *(comes_down(value) for value in values[1:])]
    for (low, low_down), (high, high_down) in itertools.pairwise(zip(values, down, strict=True)):
        if low_down != high_down:
            _bisect(comes_down, low, high, low_down)
    if not found:
        assert refused is not None
        raise refused
    value = min(found, key=lambda value: (abs(found[value].flops_share - target), -value))
    cost = found[value]
    least = min(cost.flops_share for cost in found.values())
    if abs(cost.flops_share - target) <= prompts.one_token:
        return Solved(value, cost, cost.flops_share, "")
    if least > target:
        reason = f" (below: {refused})" if refused is not None else ""
        return Solved(None, None, least, f"leaves {least:.3f} at least{reason}")
    return Solved(value, cost, cost.flops_share, f"comes no nearer than {cost.flops_share:.3f}")


def _bisect(comes_down: Callable[[float], bool], low: float, high: float, low_down: bool) -> None:
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if comes_down(middle) == low_down:
            low = middle
        else:
            high = middle
