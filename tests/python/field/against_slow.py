"""What tests of a method share: the method in a few lines of plain Python on a slow decoder, and the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightvlm
import torch
from python.slow import SlowDecoder, _cosine
from python.test_prefill import noise, prompt
from python.tiny import DEPTH, Family, Image, Video
from torch import Tensor

MARGIN = 1e-5
"""By how much choices must be clear, so that fp32 and float64 make the same: some ten times what fp32 does to a cosine
or an attention score of the tiny models."""


class SlowMethod(SlowDecoder):
    """A slow decoder reduced by a method: :meth:`choose` says which of an image's tokens stay, and merges them.

    ``grids``: (frames, height, width) of each image of the row.   ``margin``: the closest decision so far.
    """

    def __init__(self, model: Any, part: Any, grids: Sequence[tuple[int, int, int]]) -> None:
        stages = [(stage.layer, stage.keep) for stage in part.stages(DEPTH)]
        super().__init__(model, {"kind": part.kind, "stages": stages})
        self.part, self.grids = part, grids
        self.margin = math.inf

    def choose(
        self,
        out: Tensor,
        hidden: Tensor,
        tokens: list[int],
        budget: int,
        *,
        image: int,
        segment: list[int],
        within: list[int],
        scores: Tensor,
    ) -> list[int]:
        """Which of an image's ``tokens`` stay; what they become is written into ``out``."""
        raise NotImplementedError

    def budget(self, tokens: int, size: int, keep: float, image: int) -> int:
        """How many of an image's tokens stay."""
        return min(tokens, max(1, math.floor(keep * size + 0.5)))

    def best(self, values: Sequence[float], ties: bool = False) -> int:
        """Where the highest value is, the first of several; ``ties``: equal ones are meant to be."""
        ordered = sorted(set(values) if ties else values, reverse=True)
        if len(ordered) > 1:
            self.margin = min(self.margin, ordered[0] - ordered[1])
        return list(values).index(ordered[0])

    def highest(self, tokens: Sequence[int], values: Sequence[float], count: int) -> list[int]:
        """The tokens of the ``count`` highest values."""
        order = sorted(range(len(tokens)), key=lambda i: -values[i])
        if 0 < count < len(order):
            self.margin = min(self.margin, values[order[count - 1]] - values[order[count]])
        return sorted(tokens[i] for i in order[:count])

    def _score(self, weights: Tensor, segment: Sequence[int]) -> Tensor:
        return torch.zeros(len(segment))

    def _reduce(
        self,
        hidden: Tensor,
        segment: list[int],
        within: list[int],
        sizes: list[int],
        scores: Tensor | None,
        keep: float,
    ) -> tuple[Tensor, list[int]]:
        out = hidden.clone()
        left = [i for i in range(len(segment)) if segment[i] < 0]
        scores = torch.zeros(len(segment)) if scores is None else scores
        for image, size in enumerate(sizes):
            tokens = [i for i in range(len(segment)) if segment[i] == image]
            left += self.choose(
                out,
                hidden,
                tokens,
                self.budget(len(tokens), size, keep, image),
                image=image,
                segment=segment,
                within=within,
                scores=scores,
            )
        left.sort()
        return out[left], left


def cosine(a: Tensor, b: Tensor) -> float:
    return _cosine(a, b)


def grids_of(row: Sequence[Any]) -> list[tuple[int, int, int]]:
    """(frames, height, width) of the images and videos of a prompt."""
    pictures = [item for item in row if isinstance(item, Image | Video)]
    return [(getattr(picture, "frames", 1), picture.height, picture.width) for picture in pictures]


def check(
    model: Any,
    family: Family,
    part: Any,
    rows: Sequence[Sequence[Any]],
    slow: Callable[..., SlowMethod],
) -> dict[int, list[list[list[int]]]]:
    """A batch under a method's part against each row by itself on the slow decoder: kept tokens and logits."""
    with torch.no_grad(), lightvlm.attach(model, lightvlm.Plan(prefill=part), trace=True) as run:
        logits = model(**prompt(family, rows)).logits
    # as in test_prefill: some times what fp32 costs the unreduced model
    limit = 4 * noise(model, family, rows) + 1e-5
    length = 0
    for b, row in enumerate(rows):
        decoder = slow(model, part, grids_of(row))
        expected = decoder.read(family.batch([row]))
        assert decoder.margin > MARGIN, f"row {row} has a tie within {decoder.margin}: take other seeds"
        kept = dict(decoder.kept)
        # stages at which no row loses a token do not run
        for layer in [layer for layer in kept if layer not in run.kept]:
            del kept[layer]
        assert {layer: found[b] for layer, found in run.kept.items() if found[b]} == kept
        assert (logits[b, logits.shape[1] - len(expected) :] - expected).abs().max() <= limit
        length = max(length, len(expected))
    assert logits.shape[1] == length
    assert run.report().stepped_aside == {}
    return run.kept
