"""Rows of ``lightvlm bench fidelity``: what one plan did, and how it compares with others at the same budget."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import answers
from .budgets import Setting
from .fidelity_questions import Questions, Result

Row = dict[str, Any]
REFERENCES = ("random", "lightvlm", "lightkv")
"""Methods that others are compared with at the same budget."""
OVERHEAD_LISTED = 0.03
"""Share of the full model's prefill from which a method's own work is pointed out."""
_RESAMPLES = 5000


def bootstrap(scores: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over scenes (first axis) of ``scores``, by resampling scenes."""
    per_scene = scores.reshape(len(scores), -1).mean(axis=1)
    rng = np.random.default_rng(seed)
    means = per_scene[rng.integers(0, len(per_scene), (_RESAMPLES, len(per_scene)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def difference(scores: NDArray[np.float64], others: NDArray[np.float64]) -> dict[str, float]:
    """Mean and 95 % interval of a difference; both answers to a question are resampled together."""
    drop = scores - others
    low, high = bootstrap(drop)
    return {"mean": float(drop.mean()), "low": low, "high": high}


def overhead_of(own: Sequence[float], baseline: Sequence[float]) -> Row:
    """A method's own work over the full model's prefill, and whether that is to be pointed out.

    own, baseline: seconds of each batch, or round. The median of their ratios: what else the machine does at times
    is no work of the method's.
    """
    share = median_ratio(own, baseline)
    return {"overhead": share, "overhead_listed": share > OVERHEAD_LISTED}


def median_ratio(some: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of pairs."""
    return statistics.median(one / other for one, other in zip(some, others, strict=True))


def prefill_times(prefill: Sequence[float], baseline: Sequence[float]) -> Row:
    """Seconds of all prompts, with a plan and without, and the median ratio of the batches."""
    return {
        "prefill_seconds": sum(prefill),
        "baseline_prefill_seconds": sum(baseline),
        "prefill_share": median_ratio(prefill, baseline),
    }


def measured(
    case: str, setting: Setting, result: Result, full: Result, asked: Questions, baseline: Sequence[float]
) -> Row:
    """The row of a setting that was run.   baseline: seconds of the full model's prefill, batch by batch."""
    row: Row = {**about(case, setting), **_scored(result.scores, full.scores, asked.kinds)}
    row["wall_seconds"] = result.seconds
    row |= prefill_times(result.prefill, baseline)
    report = result.report
    assert report is not None
    row["flops_share"] = report.flops_share
    row["image_keep_share"] = report.image_keep_share
    row["image_tokens_kept"] = report.image_tokens_kept
    row["final_image_tokens"] = report.image_tokens_kept[-1]
    row["image_tokens"] = statistics.mean(report.image_tokens_kept)
    row["kv_bytes_used"], row["kv_bytes_full"] = report.kv_bytes_used, report.kv_bytes_full
    row["kv_share"] = report.kv_bytes_used / report.kv_bytes_full
    if report.attending_share:
        row["attending_share"] = statistics.mean(report.attending_share)
        row["attention_flops_share"] = report.attention_flops_share
    row["own_seconds"] = report.own_seconds
    row |= overhead_of(result.own, baseline)
    row["op_calls"] = report.op_calls
    row["stepped_aside"] = report.stepped_aside
    return row


def without_plan(
    case: str,
    method: str,
    result: Result,
    full: Result,
    asked: Questions,
    image_tokens: float,
    baseline: Sequence[float],
) -> Row:
    """The row of the model with nothing attached, which computes so many image tokens in all layers."""
    return {
        "case": case,
        "method": method,
        "family": method,
        "baseline": "full",
        "keep": 1.0,
        **_scored(result.scores, full.scores, asked.kinds),
        "wall_seconds": result.seconds,
        **prefill_times(result.prefill, baseline),
        "flops_share": 1.0,
        "image_keep_share": 1.0,
        "kv_share": 1.0,
        "image_tokens": image_tokens,
        "final_image_tokens": image_tokens,
    }


def about(case: str, setting: Setting) -> Row:
    """What a row says of its setting, whether it was run or not."""
    row: Row = {
        "case": case,
        "method": setting.method,
        "family": setting.family,
        "baseline": "full",
        "budget": setting.budget,
        "target": setting.target,
    }
    if setting.value is not None:
        row[setting.knob] = setting.value
    if setting.reached is not None:
        row["reached"] = setting.reached
    if setting.cost is not None:
        row["final_keep"], row["mean_keep"] = setting.cost.final_keep, setting.cost.mean_keep
    if setting.problem:
        row["off_target" if setting.plans else "skipped"] = setting.problem
    return row


def _scored(scores: NDArray[np.float64], full: NDArray[np.float64], kinds: Sequence[str]) -> Row:
    low, high = bootstrap(scores)
    return {
        "accuracy": float(scores.mean()),
        "low": low,
        "high": high,
        "retained": float(scores.mean() / full.mean()),
        "minus_full": difference(scores, full),
        "by_kind": dict(zip(kinds, scores.mean(axis=0).tolist(), strict=True)),
        "answers": {kind: answers.pack(scores[:, at]) for at, kind in enumerate(kinds)},
    }


def key_of(row: Row) -> tuple[Any, ...]:
    """By what a row is found again: method and budget."""
    return row["method"], row.get("budget"), row.get("target")


def compare(rows: Sequence[Row]) -> None:
    """Add to every row its difference from each of :data:`REFERENCES` at the same budget: over_random and so on."""
    scores = {key_of(row): _scores(row) for row in rows if "answers" in row}
    for row in rows:
        for name in REFERENCES:
            reference = scores.get((name, row.get("budget"), row.get("target")))
            if "answers" in row and row["method"] != name and reference is not None:
                row[f"over_{name}"] = difference(scores[key_of(row)], reference)


def _scores(row: Row) -> NDArray[np.float64]:
    return np.stack([answers.unpack(text) for text in row["answers"].values()], axis=1)


def join(paths: Sequence[Path]) -> dict[str, Any]:
    """One result of several about the same questions; differences are taken anew, across files.

    Raises:
        ValueError: a file that is no result of this benchmark, other questions or numbers, or a row that two files
            have with different answers.
    """
    results = [_load(path) for path in paths]
    first = results[0]
    rows: dict[tuple[Any, ...], Row] = {}
    notes = []
    for path, result in zip(paths, results, strict=True):
        for name in ("split", "seed", "count", "digest"):
            if result["questions"][name] != first["questions"][name]:
                raise ValueError(
                    f"--join {path}: {name} of the questions is {result['questions'][name]!r}, "
                    f"{paths[0]} has {first['questions'][name]!r}"
                )
        for name in ("device", "torch", "transformers", "commit"):
            if result[name] != first[name]:
                notes.append(f"{name} differs: {paths[0]} has {first[name]}, {path} has {result[name]}")
        for row in result["rows"]:
            if row["case"] != first["rows"][0]["case"]:
                raise ValueError(
                    f"--join {path}: case is {row['case']!r}, must be {first['rows'][0]['case']!r}"
                )
            known = rows.setdefault(key_of(row), row)
            if known.get("answers") != row.get("answers"):
                method, budget, target = key_of(row)
                raise ValueError(
                    f"--join {path}: another file has {method} at {budget} {target} with other answers"
                )
    joined = list(rows.values())
    compare(joined)
    files = [str(path) for path in paths]
    return {**first, "rows": joined, "joined": files, "notes": notes}


def _load(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--join {path}: is not JSON: {error}") from None
    whole = isinstance(result, dict) and result.get("kind") == "fidelity"
    if not whole or not result.get("rows") or "questions" not in result:
        raise ValueError(f"--join {path}: is not a result of lightvlm bench fidelity")
    return result
