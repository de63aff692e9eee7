"""``lightvlm bench fidelity``: methods with knobs of their own, caches of few bits, and KL beside accuracy."""

from __future__ import annotations

import argparse
import json
from typing import Any

import lightvlm
import pytest
from lightvlm import bench, cli
from lightvlm.bench import budgets, decoder, fidelity, fidelity_questions, levels
from lightvlm.bench.prompts import Prompts
from lightvlm.kl import Divergence
from lightvlm.layout import Run
from lightvlm.methods import METHODS
from lightvlm.methods.base import KEEPS, Method
from lightvlm.methods.kv_precision import KVPrecision
from lightvlm.methods.zipvl import ZipVLPrefill
from lightvlm.models import find_adapter
from python.test_fidelity_results import tower
from python.tiny import LLAVA

PROMPTS = Prompts(find_adapter(LLAVA.build()), [(Run(None, 2), Run(0, 200), Run(None, 7))])
FEW = ("--questions", "8", "--batch", "2", "--random-seeds", "1", "--threads", "1")


def zipvl(tau: float = 0.975, **options: Any) -> lightvlm.Plan:
    """A method whose knob is not keep."""
    return lightvlm.Plan(prefill=ZipVLPrefill(tau=tau, **options))


@pytest.fixture(autouse=True)
def _with_zipvl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "zipvl", Method("zipvl", zipvl, "a test", "tau", (0.975, 0.96)))


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    fidelity.add_arguments(parser)
    return parser.parse_args(options)


def plans_of(args: argparse.Namespace, options: dict[str, Any], **more: Any) -> dict[Any, Any]:
    return {one.key: one.plans for one in budgets.settings(args, options, PROMPTS, **more)}


def test_rows_of_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--method",
        "lightvlm",
        "zipvl",
        "random",
        "--keep",
        "0.35",
        "--level",
        "tau=0.9,0.5",
        "--bits",
        "8",
        "2",
    ]
    options = ["--option", "min_tokens=1", "--option", "recent=8", "--kl-questions", "8"]
    assert cli.main(["bench", "fidelity", *FEW, *words, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = [(row["method"], row.get("keep"), row.get("tau"), row.get("bits")) for row in result["rows"]]
    assert found == [
        ("full", 1.0, None, None),
        ("lightvlm", 0.35, None, None),
        ("zipvl", None, 0.9, None),
        ("zipvl", None, 0.5, None),
        ("random", 0.35, None, None),
        ("precision", None, None, 8),
        ("precision", None, None, 2),
    ]
    _, ours, much, little, random, eight, two = result["rows"]
    assert "over_random" in ours
    assert "over_random" not in much
    assert 0 < little["attending_share"] < much["attending_share"] < 1
    assert little["attention_flops_share"] < much["attention_flops_share"] < 1
    assert "attending_share" not in ours
    assert two["kv_share"] < eight["kv_share"] < 1.0
    assert ours["kv_share"] < random["kv_share"]  # whose tokens go later
    assert 0 < eight["kl"]["mean"] < two["kl"]["mean"]
    assert eight["kl"]["tokens"] == two["kl"]["tokens"] == ours["kl"]["tokens"]
    assert all(row["stepped_aside"] == {} for row in result["rows"][1:])
    assert cli.bench.show(result) is None


def test_kl_can_be_left_out() -> None:
    words = ["--method", "lightvlm", "--keep", "0.5", "--kl-questions", "0"]
    rows = fidelity.run(arguments(*FEW, *words))["rows"]
    assert ["kl" in row for row in rows] == [False, False]


def test_kl_is_over_all_kinds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of the kinds one after the other, until there are enough questions."""
    asked = fidelity_questions.Questions("test", 16, 0)
    asked.batches = [
        (kind, slice(0, 2), {"input_ids": [number] * 2, "kind": kind})
        for kind in asked.kinds
        for number in range(2)
    ]
    seen = []

    def measured(model: Any, inputs: Any, plans: Any, *, new_tokens: int) -> dict[str, Divergence]:
        seen.append((inputs["kind"], inputs["input_ids"][0]))
        return {name: Divergence(float(name), 1.0, 1.0, 3) for name in plans}

    monkeypatch.setattr(fidelity_questions, "divergence", measured)
    plans = {("a", "keep", 0.5): lightvlm.Plan(), ("b", "tau", 0.9): lightvlm.Plan()}
    found = asked.divergences(None, plans, 9)
    assert seen == [*((kind, 0) for kind in asked.kinds), (asked.kinds[0], 1)]
    assert [found[key].mean for key in plans] == [0.0, 1.0]
    assert found[next(iter(plans))].tokens == 15


def test_parts_count_by_their_tokens() -> None:
    first = Divergence(1.0, 2.0, 0.5, 10, [1.0], {"why": 1})
    second = Divergence(4.0, 5.0, 1.0, 30, [4.0, 4.0], {"why": 2})
    assert Divergence.together([first, second]) == Divergence(
        3.25, 5.0, 0.875, 40, [1.0, 4.0, 4.0], {"why": 3}
    )


def test_options_go_to_whoever_has_them() -> None:
    words = ["--method", "lightvlm", "zipvl", "random", "--keep", "0.5", "--bits", "4", "--random-seeds", "2"]
    given = {"layers": (1, 2), "min_tokens": 3, "recent": 9, "seed": 7}
    plans = plans_of(arguments(*words), given, bits=[4], seeds=2)
    assert plans["lightvlm", "keep", 0.5] == (lightvlm.LightVLM(keep=0.5, layers=(1, 2)),)
    assert plans["zipvl", "tau", 0.96] == (zipvl(0.96, min_tokens=3, seed=7),)
    assert plans["random", "keep", 0.5] == tuple(
        lightvlm.Random(keep=0.5, layers=(1, 2), seed=seed) for seed in (0, 1)
    )
    assert plans["precision", "bits", 4] == (lightvlm.Plan(precision=KVPrecision(bits=4, recent=9)),)
    with pytest.raises(ValueError, match="--option frobnicate: none of lightvlm takes it here"):
        plans_of(arguments("--method", "lightvlm"), {"frobnicate": 1})


def test_levels() -> None:
    def found(*arguments: Any, **options: Any) -> list[tuple[str, float]]:
        return [(one.name, value) for one, value in levels.levels(*arguments, **options)]

    assert found(["zipvl"], None, []) == [("zipvl", 0.975), ("zipvl", 0.96)]
    assert found(["lightvlm"], None, []) == [("lightvlm", keep) for keep in KEEPS]
    assert found(["lightvlm"], None, [], default=(0.2,)) == [("lightvlm", 0.2)]
    assert found(["lightvlm", "zipvl"], [0.5], ["tau=0.9"]) == [("lightvlm", 0.5), ("zipvl", 0.9)]
    assert [type(value) for _, value in found(["zipvl"], None, ["tau=1,0.5"])] == [int, float]
    assert found(["lightvlm"], [0.5], ["keep=0.1,0.2"]) == [("lightvlm", 0.1), ("lightvlm", 0.2)]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("tau", "--level must be NAME=VALUE"),
        ("=3", "--level must be NAME=VALUE"),
        ("tau=a,b", "--level must be NAME=VALUE"),
        ("window=3", "no method here has the knob 'window'"),
    ],
)
def test_bad_levels(pair: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        levels.levels(["zipvl"], None, [pair])


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="--kl-questions must be at least 0, got -1"):
        fidelity.run(arguments("--kl-questions", "-1"))
    with pytest.raises(ValueError, match="--random-seeds must be at least 1, got 0"):
        fidelity.run(arguments("--random-seeds", "0"))


def test_the_decoder_takes_other_knobs_too() -> None:
    parser = argparse.ArgumentParser()
    decoder.add_arguments(parser)
    words = [
        "--geometry",
        "tiny",
        "--layers",
        "2",
        "--image-tokens",
        "600",
        "--rounds",
        "1",
        "--dtype",
        "float32",
    ]
    rows = decoder.run(parser.parse_args([*words, "--method", "lightvlm", "zipvl", "--level", "tau=0.5"]))[
        "rows"
    ]
    found = [(row["method"], row.get("keep"), row.get("tau")) for row in rows if "flop_ceiling" in row]
    assert found == [*(("lightvlm", keep, None) for keep in (0.35, 0.15, 0.03)), ("zipvl", None, 0.5)]
    assert rows[-1]["case"] == rows[0]["case"] + ", tau 0.5"


def test_the_decoder_takes_every_budget_and_says_what_methods_cost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    decoder.add_arguments(parser)
    words = ["--geometry", "tiny", "--image-tokens", "600", "--rounds", "2", "--dtype", "float32"]
    words += ["--method", "lightvlm", "random", "--flops", "0.6", "0.1", "--option", "merge=drop"]
    result = decoder.run(parser.parse_args(words))
    rows = result["rows"]
    found = [(row["method"], row["target"], "skipped" in row) for row in rows if "budget" in row]
    assert found == [
        (name, target, target == 0.1) for name in ("lightvlm", "random") for target in (0.6, 0.1)
    ]
    for row in rows:
        if "overhead" in row:
            assert row["flops_share"] == pytest.approx(row["reached"]) == pytest.approx(0.6, abs=0.002)
            assert 0 < row["own_seconds"] < row["seconds"]
            assert row["overhead"] > 0
            assert row["overhead_listed"] is (row["overhead"] > 0.03)
            assert sum(row["op_seconds"].values()) < row["seconds"]
    result["kind"] = "decoder"
    bench.show(result)
    text = capsys.readouterr().out
    assert "flops 0.6" in text
    assert "at least" in text


def test_a_method_that_reads_the_tower_has_pixels_and_a_baseline_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METHODS, "tower", Method("tower", tower, "a test"))
    parser = argparse.ArgumentParser()
    decoder.add_arguments(parser)
    words = ["--geometry", "tiny", "--image-tokens", "100", "--rounds", "1", "--dtype", "float32"]
    rows = decoder.run(parser.parse_args([*words, "--method", "tower", "random", "--keep", "0.5"]))["rows"]
    by_name = {row["method"]: row for row in rows}
    assert len(rows) == 6
    assert by_name["tower"]["baseline"].endswith(", with the tower")
    assert not by_name["random"]["baseline"].endswith(", with the tower")
    assert by_name["tower"]["flops_share"] == by_name["random"]["flops_share"] < 1
