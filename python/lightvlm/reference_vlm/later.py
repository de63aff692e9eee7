"""A second question about another digit, on the cache of the first: `python -m lightvlm.reference_vlm.later [--json]`.

What a plan drops for the first question is what the second may need. The answers are compared with those of a fresh
conversation: question, answer and second question in one prompt, under the same plan.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import torch

from ..methods import method
from ..plan import KeepForLater
from ..runtime import attach
from . import load
from .evaluate import messages
from .questions import Question
from .scenes import make_scenes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..plan import Plan
    from ..report import Report
    from .scenes import Scene


KEEPS: tuple[KeepForLater, ...] = get_args(KeepForLater)


class Talk(NamedTuple):
    """A scene and two questions about it, the digits of two colours."""

    scene: Scene
    first: Question
    second: Question


def talks(split: str, count: int, seed: int) -> list[Talk]:
    """So many scenes with two questions each, whose answers differ; all prompts have the same length.

    Raises:
        ValueError: ``count`` is below 1, or more than can be made.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    found = []
    for index, scene in enumerate(make_scenes(split, count + count // 4 + 8, seed)):
        order = np.random.default_rng([seed, index, 2]).permutation(len(scene.digits))
        one, *rest = [scene.digits[at] for at in order]
        others = [digit for digit in rest if digit.digit != one.digit]
        if others:
            asked = [
                Question("colour_to_digit", f"which digit is {digit.colour} ?", str(digit.digit))
                for digit in (one, others[0])
            ]
            found.append(Talk(scene, *asked))
    if len(found) < count:
        raise ValueError(f"only {len(found)} conversations could be made, {count} wanted")
    return found[:count]


class Answers(NamedTuple):
    """What was answered to the second questions, on the cache of the first and afresh, and how long both took."""

    later: list[str]
    fresh: list[str]
    right: list[str]
    seconds: float
    report: Report | None

    def figures(self) -> dict[str, Any]:
        """Shares of right answers and of answers that are the fresh conversation's."""
        count = len(self.right)
        pairs = [(self.later, self.right), (self.fresh, self.right), (self.later, self.fresh)]
        later, fresh, same = (sum(map(str.__eq__, *pair)) / count for pair in pairs)
        return {"later": later, "fresh": fresh, "same": same, "seconds": self.seconds}


@torch.no_grad()
def ask_twice(
    model: Any, processor: Any, asked: Sequence[Talk], plan: Plan | None, batch: int = 50
) -> Answers:
    """Ask both questions of every conversation, under a plan or with the model as it is."""
    later: list[str] = []
    fresh: list[str] = []
    seconds = 0.0
    options = {"do_sample": False, "max_new_tokens": 2}
    with contextlib.nullcontext() if plan is None else attach(model, plan) as run:
        for start in range(0, len(asked), batch):
            part = asked[start : start + batch]
            prompts = _inputs(processor, part, lambda talk: [talk.first])
            whole = _inputs(processor, part, lambda talk: [talk.first, talk.first.answer, talk.second])
            first = model.generate(**prompts, **options, return_dict_in_generate=True)
            said = prompts["input_ids"].shape[1] + 1  # the first answer is the model's own, right or wrong
            whole["input_ids"][:, said - 1] = first.sequences[:, said - 1]
            text = {name: whole[name] for name in ("input_ids", "attention_mask")}
            begun = time.perf_counter()
            found = model.generate(**text, **options, past_key_values=first.past_key_values)
            seconds += time.perf_counter() - begun
            new = whole["input_ids"].shape[1]
            later += processor.batch_decode(found[:, new:], skip_special_tokens=True)
            fresh += processor.batch_decode(
                model.generate(**whole, **options)[:, new:], skip_special_tokens=True
            )
        report = run.report() if run is not None else None
    return Answers(later, fresh, [talk.second.answer for talk in asked], seconds, report)


@torch.no_grad()
def cost(
    model: Any, processor: Any, talk: Talk, plan: Plan, steps: int = 256, rounds: int = 9
) -> dict[str, dict[str, float]]:
    """Milliseconds of a decode step, the median over rounds that take turns, and bytes kept for later, a token of the
    conversation, by ``keep_for_later``; and bytes of keys and values a token."""
    inputs = _inputs(processor, [talk], lambda talk: [talk.first])
    times: dict[KeepForLater, list[float]] = {keep: [] for keep in KEEPS}
    later: dict[str, float] = {}
    for _ in range(rounds):
        for keep, spent in times.items():
            with attach(model, dataclasses.replace(plan, keep_for_later=keep)) as run:
                model.generate(**inputs, do_sample=False, max_new_tokens=steps, min_new_tokens=steps)
            report = run.report()
            spent.append(1e3 * report.seconds["decode"] / (steps - 1))
            later[keep] = report.later_bytes / (inputs["input_ids"].shape[1] + steps - 1)
    config = model.config.get_text_config()
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return {
        keep: {"ms": float(np.median(spent)), "bytes": later[keep], "kv_bytes": kv}
        for keep, spent in times.items()
    }


def _inputs(processor: Any, asked: Sequence[Talk], turns: Any) -> dict[str, Any]:
    texts = [
        processor.apply_chat_template(messages(turns(talk)), add_generation_prompt=True) for talk in asked
    ]
    images = [talk.scene.image for talk in asked]
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


def _cost_table(figures: dict[str, dict[str, float]]) -> str:
    rows = [
        f"{name:9} {row['ms']:8.3f} {row['bytes']:12.0f} {row['kv_bytes']:9}" for name, row in figures.items()
    ]
    return "\n".join([f"{'':9} {'ms/step':>8} {'bytes/token':>12} {'KV/token':>9}", *rows])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=float, default=0.03)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of LightVLM")
    parser.add_argument("--cost", action="store_true", help="measure what keeping costs instead")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    from ..catalogue import parse_options

    plan = method("lightvlm", keep=args.keep, **parse_options(args.option))
    asked = talks(args.split, args.scenes, args.seed)
    model, processor = load()
    if args.cost:
        found = cost(model, processor, asked[0], plan)
        print(json.dumps(found) if args.json else _cost_table(found))
        return
    figures = {"full": ask_twice(model, processor, asked, None).figures()}
    for keep in KEEPS:
        kept = dataclasses.replace(plan, keep_for_later=keep)
        figures[keep] = ask_twice(model, processor, asked, kept).figures()
    if args.json:
        print(json.dumps(figures))
        return
    print(f"{'':9} {'right':>7} {'afresh':>7} {'the same':>8} {'seconds':>8}")
    for name, row in figures.items():
        print(f"{name:9} {row['later']:7.3f} {row['fresh']:7.3f} {row['same']:8.3f} {row['seconds']:8.2f}")


if __name__ == "__main__":
    main()
