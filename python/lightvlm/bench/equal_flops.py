"""Which value of a method's knob leaves a given share of the decoder's prefill FLOPs.

Methods differ in where they reduce, so equal final counts are unequal work: one that keeps 35 % from layer 2 on and one
that does so from layer 6 on are no comparison. Counts are integers, so the share is a staircase in the knob; it is
bisected for the step at the target, and the nearer side is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..methods.base import PrefillPart
from ..plan import Plan
from .prompts import Cost, Prompts

_HALVINGS = 24
"""Finer than one token of an image of sixteen million."""


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
    """Bisect the knob, whose share must not fall as it rises, within (0, 1].

    Args:
        make: the plan of a value; ValueError where the method does not take it, which is read as too low.
        target: share of the FLOPs, in (0, 1].
        prompts: over which the share is taken.

    Raises:
        ValueError: a target out of range; whatever ``make(1.0)`` raises; a plan without a prefill method.
    """
    if not 0 < target <= 1:
        raise ValueError(f"--flops must be in (0, 1], got {target}")

    def cost(value: float) -> Cost:
        part = make(value).prefill
        if not isinstance(part, PrefillPart):
            raise TypeError("the plan reduces no image tokens")
        return prompts.cost(part)

    above_value, above = 1.0, cost(1.0)
    below_value, below = 0.0, None
    refused = ""
    if above.flops_share <= target:
        below_value, below = above_value, above
    else:
        for _ in range(_HALVINGS):
            middle = (below_value + above_value) / 2
            try:
                found = cost(middle)
            except ValueError as error:
                below_value, below, refused = middle, None, f" (below: {error})"
                continue
            if found.flops_share > target:
                above_value, above = middle, found
            else:
                below_value, below = middle, found
    if below is None:
        return Solved(None, None, above.flops_share, f"leaves {above.flops_share:.3f} at least{refused}")
    nearer_below = target - below.flops_share <= above.flops_share - target
    value, chosen = (below_value, below) if nearer_below else (above_value, above)
    off = abs(chosen.flops_share - target)
    problem = "" if off <= prompts.one_token else f"comes no nearer than {chosen.flops_share:.3f}"
    return Solved(value, chosen, chosen.flops_share, problem)
