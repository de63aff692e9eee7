"""``lightvlm bench compare``: what counts as slower, and what it makes of rows that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightvlm import cli
from lightvlm.bench import compare

STEADY = (0.99, 1.0, 1.0, 1.01)
SHAKY = (0.5, 0.9, 1.1, 2.0)


def row(
    case: str = "c", seconds: float = 1.0, spread: tuple[float, ...] = STEADY, **more: Any
) -> dict[str, Any]:
    runs = {"op": [seconds * share for share in spread], "other": [1.0] * len(spread)}
    return {"case": case, "method": "op", "baseline": "other", "seconds": seconds, "runs": runs, **more}


def result(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": "ops", "device": "d", "torch": "t", "commit": "abc", "rows": list(rows), **more}


def verdict(old: dict[str, Any], new: dict[str, Any], tolerance: float = 0.05) -> str:
    (found,) = compare.compare([old], [new], tolerance)
    return found["verdict"]


@pytest.mark.parametrize(
    ("seconds", "wanted"), [(1.0, "same"), (1.04, "same"), (1.06, "slower"), (0.96, "same"), (0.9, "faster")]
)
def test_within_and_beyond_the_tolerance(seconds: float, wanted: str) -> None:
    assert verdict(row(), row(seconds=seconds)) == wanted


def test_noise_is_no_regression() -> None:
    assert verdict(row(spread=SHAKY), row(seconds=1.2, spread=SHAKY)) == "same"
    assert verdict(row(spread=SHAKY), row(seconds=0.8, spread=SHAKY)) == "same"
    assert verdict(row(spread=SHAKY), row(seconds=4.0, spread=SHAKY)) == "slower"


def test_tolerance_is_a_limit_of_its_own() -> None:
    assert verdict(row(), row(seconds=1.2), tolerance=0.3) == "same"
    assert verdict(row(), row(seconds=1.01, spread=(1.0, 1.0)), tolerance=0.0) == "slower"


def test_runs_may_be_a_list_or_missing() -> None:
    """Those of ``bench decoder`` are a list; one run has no spread."""
    plain = {"case": "c", "method": "op", "seconds": 1.0}
    assert (
        verdict({**plain, "runs": [1.0, 1.0, 1.0]}, {**plain, "seconds": 1.1, "runs": [1.1] * 3}) == "slower"
    )
    assert verdict(plain, {**plain, "seconds": 1.1}) == "slower"


def test_figures_of_a_row() -> None:
    (found,) = compare.compare([row()], [row(seconds=2.0)], 0.05)
    assert found["ratio"] == 2.0
    assert (found["old_seconds"], found["new_seconds"]) == (1.0, 2.0)
    assert found["noise"] == pytest.approx(0.01)  # middle halves from 0.9975 to 1.0025 of each


def test_rows_are_found_by_op_case_cache_and_keep() -> None:
    old = [row("a", cache="cold"), row("a", 2.0, cache="warm"), row("b", 3.0, keep=0.5), row("b", 4.0)]
    found = {
        (one["case"], one.get("cache"), one.get("keep")): one for one in compare.compare(old, old[::-1], 0.05)
    }
    assert len(found) == 4
    assert {one["verdict"] for one in found.values()} == {"same"}
    assert found["a", "warm", None]["new_seconds"] == 2.0


@pytest.mark.parametrize(
    ("old", "new", "wanted", "reason"),
    [
        (row(), None, "missing", "not in the new result"),
        (None, row(), "new", "not timed in the old result"),
        (row(), {"case": "c", "method": "op", "skipped": "no time"}, "missing", "no time"),
        ({"case": "c", "method": "op", "skipped": "no time"}, row(), "new", "not timed"),
        (row(), {"case": "c", "method": "op", "error": "it disagrees"}, "failed", "it disagrees"),
        (
            {"case": "c", "method": "op", "skipped": "x"},
            {"case": "c", "method": "op", "skipped": "x"},
            "skipped",
            "n",
        ),
    ],
)
def test_rows_without_times(
    old: dict[str, Any] | None, new: dict[str, Any] | None, wanted: str, reason: str
) -> None:
    (found,) = compare.compare([old] if old else [], [new] if new else [], 0.05)
    assert found["verdict"] == wanted
    assert reason in found["reason"]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def one(name: str, content: Any) -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return one


def call(*words: str) -> int:
    return cli.main(["bench", "compare", *words])


def test_exit_status_and_json(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    old = write("old.json", result(row("a"), row("b"), row("c"), row("d")))
    new = write("new.json", result(row("a", 0.5), row("b", 2.0), row("c"), device="e"))
    assert call(old, new, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["bench"]) == ("compare", "ops")
    assert [one["case"] for one in found["rows"]] == ["b", "d", "a", "c"]  # the worst first
    assert found["counts"]["slower"] == found["counts"]["faster"] == found["counts"]["missing"] == 1
    assert found["notes"] == ["device differs: d and e"]
    assert found["old"]["commit"] == "abc"
    assert call(old, new, "--json", "--tolerance", "1.5") == 0
    assert call(old, old) == 0


def test_a_failed_row_is_bad_news_and_a_missing_one_is_not(write: Any) -> None:
    old = write("old.json", result(row("a"), row("b")))
    assert call(old, write("less.json", result(row("a")))) == 0
    failed = {"case": "b", "method": "op", "error": "it disagrees"}
    assert call(old, write("bad.json", result(row("a"), failed))) == 1


def test_table_shows_what_changed(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    old = write("old.json", result(row("first"), row("second"), row("third")))
    assert call(old, write("new.json", result(row("first", 2.0), row("second")))) == 1
    out = capsys.readouterr().out
    assert all(word in out for word in ("slower", "first", "2.000", "missing", "third", "1 same"))
    assert "second" not in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([], "needs kind and rows"),
        (result({"case": "c"}), "without case or method"),
        (result({"case": "c", "method": "m", "accuracy": 1.0}), "takes no times"),
        (result(row(), kind="decoder"), "must be 'ops' as old"),
    ],
)
def test_bad_files(write: Any, capsys: pytest.CaptureFixture[str], content: Any, message: str) -> None:
    good = write("good.json", result(row()))
    assert call(good, write("bad.json", content)) == 1
    assert message in capsys.readouterr().err
    assert call(good, good, "--tolerance", "-1") == 1
    assert call(good, "no/such/file.json") == 1
