"""Results of ``lightvlm bench fidelity``: flags, answers as text, joined files, the table and the picture."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import lightvlm
import numpy as np
import pytest
from lightvlm import bench, cli
from lightvlm.bench import answers, fidelity, fidelity_plot, fidelity_rows, fidelity_table
from lightvlm.bench.fidelity_questions import needs_pixels
from lightvlm.methods import METHODS
from lightvlm.methods.base import Method, TowerProbe
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.random import RandomPrefill
from lightvlm.plan import Plan
from PIL import Image

FEW = ("--questions", "8", "--batch", "2", "--random-seeds", "2", "--threads", "1", "--kl-questions", "2")


class TowerReader(RandomPrefill):
    """Random dropping that wants the vision tower to run with it."""

    @property
    def tower(self) -> TowerProbe:
        return TowerProbe()


def tower(keep: float = 0.5) -> Plan:
    return Plan(prefill=TowerReader(keep=keep))


def evict(keep: float = 0.5, interval: int = 1) -> Plan:
    """What the shortest answers leave time for: compaction at every token."""
    return Plan(cache=DecodeCompaction(keep=keep, interval=interval, recent=8))


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    fidelity.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Methods of every family, one that cannot reach a budget and one that steps aside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "tower", Method("tower", tower, "a test"))
        patch.setitem(METHODS, "evict", Method("evict", evict, "a test"))
        words = ["--method", "lightvlm", "random", "zipvl", "tower", "evict", "--level", "tau=0.9"]
        words += ["--flops", "0.5", "0.1", "--kv", "0.5", "--bits", "4", "--smaller-image"]
        return fidelity.run(arguments(*FEW, *words))


def row(result: dict[str, Any], method: str, **wanted: Any) -> dict[str, Any]:
    found = [
        one
        for one in result["rows"]
        if one["method"] == method and all(one.get(name) == value for name, value in wanted.items())
    ]
    assert len(found) == 1
    return found[0]


def test_equal_flops(result: dict[str, Any]) -> None:
    ours, random = (row(result, name, budget="flops", target=0.5) for name in ("lightvlm", "random"))
    for one in (ours, random):
        assert one["reached"] == pytest.approx(one["flops_share"], rel=1e-12)
        assert one["flops_share"] == pytest.approx(0.5, abs=0.005)
        assert one["final_keep"] == pytest.approx(one["final_image_tokens"] / 256)
        assert one["mean_keep"] == pytest.approx(one["image_tokens"] / 256)
    assert "over_random" in ours
    assert "over_random" not in random
    assert random["over_lightvlm"]["mean"] == pytest.approx(-ours["over_random"]["mean"])
    for name in ("lightvlm", "random"):
        missed = row(result, name, target=0.1)
        assert "at least" in missed["skipped"]
        assert missed["reached"] > 0.1
        assert "accuracy" not in missed


def test_costs_of_a_row(result: dict[str, Any]) -> None:
    ours = row(result, "lightvlm", target=0.5)
    assert 0 < ours["overhead"] < ours["prefill_share"]
    assert ours["overhead_listed"] is (ours["overhead"] > 0.03)
    assert 0 < ours["own_seconds"] < ours["prefill_seconds"]
    assert ours["kv_share"] == ours["kv_bytes_used"] / ours["kv_bytes_full"] < 1
    cached = row(result, "evict")
    assert (cached["budget"], cached["target"], cached["keep"]) == ("kv", 0.5, 0.5)
    assert cached["flops_share"] == 1.0
    assert cached["kv_share"] < 0.6


@pytest.mark.parametrize(("own", "listed"), [(0.02, False), (0.03, False), (0.031, True)])
def test_overhead_above_three_percent_is_listed(own: float, listed: bool) -> None:
    """Of the middle one of the batches, which are not alike in size."""
    found = fidelity_rows.overhead_of([0.0, own, 9.0], [1.0, 1.0, 2.0])
    assert found == {"overhead": own, "overhead_listed": listed}


def test_the_tower_runs_where_a_method_reads_it(result: dict[str, Any]) -> None:
    """Pixels instead of encoded pictures are the same answers."""
    assert needs_pixels(tower())
    assert not needs_pixels(lightvlm.LightVLM())
    assert not needs_pixels(None)
    one = row(result, "tower", target=0.5)
    assert one["stepped_aside"] == {}
    seed_0 = fidelity.run(arguments(*FEW[:4], "--random-seeds", "1", "--kl-questions", "2", "--threads", "1",
                                    "--method", "random", "--flops", "0.5"))  # fmt: skip
    assert one["answers"] == row(seed_0, "random")["answers"]
    assert one["kl"] == pytest.approx(row(seed_0, "random")["kl"], rel=1e-3)


def test_a_smaller_image(result: dict[str, Any]) -> None:
    ours = row(result, "smaller image", target=0.5)
    assert (ours["side"], ours["final_image_tokens"]) == (12, 144)
    assert ours["budget"] == "flops"
    assert ours["off_target"] == "comes no nearer than 0.541"
    assert "over_random" in ours
    with pytest.raises(ValueError, match="--smaller-image needs SIDE, or --flops"):
        fidelity.run(arguments(*FEW, "--smaller-image"))
    with pytest.raises(ValueError, match="--smaller-image must be from 1 to 16 patches a side, got 17"):
        fidelity.run(arguments(*FEW, "--method", "random", "--keep", "0.5", "--smaller-image", "17"))


def test_a_full_size_smaller_image_is_the_full_model() -> None:
    words = ["--method", "random", "--keep", "1", "--smaller-image", "16", "--questions", "40"]
    found = fidelity.run(arguments(*FEW, *words))
    assert row(found, "smaller image")["answers"] == row(found, "full")["answers"]
    assert row(found, "smaller image")["flops_share"] == row(found, "smaller image")["kv_share"] == 1.0


def test_what_stepped_aside_is_marked_and_not_drawn(result: dict[str, Any]) -> None:
    aside = row(result, "zipvl")  # the prompts are shorter than its default asks for
    assert aside["stepped_aside"]
    assert "zipvl" not in [line.name for line in fidelity_plot.lines(result["rows"], "flops_share")]
    assert "-" in fidelity_table._line(aside, [], True)[-1]


def test_answers_as_text() -> None:
    for scores in ([0.0, 1.0, 1.0], [1 / 3, 0.5, 1.0], [np.mean([0, 1, 1 / 7]), 0.0], []):
        np.testing.assert_allclose(answers.unpack(answers.pack(np.array(scores))), scores, rtol=1e-15)
    assert answers.pack(np.array([0.0, 1.0, 1.0])) == "1:011"
    assert answers.pack(np.array([0.5, 1 / 3, 1.0])) == "6:3 2 6"
    for text in ("011", "0:1", "x:1", "2:1 b"):
        with pytest.raises(ValueError, match="answers must be DENOMINATOR:NUMERATORS"):
            answers.unpack(text)


def test_rows_say_what_the_bootstrap_says(result: dict[str, Any]) -> None:
    """Answers in the rows are the scores behind accuracy and by_kind."""
    for one in result["rows"]:
        if "answers" in one:
            by_kind = {kind: answers.unpack(text).mean() for kind, text in one["answers"].items()}
            assert by_kind == pytest.approx(one["by_kind"])
            assert one["accuracy"] == pytest.approx(np.mean(list(by_kind.values())))
            assert one["low"] <= one["accuracy"] <= one["high"]


def split(result: dict[str, Any], folder: Path, *methods: str) -> Path:
    """A file with the full model's row and those of some methods, as a process of its own writes it."""
    part = copy.deepcopy(result)
    part["rows"] = [one for one in part["rows"] if one["method"] in ("full", *methods)]
    for one in part["rows"]:
        for name in fidelity_rows.REFERENCES:
            one.pop(f"over_{name}", None)
    path = folder / f"{'-'.join(methods)}.json"
    path.write_text(json.dumps(part))
    return path


def test_joined_parts_are_the_whole(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = split(result, tmp_path, "lightvlm", "zipvl", "tower")
    second = split(result, tmp_path, "random", "evict", "precision", "smaller image")
    out, plot = tmp_path / "all.json", tmp_path / "all.png"
    words = ["--join", str(first), str(second), "--out", str(out), "--plot", str(plot), "--json"]
    assert cli.main(["bench", "fidelity", *words]) == 0
    joined = json.loads(capsys.readouterr().out)
    assert joined == json.loads(out.read_text())
    order = fidelity_rows.key_of
    assert {order(one): one for one in joined["rows"]} == {order(one): one for one in result["rows"]}
    assert joined["joined"] == [str(first), str(second)]
    assert joined["notes"] == []
    assert Image.open(plot).size[0] > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": {"split": "val"}}, "split of the questions is 'val'"),
        ({"questions": {"seed": 1}}, "seed of the questions is 1"),
        ({"questions": {"count": 12}}, "count of the questions is 12"),
        ({"questions": {"digest": "x"}}, "digest of the questions is 'x'"),
        ({"kind": "ops"}, "is not a result of lightvlm bench fidelity"),
    ],
)
def test_other_questions_do_not_join(
    result: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    first, second = split(result, tmp_path, "lightvlm"), split(result, tmp_path, "random")
    other = json.loads(second.read_text())
    for name, value in change.items():
        other[name] = {**other[name], **value} if isinstance(value, dict) else value
    second.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=message):
        fidelity.run(arguments("--join", str(first), str(second)))


def test_join_wants_one_answer_and_says_what_differs(result: dict[str, Any], tmp_path: Path) -> None:
    first, second = split(result, tmp_path, "lightvlm"), split(result, tmp_path, "random")
    other = json.loads(second.read_text())
    other["device"] = "another"
    second.write_text(json.dumps(other))
    assert "device differs" in fidelity.run(arguments("--join", str(first), str(second)))["notes"][0]
    other["rows"][0]["answers"]["count"] = "1:00"
    second.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="another file has full at None None with other answers"):
        fidelity.run(arguments("--join", str(first), str(second)))
    other["rows"][0]["case"] = "bfloat16"
    second.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="case is 'bfloat16', must be 'reference VLM"):
        fidelity.run(arguments("--join", str(first), str(second)))
    second.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        fidelity.run(arguments("--join", str(first), str(second)))


def test_the_table(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """By budget, then accuracy; at most 120 columns, so that a pipe cuts nothing off."""
    ordered = fidelity_table.ordered(result["rows"])
    assert ordered[0]["method"] == "full"
    budgets = [(one.get("budget"), one.get("target")) for one in ordered]
    assert len(list(dict.fromkeys(budgets))) == sum(
        at == 0 or budgets[at - 1] != budget for at, budget in enumerate(budgets)
    )
    at_half = [one["accuracy"] for one in ordered if one.get("target") == 0.5 and one["budget"] == "flops"]
    assert at_half == sorted(at_half, reverse=True)
    bench.show(result)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    for word in ("-random", "-lightvlm", "flops 0.5", "kv 0.5", "bits 4", "smaller image", "at least"):
        assert word in text
    assert "- the plan, or a part of it, stepped aside" in text
    assert "…" not in text


def test_the_picture(result: dict[str, Any], tmp_path: Path) -> None:
    """One panel of FLOPs; a second one where a method works on the cache."""
    work, cache = (fidelity_plot.lines(result["rows"], share) for share in ("flops_share", "kv_share"))
    assert [line.name for line in work] == ["lightvlm", "random", "tower", "smaller image"]
    assert [line.name for line in cache] == ["evict", "precision"]
    assert all(line.shares == sorted(line.shares, reverse=True) for line in work)
    assert all(
        below >= 0 and above >= 0
        for line in work
        for below, above in zip(line.below, line.above, strict=True)
    )
    both, one = tmp_path / "both.png", tmp_path / "one.png"
    fidelity_plot.draw(result["rows"], both)
    fidelity_plot.draw([r for r in result["rows"] if r["method"] in ("full", "lightvlm")], one)
    assert Image.open(both).size[0] == 2 * Image.open(one).size[0]
    with pytest.raises(ValueError, match="there is no method to show"):
        fidelity_plot.draw(result["rows"][:1], one)


def test_labels_stand_apart() -> None:
    spots = fidelity_plot._apart([0.5, 0.5, 0.99, 1.0, 0.5])
    ordered = sorted(spots)
    gaps = np.diff(ordered)
    assert min(gaps) >= fidelity_plot._LABEL_HEIGHT - 1e-12
    assert ordered[-1] <= 1.0
    assert fidelity_plot._apart([0.1, 0.9]) == [0.1, 0.9]


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--plot must end in \.png"):
        fidelity.run(arguments("--plot", str(tmp_path / "a.pdf")))
    with pytest.raises(ValueError, match="is no folder"):
        fidelity.run(arguments("--plot", str(tmp_path / "no" / "a.png")))
    with pytest.raises(ValueError, match=r"--out: .* is no folder"):
        fidelity.run(arguments("--out", str(tmp_path / "no" / "a.json")))
