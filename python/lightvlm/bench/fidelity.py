"""``lightvlm bench fidelity``: accuracy of the reference VLM under a method, over the FLOPs that are left.

Every method answers the same questions, one of each kind about every scene. Intervals are 95 % bootstraps
over scenes; where a method is compared with random dropping at the same counts, both answers to a question
are resampled together (paired). Whole curves are printed, not single points.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ..catalogue import parse_options
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
    """The questions of a benchmark: one of each kind about every scene, in batches of one kind.

    Prompts are processed, and pictures encoded, once for all methods; answers of one kind are about equally long, so no
    row of a batch waits for another.
    """

    def __init__(self, split: str, count: int, seed: int) -> None:
        from ..reference_vlm.measure import one_of_each_kind
        from ..reference_vlm.questions import KINDS
        from ..reference_vlm.scenes import make_scenes

        if count < len(KINDS) or count % len(KINDS):
            raise ValueError(f"--questions must be a positive multiple of {len(KINDS)}, got {count}")
        self.kinds = KINDS
        wanted = count // len(KINDS)
        # in a few scenes no digit occurs once, so none can be asked for its colour: draw some more
        scenes = make_scenes(split, wanted + wanted // 4 + 8, seed)
        where, asked = one_of_each_kind(scenes, seed)
        complete = [index for index in range(len(scenes)) if where.count(index) == len(KINDS)][:wanted]
        by_scene = {
            index: {q.kind: q for at, q in zip(where, asked, strict=True) if at == index}
            for index in complete
        }
        if len(complete) < wanted:
            raise ValueError(f"only {len(complete) * len(KINDS)} questions could be made, {count} wanted")
        self.scenes = [scenes[index] for index in complete]
        self.questions = {kind: [by_scene[index][kind] for index in complete] for kind in KINDS}
        self._batches: list[tuple[str, slice, dict[str, Any]]] = []

    @torch.no_grad()
    def prepare(self, model: Any, processor: Any, batch: int) -> None:
        """Make the inputs of every batch; pictures are encoded here where generate() takes encoded ones."""
        from ..reference_vlm.evaluate import messages

        encode = getattr(model, "_supports_mm_encoder_outputs", lambda: False)()
        for kind in self.kinds:
            for start in range(0, len(self.scenes), batch):
                part = slice(start, start + batch)
                texts = [
                    processor.apply_chat_template(messages([question]), add_generation_prompt=True)
                    for question in self.questions[kind][part]
                ]
                images = [scene.image for scene in self.scenes[part]]
                inputs = dict(
                    processor(text=texts, images=images, padding=True, return_tensors="pt").to(model.device)
                )
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
                if encode:
                    encoded = model.get_image_features(
                        pixel_values=inputs.pop("pixel_values"), return_dict=True
                    )
                    inputs["mm_encoder_outputs"] = {"image": encoded}
                self._batches.append((kind, part, inputs))

    @torch.no_grad()
    def ask(self, model: Any, processor: Any, plan: Plan | None) -> Result:
        """Answers of the model, with a plan attached or as it is, after :meth:`prepare`."""
        from ..reference_vlm.questions import score

        scores = np.zeros((len(self.scenes), len(self.kinds)))
        start = time.perf_counter()
        with contextlib.nullcontext() if plan is None else attach(model, plan) as run:
            for kind, part, inputs in self._batches:
                call = {
                    name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()
                }
                output = model.generate(**call, do_sample=False, max_new_tokens=12)
                texts = processor.batch_decode(
                    output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )
                right = [score(q, text) for q, text in zip(self.questions[kind][part], texts, strict=True)]
                scores[part, self.kinds.index(kind)] = right
        return Result(scores, time.perf_counter() - start, None if run is None else run.report())


def bootstrap(scores: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over scenes (first axis) of ``scores``, by resampling scenes."""
    per_scene = scores.reshape(len(scores), -1).mean(axis=1)
    rng = np.random.default_rng(seed)
    means = per_scene[rng.integers(0, len(per_scene), (_RESAMPLES, len(per_scene)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the JSON object of ``lightvlm bench fidelity``."""
    from ..reference_vlm import load

    about = describe(args.device)  # of the code that runs, whatever happens to the tree meanwhile
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
    model, processor = load(dtype=getattr(torch, args.dtype))
    model.to(args.device)
    asked.prepare(model, processor, args.batch)
    full = asked.ask(model, processor, None)
    results: dict[tuple[str, float], Result] = {}
    for key, seeds in tqdm(plans.items(), desc="fidelity", file=sys.stderr):
        runs = [asked.ask(model, processor, plan) for plan in seeds]
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
    return {"kind": "fidelity", **about, "options": options, "seed": args.seed, "rows": rows}


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
