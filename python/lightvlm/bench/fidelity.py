"""``lightvlm bench fidelity``: accuracy of the reference VLM under a method, over the work that is left.

Every method answers the same questions, one of each kind about every scene, at several values of its knob: ``keep`` for
most, ``tau`` for ZipVL. ``--bits`` adds plans that change the cache's precision alone. Intervals are 95 % bootstraps
over scenes; where a method is compared with random dropping at the same counts, both answers to a question are
resampled together (paired). Whole curves are printed, not single points.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ..catalogue import describe as describe_method
from ..catalogue import parse_options
from ..kl import Divergence, divergence
from ..methods import method_names
from ..methods.kv_precision import KVPrecision
from ..plan import Plan
from ..runtime import attach
from . import levels
from .common import describe

PRECISION = "precision"
"""What rows of --bits have for a method."""
_RESAMPLES = 5000
_LONGEST = 12  # tokens of an answer


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
    levels.add_arguments(parser)
    parser.add_argument(
        "--bits",
        type=int,
        choices=[16, 8, 4, 2],
        nargs="+",
        default=[],
        help="caches of so many bits, and no method",
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="for every method that has it"
    )
    parser.add_argument(
        "--kl-questions",
        type=int,
        default=100,
        help="KL is measured over so many, and the rest of their batches",
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

    def divergences(self, model: Any, plans: Mapping[Any, Plan], count: int) -> dict[Any, Divergence]:
        """KL of each plan from the full model, over at least ``count`` questions of all kinds; 0: none."""
        if count == 0:
            return {}
        by_kind = [[inputs for of, _, inputs in self._batches if of == kind] for kind in self.kinds]
        batches = [one for turn in itertools.zip_longest(*by_kind) for one in turn if one is not None]
        named = {str(number): plan for number, plan in enumerate(plans.values())}
        parts: dict[str, list[Divergence]] = {name: [] for name in named}
        while batches and count > 0:
            inputs = batches.pop(0)
            count -= len(inputs["input_ids"])
            for name, found in divergence(model, inputs, named, new_tokens=_LONGEST).items():
                parts[name].append(found)
        return {key: Divergence.together(parts[str(at)]) for at, key in enumerate(plans)}

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
                output = model.generate(**call, do_sample=False, max_new_tokens=_LONGEST)
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
    for name, least in (("random_seeds", 1), ("kl_questions", 0)):
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}"
            )
    plans = make_plans(args, options)
    asked = Questions(args.split, args.questions, args.seed)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, processor = load(dtype=getattr(torch, args.dtype))
    model.to(args.device)
    asked.prepare(model, processor, args.batch)
    full = asked.ask(model, processor, None)
    results: dict[Key, Result] = {}
    for key, seeds in tqdm(plans.items(), desc="fidelity", file=sys.stderr):
        runs = [asked.ask(model, processor, plan) for plan in seeds]
        mean = np.mean([one.scores for one in runs], axis=0)
        results[key] = Result(mean, sum(one.seconds for one in runs) / len(runs), runs[-1].report)
    case = f"reference VLM, {args.questions} {args.split} questions, {args.dtype}"
    kl = asked.divergences(model, {key: plan[0] for key, plan in plans.items()}, args.kl_questions)
    rows = [_row(case, ("full", "keep", 1.0), full, full, asked)]
    for key, result in results.items():
        row = _row(case, key, result, full, asked)
        if key in kl:
            row["kl"] = kl[key].summary()
        random = results.get(("random", *key[1:]))
        if key[0] != "random" and random is not None:
            low, high = bootstrap(result.scores - random.scores)
            row["over_random"] = {
                "mean": float((result.scores - random.scores).mean()),
                "low": low,
                "high": high,
            }
        rows.append(row)
    return {"kind": "fidelity", **about, "options": options, "seed": args.seed, "rows": rows}


Key = tuple[str, str, float]
"""Method, its knob, and the knob's value."""


def make_plans(args: argparse.Namespace, options: dict[str, Any]) -> dict[Key, list[Plan]]:
    """The plans of every row: one, or one a seed.

    Raises:
        ValueError: an option that none of the methods has, or one out of range.
    """
    tried = levels.levels(args.method, args.keep, args.level)
    known = {
        one.name: {option["name"] for option in describe_method(one.name)["options"]} for one, _ in tried
    }
    if args.bits:
        known[PRECISION] = {field.name for field in dataclasses.fields(KVPrecision)} - {"bits"}
    # random dropping shares only where and how much with the others
    if "random" in known:
        known["random"] &= {"layers", "fractions"}
    for name in options:
        if not any(name in names for names in known.values()):
            raise ValueError(f"--option {name}: none of {', '.join(sorted(known))} takes it here")

    def fitting(name: str) -> dict[str, Any]:
        return {option: value for option, value in options.items() if option in known[name]}

    plans: dict[Key, list[Plan]] = {}
    for one, value in tried:
        seeds: list[dict[str, Any]] = [{}]
        if one.name == "random":
            seeds = [{"seed": seed} for seed in range(args.random_seeds)]
        plans[one.name, one.knob, value] = [
            one.make(**{one.knob: value}, **fitting(one.name), **seed) for seed in seeds
        ]
    for bits in args.bits:
        plans[PRECISION, "bits", bits] = [Plan(precision=KVPrecision(bits=bits, **fitting(PRECISION)))]
    return plans


def _row(case: str, key: Key, result: Result, full: Result, asked: Questions) -> dict[str, Any]:
    name, knob, value = key
    low, high = bootstrap(result.scores)
    drop = result.scores - full.scores
    row = {
        "case": case,
        "method": name,
        "baseline": "full",
        knob: value,
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
        row["kv_share"] = result.report.kv_bytes_used / result.report.kv_bytes_full
        if result.report.attending_share:
            row["attending_share"] = statistics.mean(result.report.attending_share)
            row["attention_flops_share"] = result.report.attention_flops_share
        row["op_calls"] = result.report.op_calls
        row["stepped_aside"] = result.report.stepped_aside
    else:
        row["flops_share"] = row["image_keep_share"] = row["kv_share"] = 1.0
    return row
