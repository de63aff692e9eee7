"""Measure the reference VLM on held-out scenes: `python -m lightvlm.reference_vlm.measure [--json]`.

Every scene is asked one question of each kind it allows, as the first turn, through the processor and
`generate()`. The ceiling is that of `probe`, fitted on training scenes.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import load
from .evaluate import answer_batch, summarise
from .probe import accuracy, ceiling, digit_features, fit
from .questions import KINDS, Question, questions
from .scenes import make_scenes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LlavaForConditionalGeneration, ProcessorMixin

    from .scenes import Scene


def one_of_each_kind(scenes: Sequence[Scene], seed: int) -> tuple[list[int], list[Question]]:
    """For each scene one question of each kind it allows: the scenes' positions and the questions."""
    where: list[int] = []
    asked: list[Question] = []
    for index, scene in enumerate(scenes):
        options = questions(scene, np.random.default_rng([seed, index]))
        for kind in KINDS:
            mine = [question for question in options if question.kind == kind]
            where += [index] * bool(mine)
            asked += mine[:1]
    return where, asked


def measure(
    model: LlavaForConditionalGeneration,
    processor: ProcessorMixin,
    split: str = "test",
    scenes: int = 320,
    probe_scenes: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy by kind and overall, the probe's accuracy per digit and the ceilings that follow from it."""
    held_out = make_scenes(split, scenes, seed)
    where, asked = one_of_each_kind(held_out, seed)
    _, scores = answer_batch(model, processor, [held_out[i] for i in where], asked)
    probe = fit(model, make_scenes("train", probe_scenes, seed))
    features = digit_features(model, held_out)
    digit, colour = accuracy(probe, features, held_out)
    return {
        "split": split,
        "scenes": scenes,
        "questions": {"all": len(asked)} | {kind: sum(q.kind == kind for q in asked) for kind in KINDS},
        "accuracy": summarise(asked, scores),
        "probe": {"digit": digit, "colour": colour, "digits": sum(len(f) for f in features)},
        "ceiling": summarise(asked, ceiling(probe, [features[i] for i in where], asked)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--scenes", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    torch.set_flush_denormal(True)
    figures = measure(*load(), split=args.split, scenes=args.scenes, seed=args.seed)
    if args.json:
        print(json.dumps(figures))
        return
    print(f"{'':16} {'questions':>9} {'accuracy':>9} {'ceiling':>9}")
    for kind, count in figures["questions"].items():
        print(f"{kind:16} {count:9} {figures['accuracy'][kind]:9.3f} {figures['ceiling'][kind]:9.3f}")
    probe = figures["probe"]
    print(f"probe on {probe['digits']} digits: value {probe['digit']:.3f}, colour {probe['colour']:.3f}")


if __name__ == "__main__":
    main()
