"""``lightvlm bench fidelity``: accuracy of the reference VLM under a method, over the FLOPs that are left.

Every method answers the same questions, one of each kind about every scene. Intervals are 95 % bootstraps
over scenes; where a method is compared with random dropping at the same counts, both answers to a question
are resampled together (paired). Whole curves are printed, not single points.
"""

from __future__ import annotations

import argparse
import ast
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ..methods import method, method_names
from ..plan import Plan
from ..runtime import attach
from .common import describe

KEEPS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.06, 0.03)
_RESAMPLES = 5000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument(
        "--questions", type=int, default=2000, help="a multiple of 4: one of each kind a scene"
    )
    parser.add_argument(
        "--split", choices=["test", "val"], default="test", help="val is for choosing, test for reporting"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=method_names(), nargs="+", default=["lightvlm", "random"])
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="for every method that has it"
    )
    parser.add_argument(
        "--random-seeds", type=int, default=3, help="random dropping is the mean over this many seeds"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)


@dataclass
class Result:
    """Scores (scenes, kinds) of one method at one keep, and what it cost."""

    scores: NDArray[np.float64]
    seconds: float
    report: Any = None


class Questions:
    """The questions of a benchmark: one of each kind about every scene, each scene about another digit."""

    def __init__(self, split: str, count: int, seed: int) -> None:
        from ..reference_vlm.questions import KINDS, questions
        from ..reference_vlm.scenes import make_scenes

        if count < len(KINDS) or count % len(KINDS):
            raise ValueError(f"--questions must be a positive multiple of {len(KINDS)}, got {count}")
        self.kinds = KINDS
        self.scenes, self.questions = [], []
        wanted = count // len(KINDS)
        candidates = make_scenes(split, wanted + wanted // 4 + 8, seed)
        for number, scene in enumerate(candidates):
            asked = {q.kind: q for q in questions(scene, np.random.default_rng([seed, number]))}
            if len(asked) == len(
                KINDS
            ):  # in a few scenes no digit occurs once, so none can be asked for its colour
                self.scenes += [scene] * len(KINDS)
                self.questions += [asked[kind] for kind in KINDS]
            if len(self.questions) == count:
                return
        raise ValueError(f"only {len(self.questions)} questions could be made, {count} wanted")

    def ask(self, model: Any, processor: Any, plan: Plan | None, batch: int) -> Result:
        """Answers of the model, with a plan attached or as it is."""
        from ..reference_vlm.evaluate import answer_batch

        start = time.perf_counter()
        report = None
        if plan is None:
            _, scores = answer_batch(model, processor, self.scenes, self.questions, batch)
        else:
            with attach(model, plan) as run:
                _, scores = answer_batch(model, processor, self.scenes, self.questions, batch)
            report = run.report()
        seconds = time.perf_counter() - start
        return Result(np.array(scores).reshape(-1, len(self.kinds)), seconds, report)


def bootstrap(scores: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over scenes (first axis) of ``scores``, by resampling scenes."""
    per_scene = scores.reshape(len(scores), -1).mean(axis=1)
    rng = np.random.default_rng(seed)
    means = per_scene[rng.integers(0, len(per_scene), (_RESAMPLES, len(per_scene)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are Python literals, or else strings."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"--option must be NAME=VALUE, got {pair!r}")
        try:
            options[name.replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name.replace("-", "_")] = value
    return options


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object of ``lightvlm bench fidelity``."""
    from ..reference_vlm import load

    options = parse_options(args.option)
    if args.random_seeds < 1:
        raise ValueError(f"--random-seeds must be at least 1, got {args.random_seeds}")
    plans = {
        (name, keep): [
            _plan(name, keep, options, seed) for seed in range(args.random_seeds if name == "random" else 1)
        ]
        for name in args.method
        for keep in args.keep
    }
    asked = Questions(args.split, args.questions, args.seed)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    model, processor = load(dtype=getattr(torch, args.dtype))
    model.to(args.device)
    full = asked.ask(model, processor, None, args.batch)
    results: dict[tuple[str, float], Result] = {}
    for key, seeds in tqdm(plans.items(), desc="fidelity", file=sys.stderr):
        runs = [asked.ask(model, processor, plan, args.batch) for plan in seeds]
        mean = np.mean([one.scores for one in runs], axis=0)
        results[key] = Result(mean, sum(one.seconds for one in runs) / len(runs), runs[-1].report)
    case = f"reference VLM, {args.questions} {args.split} questions, {args.dtype}"
    rows = [_row(case, "full", 1.0, full, full, asked)]
    for (name, keep), result in results.items():
        row = _row(case, name, keep, result, full, asked)
        random = results.get(("random", keep))
        if name != "random" and random is not None:
            low, high = bootstrap(result.scores - random.scores)
            row["over_random"] = {
                "mean": float((result.scores - random.scores).mean()),
                "low": low,
                "high": high,
            }
        rows.append(row)
    return {"kind": "fidelity", **describe(args.device), "options": options, "seed": args.seed, "rows": rows}


def _plan(name: str, keep: float, options: dict[str, Any], seed: int) -> Plan:
    if name == "random":  # it shares only where and how much with the others
        options = {key: value for key, value in options.items() if key in ("layers", "fractions")} | {
            "seed": seed
        }
    return method(name, keep=keep, **options)


def _row(case: str, name: str, keep: float, result: Result, full: Result, asked: Questions) -> dict[str, Any]:
    low, high = bootstrap(result.scores)
    drop = result.scores - full.scores
    row = {
        "case": case,
        "method": name,
        "baseline": "full",
        "keep": keep,
        "accuracy": float(result.scores.mean()),
        "low": low,
        "high": high,
        "retained": float(result.scores.mean() / full.scores.mean()),
        "minus_full": {
            "mean": float(drop.mean()),
            **dict(zip(("low", "high"), bootstrap(drop), strict=True)),
        },
        "by_kind": dict(zip(asked.kinds, result.scores.mean(axis=0).tolist(), strict=True)),
        "wall_seconds": result.seconds,
    }
    if result.report is not None:
        row["flops_share"] = result.report.flops_share
        row["image_keep_share"] = result.report.image_keep_share
        row["image_tokens_kept"] = result.report.image_tokens_kept
        row["op_calls"] = result.report.op_calls
        row["stepped_aside"] = result.report.stepped_aside
    else:
        row["flops_share"] = row["image_keep_share"] = 1.0
    return row
