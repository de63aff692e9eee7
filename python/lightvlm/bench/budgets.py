"""What a benchmark runs: every method at every budget, with the value of its knob that fits.

A budget is what two methods must have alike to be compared: the share of each image's tokens that stays at the end
(--keep), of the decoder's prefill FLOPs (--flops), of the KV cache (--kv), or a number of bits (--bits). Where a
method has a knob of its own, such as ZipVL's tau, that is its budget.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ..catalogue import describe as describe_method
from ..contract.prefill import PrefillPart
from ..contract.sparse import AttentionPart
from ..methods import METHODS, method_names
from ..methods.base import Method
from ..methods.kv_precision import KVPrecision
from ..plan import Plan
from ..runtime import attach
from . import levels
from .equal_flops import solve
from .prompts import Cost, Prompts

ALL = "all"
PRECISION = "precision"
"""What rows of --bits have for a method."""

Family = Literal["prefill", "attention", "cache", "precision"]


@dataclass(frozen=True)
class Setting:
    """A method at one budget.

    budget, target: what was asked for.   knob, value: how the method comes there; None where it cannot.
    plans: one, or one for each seed; none where it cannot.
    cost: what it leaves of the work, where that was worked out beforehand.
    reached: of the budget; the target where that is what the knob says.   problem: why it is not the target.
    """

    method: str
    family: Family
    budget: str
    target: float
    knob: str
    value: float | None
    plans: tuple[Plan, ...] = ()
    cost: Cost | None = None
    reached: float | None = None
    problem: str = ""

    @property
    def key(self) -> tuple[str, str, float]:
        """Method and budget."""
        return self.method, self.budget, self.target


def add_arguments(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    """--method, --keep, --flops, --kv, --level and --option."""
    parser.add_argument(
        "--method",
        choices=[*method_names(), ALL],
        nargs="+",
        default=list(methods),
        help="one or more, or all of them",
    )
    levels.add_arguments(parser)
    parser.add_argument(
        "--flops",
        type=float,
        nargs="+",
        default=[],
        metavar="SHARE",
        help="prefill methods at equal decoder prefill FLOPs: keep is solved for",
    )
    parser.add_argument(
        "--kv",
        type=float,
        nargs="+",
        default=[],
        metavar="SHARE",
        help="cache methods at equal shares of the KV cache: their keep",
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="for every method that has it"
    )


def family(plan: Plan) -> Family:
    """What a plan works on first: image tokens, attention, the cache, or its bits."""
    if isinstance(plan.prefill, PrefillPart):
        return "prefill"
    if isinstance(plan.prefill, AttentionPart):
        return "attention"
    return "cache" if plan.cache is not None else "precision"


def chosen(names: Sequence[str]) -> list[str]:
    """Names of --method, each once; "all" is every registered method."""
    return list(dict.fromkeys(method_names() if ALL in names else names))


def settings(
    args: argparse.Namespace,
    options: dict[str, Any],
    prompts: Prompts,
    *,
    bits: Sequence[int] = (),
    seeds: int = 1,
    keep: Sequence[float] | None = None,
) -> list[Setting]:
    """Every method at its budgets: those of --flops for methods that keep a share of the image tokens and of --kv for
    those that keep one of the cache; --keep, --level, or the method's own levels otherwise.

    Args:
        args: what :func:`add_arguments` added.   options: for every method that has them.   prompts: for --flops.
        bits: of plans that change the cache's precision alone.   seeds: of random dropping.
        keep: levels of methods that keep a share of the image tokens, if nothing is said of them; None: their own.

    Raises:
        ValueError: an option that none of the methods has, or one out of range.
    """
    names = chosen(args.method)
    families = {name: family(METHODS[name].make()) for name in names}
    fitting = _fitting(names, options, bool(bits))
    found: list[Setting] = []
    for name in names:
        method = METHODS[name]
        make = partial(_plans, method, fitting[name], seeds)
        keeps = method.knob == "keep"
        if keeps and families[name] == "prefill" and args.flops:
            make(method.levels[0])  # a wrong option is no share that cannot be reached
            found += [_at_equal_flops(method, make, target, prompts) for target in args.flops]
            if args.keep is None and not any(pair.startswith("keep=") for pair in args.level):
                continue
        budget = "kv" if keeps and families[name] == "cache" else method.knob
        for value in _levels(args, names, method, budget, bits, keep):
            plans = make(value)
            found.append(
                Setting(name, families[name], budget, value, method.knob, value, plans, reached=value)
            )
    for value in bits:
        plan = Plan(precision=KVPrecision(bits=value, **fitting[PRECISION]))
        found.append(Setting(PRECISION, "precision", "bits", value, "bits", value, (plan,), reached=value))
    return found


def accepted(settings: Sequence[Setting], model: Any) -> list[Setting]:
    """The same, but a plan that cannot be attached to the model is listed with the reason instead of being run."""
    return [_accepted(one, model) for one in settings]


def _accepted(one: Setting, model: Any) -> Setting:
    try:
        for plan in one.plans:
            attach(model, plan).detach()
    except ValueError as error:
        return dataclasses.replace(one, plans=(), problem=f"refused: {error}")
    return one


def _levels(
    args: argparse.Namespace,
    names: Sequence[str],
    method: Method,
    budget: str,
    bits: Sequence[int],
    keep: Sequence[float] | None,
) -> list[float]:
    if budget == "kv":
        return list(args.kv) or list(method.levels)
    if method.knob == "bits" and bits:
        return list(bits)
    tried = levels.levels(names, args.keep, args.level, keep)
    return [value for one, value in tried if one.name == method.name]


def _at_equal_flops(method: Method, make: Any, target: float, prompts: Prompts) -> Setting:
    solved = solve(lambda value: make(value)[0], target, prompts)
    return Setting(
        method.name,
        "prefill",
        "flops",
        target,
        method.knob,
        solved.value,
        () if solved.value is None else make(solved.value),
        solved.cost,
        solved.reached,
        solved.problem,
    )


def _plans(method: Method, options: dict[str, Any], seeds: int, value: float) -> tuple[Plan, ...]:
    each: list[dict[str, Any]] = [{}]
    if method.name == "random":
        each = [{"seed": seed} for seed in range(seeds)]
    return tuple(method.make(**{method.knob: value}, **options, **seed) for seed in each)


def _fitting(names: Sequence[str], options: dict[str, Any], bits: bool) -> dict[str, dict[str, Any]]:
    """The options that each method has."""
    known = {name: {option["name"] for option in describe_method(name)["options"]} for name in names}
    if bits:
        known[PRECISION] = {field.name for field in dataclasses.fields(KVPrecision)} - {"bits"}
    # random dropping shares only where and how much with the others
    if "random" in known:
        known["random"] &= {"layers", "fractions"}
    for name in options:
        if not any(name in has for has in known.values()):
            raise ValueError(f"--option {name}: none of {', '.join(sorted(known))} takes it here")
    return {
        name: {option: value for option, value in options.items() if option in has}
        for name, has in known.items()
    }
