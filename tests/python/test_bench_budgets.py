"""Budgets of ``lightvlm bench fidelity``: equal FLOPs by bisection, equal caches, and who is tried at what."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import lightvlm
import pytest
from lightvlm.bench import budgets
from lightvlm.bench.equal_flops import solve
from lightvlm.bench.prompts import Prompts
from lightvlm.layout import Run
from lightvlm.methods import METHODS
from lightvlm.methods.base import Method, PrefillPart, Stage
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.models import find_adapter
from lightvlm.plan import Plan, option
from python.test_prefill import ROWS
from python.tiny import LLAVA, generate

MODEL = LLAVA.build()
PROMPTS = Prompts(find_adapter(MODEL), [(Run(None, 2), Run(0, 200), Run(None, n)) for n in (6, 7, 7, 9)])


@dataclass(frozen=True)
class Late(PrefillPart):
    """Reduces at one layer, to ``keep``."""

    layer: int = option(3, "where")
    keep: float = option(0.5, "how far")
    lowest: float = option(0.0, "below which it refuses")
    coarse: float = option(0.0, "of which keep is made a multiple")
    min_image_tokens: int = 0

    def __post_init__(self) -> None:
        if self.keep < self.lowest:
            raise ValueError(f"keep must be at least {self.lowest}")

    def stages(self, layers: int) -> tuple[Stage, ...]:
        steps = max(1, round(self.keep / self.coarse)) if self.coarse else 0
        return (Stage(self.layer, min(1.0, steps * self.coarse) if self.coarse else self.keep),)


def late(keep: float = 0.5, **options: Any) -> Plan:
    return Plan(prefill=Late(keep=keep, **options))


def cache(keep: float = 0.35) -> Plan:
    return Plan(cache=DecodeCompaction(keep=keep))


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    budgets.add_arguments(parser, ["lightvlm", "random"])
    return parser.parse_args(words)


@pytest.mark.parametrize("target", [0.9, 0.7, 0.55])
def test_keep_is_solved_for_the_target(target: float) -> None:
    """Neither neighbour in whole tokens is nearer; and the target is met within one token of a prompt."""
    found = solve(lambda keep: late(keep, layer=1), target, PROMPTS)
    assert found.problem == ""
    assert found.value is not None
    assert found.cost is not None
    off = abs(found.reached - target)
    assert off <= PROMPTS.one_token
    kept = round(found.cost.final_keep * 200)
    for neighbour in (kept - 1, kept + 1):
        share = PROMPTS.cost(Late(layer=1, keep=neighbour / 200)).flops_share
        assert off <= abs(share - target)
    assert found.cost.mean_keep == pytest.approx((1 + 4 * found.cost.final_keep) / 5)


@pytest.mark.parametrize(("target", "low", "high"), [(0.85, 0.7, 1.0), (0.7, 0.0, 0.7)])
def test_a_method_may_change_its_layers_with_the_knob(target: float, low: float, high: float) -> None:
    """The share falls to 0.76, jumps up to 0.88 where the stage moves to a later layer, and falls again: of the two
    values that leave 0.85 the higher one is taken, and 0.7 is found behind the jump."""

    def make(keep: float) -> Plan:
        return late(keep, layer=1 if keep > 0.7 else 3)

    found = solve(make, target, PROMPTS)
    assert found.problem == ""
    assert found.value is not None
    assert low < found.value < high


def test_a_share_of_one_keeps_everything() -> None:
    found = solve(late, 1.0, PROMPTS)
    assert (found.value, found.reached, found.problem) == (1.0, 1.0, "")


def test_a_late_first_stage_says_what_it_leaves() -> None:
    found = solve(late, 0.5, PROMPTS)  # of five layers, three are full
    least = PROMPTS.cost(Late(keep=1e-9)).flops_share
    assert (found.value, found.cost) == (None, None)
    assert found.reached == least > 0.6
    assert found.problem == f"leaves {least:.3f} at least"


def test_a_method_that_takes_no_less_says_why() -> None:
    found = solve(lambda keep: late(keep, layer=1, lowest=0.5), 0.5, PROMPTS)
    assert found.value is None
    assert found.reached == pytest.approx(
        PROMPTS.cost(Late(layer=1, keep=0.5)).flops_share, abs=PROMPTS.one_token
    )
    assert found.problem.endswith("at least (below: keep must be at least 0.5)")


def test_rounding_that_misses_the_target_is_said() -> None:
    found = solve(lambda keep: late(keep, layer=1, coarse=0.25), 0.7, PROMPTS)
    nearest = min(
        (PROMPTS.cost(Late(layer=1, keep=step / 4)).flops_share for step in (1, 2, 3, 4)),
        key=lambda share: abs(share - 0.7),
    )
    assert found.reached == nearest
    assert found.problem == f"comes no nearer than {nearest:.3f}"


@pytest.mark.parametrize("target", [0.0, -1.0, 1.5])
def test_bad_shares(target: float) -> None:
    with pytest.raises(ValueError, match=r"--flops must be in \(0, 1\]"):
        solve(late, target, PROMPTS)


def test_cost_is_what_a_run_reports() -> None:
    """Planned on the host without a model, and counted while one ran: padding, rows without images and several."""
    batch = LLAVA.batch([row for row in ROWS if any(not isinstance(item, int) for item in row)])
    plan = lightvlm.LightVLM(keep=0.2, layers=(1, 3), min_image_tokens=0, decode_keep=None)
    with lightvlm.attach(MODEL, plan) as run:
        generate(MODEL, batch, 2)
    report = run.report()
    # one after the other, as LLaVA's images of 16 tokens; two in a row stand apart by a token of text
    prompts = Prompts.of_batches(find_adapter(MODEL), [batch])
    assert isinstance(plan.prefill, PrefillPart)
    cost = prompts.cost(plan.prefill)
    assert cost.flops_share == pytest.approx(report.flops_share, rel=1e-12)
    assert cost.mean_keep == pytest.approx(report.image_keep_share, rel=1e-12)
    assert cost.final_keep == pytest.approx(report.image_tokens_kept[-1] / report.image_tokens, rel=1e-12)


def test_a_smaller_image_is_fewer_tokens_in_all_layers() -> None:
    assert PROMPTS.share_of(200) == 1.0
    assert PROMPTS.tokens_share_of(50) == pytest.approx((4 * 52 + 29) / (4 * 202 + 29))
    assert PROMPTS.tokens_share_of(50) > PROMPTS.share_of(50)  # attention is quadratic


def test_every_method_has_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "late", Method("late", late, "a test"))
    monkeypatch.setitem(METHODS, "evict", Method("evict", cache, "a test"))
    args = arguments("--method", "all", "--flops", "0.9", "0.5", "--kv", "0.4", "0.2")
    found = budgets.settings(args, {}, PROMPTS, bits=[4], seeds=2)
    by_method: dict[str, list[tuple[str, float]]] = {}
    for one in found:
        by_method.setdefault(one.method, []).append((one.budget, one.target))
    assert set(by_method) == {*METHODS, "precision"}
    for name, method in METHODS.items():
        if budgets.family(method.make()) == "prefill" and method.knob == "keep":
            assert by_method[name] == [("flops", 0.9), ("flops", 0.5)], name
    assert by_method["evict"] == [("kv", 0.4), ("kv", 0.2)]
    assert by_method["zipvl"] == [("tau", value) for value in METHODS["zipvl"].levels]
    assert by_method["precision"] == [("bits", 4)]
    impossible = next(one for one in found if one.key == ("late", "flops", 0.5))
    assert impossible.plans == ()
    assert impossible.problem
    assert impossible.value is None
    evict = next(one for one in found if one.method == "evict")
    assert evict.plans == (cache(0.4),)
    assert evict.family == "cache"
    assert [len(one.plans) for one in found if one.method == "random"] == [2, 2]


def test_flops_and_keep_together(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments("--method", "random", "--flops", "0.8", "--keep", "0.5")
    found = budgets.settings(args, {}, PROMPTS)
    assert [(one.budget, one.target) for one in found] == [("flops", 0.8), ("keep", 0.5)]


def test_a_wrong_option_is_an_error_and_no_target_out_of_reach() -> None:
    args = arguments("--method", "lightvlm", "--flops", "0.8")
    with pytest.raises(ValueError, match="strength must be at most"):
        budgets.settings(args, {"strength": 7.0}, PROMPTS)


def test_a_plan_that_the_model_refuses_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 8 channels cannot be packed."""
    found = budgets.settings(arguments("--method", "random", "--keep", "0.5"), {}, PROMPTS, bits=[4])
    random, packed = budgets.accepted(found, MODEL)
    assert random == found[0]
    assert packed.plans == ()
    assert packed.problem.startswith("refused: model has heads of 8 channels")


def test_names() -> None:
    assert budgets.chosen(["random", "random"]) == ["random"]
    assert budgets.chosen(["random", "all"]) == sorted(METHODS)
