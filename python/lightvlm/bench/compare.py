"""``lightvlm bench compare OLD NEW``: what got slower and what got faster between two results of ``lightvlm bench``.

A row is found again by op (or method), case, state of the cache and keep ratio. It is slower, or faster, where its time
differs by more than the tolerance and by more than noise: the middle halves of the two rows' runs must not overlap.
Exit status 1 where a row is slower, or failed in the new result; one that is missing is listed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
_KEY = ("method", "case", "cache", "keep")
VERDICTS = ("slower", "failed", "missing", "faster", "same", "new", "skipped")
BAD = ("slower", "failed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the comparison."""
    parser.add_argument("old", type=Path, help="result of lightvlm bench --json")
    parser.add_argument("new", type=Path, help="another, of the same kind")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="share of the time that does not count (default: 0.05)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare; returns the JSON object: {"kind", "bench", "old", "new", "tolerance", "notes", "counts", "rows"}.

    Raises:
        ValueError: a file is no result of a benchmark that takes times, or the two are of different kinds.
    """
    if not args.tolerance >= 0:
        raise ValueError(f"--tolerance must be at least 0, got {args.tolerance}")
    old, new = load(args.old), load(args.new)
    if old["kind"] != new["kind"]:
        raise ValueError(f"new: is of kind {new['kind']!r}, must be {old['kind']!r} as old")
    rows = sorted(compare(old["rows"], new["rows"], args.tolerance), key=_order)
    return {
        "kind": "compare",
        "bench": old["kind"],
        "old": _about(args.old, old),
        "new": _about(args.new, new),
        "tolerance": args.tolerance,
        "notes": list(_notes(old, new)),
        "counts": {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS},
        "rows": rows,
    }


def exit_status(result: dict[str, Any]) -> int:
    """1 where a row is slower, or failed."""
    return int(any(result["counts"][verdict] for verdict in BAD))


def load(path: Path) -> dict[str, Any]:
    """A result of ``lightvlm bench``."""
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list) or "kind" not in result:
        raise ValueError(f"{path}: is not a result of lightvlm bench: it needs kind and rows")
    for row in result["rows"]:
        if not isinstance(row, dict) or "case" not in row or "method" not in row:
            raise ValueError(f"{path}: has a row without case or method")
        if not {"seconds", "skipped", "error"} & row.keys():
            raise ValueError(f"{path}: kind {result['kind']!r} takes no times to compare")
    return result


def compare(old: Sequence[Row], new: Sequence[Row], tolerance: float) -> Iterator[Row]:
    """One row for each of either result, with its verdict.

    ratio: new seconds over old, below 1 is faster.   noise: by how much its runs make it uncertain, likewise.
    """
    before, after = _by_key(old), _by_key(new)
    for key in before | after:
        made = {name: value for name, value in zip(_KEY, key, strict=True) if value is not None}
        yield {**made, **_judge(before.get(key), after.get(key), tolerance)}


def _judge(old: Row | None, new: Row | None, tolerance: float) -> Row:
    if new is not None and "error" in new:
        return {"verdict": "failed", "reason": new["error"]}
    timed_before, timed_now = old is not None and "seconds" in old, new is not None and "seconds" in new
    if old is not None and new is not None and timed_before and timed_now:
        return _judge_times(old, new, tolerance)
    if timed_before:
        return {"verdict": "missing", "reason": new["skipped"] if new else "not in the new result"}
    if timed_now:
        return {"verdict": "new", "reason": "not timed in the old result"}
    return {"verdict": "skipped", "reason": "timed in neither"}


def _judge_times(old: Row, new: Row, tolerance: float) -> Row:
    (old_low, old_high), (new_low, new_high) = _middle(old), _middle(new)
    ratio = new["seconds"] / old["seconds"]
    verdict = "same"
    if ratio > 1 + tolerance and new_low > old_high:
        verdict = "slower"
    elif ratio < 1 / (1 + tolerance) and new_high < old_low:
        verdict = "faster"
    return {
        "verdict": verdict,
        "old_seconds": old["seconds"],
        "new_seconds": new["seconds"],
        "ratio": ratio,
        "noise": (old_high - old_low) / old["seconds"] + (new_high - new_low) / new["seconds"],
    }


def _middle(row: Row) -> tuple[float, float]:
    """Between which two times the middle half of a row's runs lies."""
    runs = row.get("runs", [])
    if isinstance(runs, Mapping):
        runs = runs.get(row["method"], [])
    if len(runs) < 2:
        return row["seconds"], row["seconds"]
    low, _, high = statistics.quantiles(runs, n=4, method="inclusive")
    return low, high


def _by_key(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    return {tuple(row.get(name) for name in _KEY): row for row in rows}


def _about(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    return {"file": str(path), **{name: result.get(name) for name in ("device", "torch", "commit")}}


def _notes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """What makes the two hard to compare."""
    for name in ("device", "torch"):
        if old.get(name) != new.get(name):
            yield f"{name} differs: {old.get(name)} and {new.get(name)}"


def _order(row: Row) -> tuple[int, float]:
    """The worst first."""
    return VERDICTS.index(row["verdict"]), -row.get("ratio", 0.0)


def table(result: dict[str, Any]) -> Table:
    """What is not the same, and how many rows are."""
    from rich.table import Table

    counts = ", ".join(f"{count} {verdict}" for verdict, count in result["counts"].items() if count)
    said = "\n".join([f"{result['bench']}: {counts or 'no rows'}", *result["notes"]])
    made = Table(title=said)
    for name in ("verdict", "op", "case"):
        made.add_column(name, overflow="fold")
    for name in ("old us", "new us", "new / old", "noise"):
        made.add_column(name, justify="right")
    for row in result["rows"]:
        if row["verdict"] == "same":
            continue
        case = " | ".join(str(row[name]) for name in _KEY[1:] if name in row)
        if "ratio" in row:
            figures = [f"{row['old_seconds'] * 1e6:.4g}", f"{row['new_seconds'] * 1e6:.4g}"]
            figures += [f"{row['ratio']:.3f}", f"{row['noise']:.1%}"]
        else:
            figures, case = [""] * 4, f"{case}: {row['reason']}"
        made.add_row(row["verdict"], row["method"], case, *figures)
    return made
