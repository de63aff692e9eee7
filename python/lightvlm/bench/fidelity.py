"""``lightvlm bench fidelity``: accuracy of the reference VLM under every method, over the work that is left.

All methods answer the same questions, one of each kind about every scene, at several budgets (:mod:`.budgets`): equal
final counts, equal decoder FLOPs, equal KV cache, equal bits. Intervals are 95 % bootstraps over scenes; where a method
is compared with another at the same budget, both answers to a question are resampled together (paired). Whole curves
are printed, not single points. Parts can be run in several processes and joined.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from ..catalogue import parse_options
from ..models import find_adapter
from . import budgets, fidelity_plot, fidelity_rows, smaller_image
from .common import describe
from .fidelity_questions import Questions, Result, needs_pixels
from .fidelity_rows import Row
from .fidelity_table import table
from .prompts import Prompts

if TYPE_CHECKING:
    from .budgets import Setting

__all__ = ["add_arguments", "run", "table"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument(
        "--questions", type=int, default=2000, help="a multiple of 4: one of each kind a scene"
    )
    parser.add_argument(
        "--split", choices=["test", "val"], default="test", help="val is for choosing, test for reporting"
    )
    parser.add_argument("--seed", type=int, default=0)
    budgets.add_arguments(parser, ["lightvlm", "random"])
    parser.add_argument(
        "--bits",
        type=int,
        choices=[16, 8, 4, 2],
        nargs="+",
        default=[],
        help="caches of so many bits, and no method",
    )
    parser.add_argument(
        "--smaller-image",
        type=int,
        nargs="*",
        metavar="SIDE",
        help="no method, but pictures of so many patches a side; without SIDE, those nearest to --flops",
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
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result there as well")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw accuracy over FLOPs, and over the cache"
    )
    parser.add_argument(
        "--join",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="measure nothing: join results about the same questions",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark, or join results; returns the JSON object of ``lightvlm bench fidelity``."""
    for path, check in ((args.plot, fidelity_plot.check), (args.out, _check_out)):
        if path is not None:
            check(path)
    result = fidelity_rows.join(args.join) if args.join else _measure(args)
    if args.out is not None:
        args.out.write_text(json.dumps(result, allow_nan=False) + "\n")
    if args.plot is not None:
        fidelity_plot.draw(result["rows"], args.plot)
    return result


def _check_out(path: Path) -> None:
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--out: {path.resolve().parent} is no folder")


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from ..reference_vlm import load

    about = describe(args.device)  # of the code that runs, whatever happens to the tree meanwhile
    options = parse_options(args.option)
    for name, least in (("random_seeds", 1), ("kl_questions", 0)):
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}"
            )
    asked = Questions(args.split, args.questions, args.seed)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, processor = load(dtype=getattr(torch, args.dtype))
    model.to(args.device)
    asked.prepare(model, processor, args.batch)
    prompts = Prompts.of_batches(find_adapter(model), [inputs for _, _, inputs in asked.batches])
    settings = budgets.settings(args, options, prompts, bits=args.bits, seeds=args.random_seeds)
    settings = budgets.accepted(settings, model)
    sides = smaller_image.sides(args.smaller_image, args.flops, prompts)
    case = f"reference VLM, {args.questions} {args.split} questions, {args.dtype}"

    asked.warm_up(model)
    full = asked.ask(model, processor, None)
    tokens = model.config.image_seq_length
    rows = [fidelity_rows.without_plan(case, "full", full, full, asked, tokens, full.prefill)]
    rows += _of_settings(case, settings, asked, model, processor, full)
    for side, budget, target in tqdm(sides, desc="smaller images", file=sys.stderr):
        rows.append(smaller_image.measure(case, side, budget, target, asked, full, prompts, model, processor))
    firsts = {setting.key: setting.plans[0] for setting in settings if setting.plans}
    kl = asked.divergences(model, firsts, args.kl_questions)
    for row in rows:
        if (found := kl.get(fidelity_rows.key_of(row))) is not None:
            row["kl"] = found.summary()
    fidelity_rows.compare(rows)
    return {
        "kind": "fidelity",
        **about,
        "options": options,
        "seed": args.seed,
        "questions": asked.about,
        "rows": rows,
    }


def _of_settings(
    case: str, settings: list[Setting], asked: Questions, model: Any, processor: Any, full: Result
) -> list[Row]:
    """A row for each setting, run or not."""
    rows = []
    for setting in tqdm(settings, desc="fidelity", file=sys.stderr):
        if not setting.plans:
            rows.append(fidelity_rows.about(case, setting))
            continue
        # right before, so that a machine with other work to do disturbs both alike
        baseline = asked.full_prefill(model, needs_pixels(setting.plans[0]))
        runs = [asked.ask(model, processor, plan) for plan in setting.plans]
        mean = np.mean([one.scores for one in runs], axis=0)
        seconds = sum(one.seconds for one in runs) / len(runs)
        result = replace(runs[-1], scores=mean, seconds=seconds)
        rows.append(fidelity_rows.measured(case, setting, result, full, asked, baseline))
    return rows
