"""The questions of ``lightvlm bench fidelity``, and a model's answers to them."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..kl import Divergence, divergence
from ..plan import Plan
from ..report import Report
from ..runtime import attach
from ..statistics import Timer
from . import answers

_LONGEST = 12  # tokens of an answer


@dataclass
class Result:
    """Scores (scenes, kinds) of a plan and what it cost.

    seconds: of all answers.   prefill: of the model's call with the prompts of each batch.   own: of the
    plan's own work in them.   report: of all.
    """

    scores: NDArray[np.float64]
    seconds: float
    prefill: list[float]
    own: list[float] = field(default_factory=list)
    report: Report | None = None


class PromptClock:
    """Times the first call of a model after each :meth:`expect`, attached or not, with all hooks."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._expected = False
        self._timer: Timer | None = None
        self._times: list[Callable[[], float]] = []

    def __enter__(self) -> PromptClock:
        self._handles = [
            self._model.register_forward_pre_hook(self._before, prepend=True),
            self._model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def expect(self) -> None:
        """The next call reads a prompt."""
        self._expected = True

    @property
    def seconds(self) -> list[float]:
        """Of each call; waits for the device."""
        return [seconds() for seconds in self._times]

    def _before(self, module: Any, args: Any) -> None:
        if self._expected:
            self._expected, self._timer = False, Timer(self._model.device)

    def _after(self, module: Any, args: Any, output: Any) -> None:
        if self._timer is not None:
            self._times.append(self._timer.stop())
            self._timer = None


def needs_pixels(plan: Plan | None) -> bool:
    """Whether the vision tower must run with the plan attached, since the plan reads its attention."""
    return plan is not None and getattr(plan.prefill, "tower", None) is not None


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
        self.batches: list[tuple[str, slice, dict[str, Any]]] = []
        self._pixels: dict[int, Any] = {}
        self.about = {
            "split": split,
            "seed": seed,
            "count": count,
            "digest": answers.digest(
                [f"{q.prompt} {q.answer}" for kind in KINDS for q in self.questions[kind]]
            ),
        }
        """What two results must have alike to be about the same questions."""

    @torch.no_grad()
    def prepare(self, model: Any, processor: Any, batch: int) -> None:
        """Make the inputs of every batch; pictures are encoded here where generate() takes encoded ones."""
        from ..reference_vlm.evaluate import messages

        encode = getattr(model, "_supports_mm_encoder_outputs", lambda: False)()
        encoded: dict[int, Any] = {}
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
                pixels = inputs.pop("pixel_values").to(model.dtype)
                pixels = self._pixels.setdefault(start, pixels)  # the kinds ask about the same scenes
                if encode:
                    if start not in encoded:
                        encoded[start] = model.get_image_features(pixel_values=pixels, return_dict=True)
                    inputs["mm_encoder_outputs"] = {"image": encoded[start]}
                else:
                    inputs["pixel_values"] = pixels
                self.batches.append((kind, part, inputs))

    def inputs(self, at: int, pixels: bool) -> dict[str, Any]:
        """generate()'s arguments for a batch, encoded pictures as pixels if so wished."""
        _, part, inputs = self.batches[at]
        # transformers writes into the dictionary of encoder outputs it is given
        call = {name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()}
        if pixels and call.pop("mm_encoder_outputs", None) is not None:
            call["pixel_values"] = self._pixels[part.start]
        return call

    def divergences(self, model: Any, plans: Mapping[Any, Plan], count: int) -> dict[Any, Divergence]:
        """KL of each plan from the full model, over at least ``count`` questions of all kinds; 0: none."""
        if count == 0:
            return {}
        numbers = range(len(self.batches))
        by_kind = [[at for at in numbers if self.batches[at][0] == kind] for kind in self.kinds]
        turns = [at for turn in itertools.zip_longest(*by_kind) for at in turn if at is not None]
        parts: dict[Any, list[Divergence]] = {key: [] for key in plans}
        while turns and count > 0:
            at = turns.pop(0)
            count -= len(self.batches[at][2]["input_ids"])
            for pixels in (False, True):
                some = [key for key, plan in plans.items() if needs_pixels(plan) is pixels]
                named = {str(number): plans[key] for number, key in enumerate(some)}
                if named:
                    found = divergence(model, self.inputs(at, pixels), named, new_tokens=_LONGEST)
                    for number, key in enumerate(some):
                        parts[key].append(found[str(number)])
        return {key: Divergence.together(found) for key, found in parts.items()}

    @torch.no_grad()
    def ask(self, model: Any, processor: Any, plan: Plan | None) -> Result:
        """Answers of the model, with a plan attached or as it is, after :meth:`prepare`."""
        from ..reference_vlm.questions import score

        scores = np.zeros((len(self.scenes), len(self.kinds)))
        own = [0.0]
        start = time.perf_counter()
        with (
            contextlib.nullcontext() if plan is None else attach(model, plan) as run,
            PromptClock(model) as clock,
        ):
            for at, (kind, part, inputs) in enumerate(self.batches):
                clock.expect()
                call = self.inputs(at, needs_pixels(plan))
                output = model.generate(**call, do_sample=False, max_new_tokens=_LONGEST)
                texts = processor.batch_decode(
                    output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )
                right = [score(q, text) for q, text in zip(self.questions[kind][part], texts, strict=True)]
                scores[part, self.kinds.index(kind)] = right
                if run is not None:
                    own.append(run.report().own_seconds)
        seconds = time.perf_counter() - start
        each = [after - before for before, after in itertools.pairwise(own)]
        return Result(scores, seconds, clock.seconds, each, None if run is None else run.report())

    @torch.no_grad()
    def warm_up(self, model: Any) -> None:
        """The first call of a model is slower than the others."""
        model.generate(**self.inputs(0, False), do_sample=False, max_new_tokens=1)

    @torch.no_grad()
    def full_prefill(self, model: Any, pixels: bool) -> list[float]:
        """Seconds of the model's call with the prompts of each batch, nothing attached; ``pixels``: pictures are not
        encoded beforehand."""
        with PromptClock(model) as clock:
            for at in range(len(self.batches)):
                clock.expect()
                model.generate(**self.inputs(at, pixels), do_sample=False, max_new_tokens=1)
        return clock.seconds
