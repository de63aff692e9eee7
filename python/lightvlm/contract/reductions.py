"""What most methods end with: the highest scores stay, the others vanish."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext.ops import Selection

from .prefill import Picture, Reduced, StageInput


def highest(stage: StageInput, scores: Tensor) -> Selection:
    """The ``stage.keep`` tokens of each image that have the highest scores (B, M), and all text; ties go to the lower
    index."""
    return ops.select(
        scores, keep=stage.keep, forced=stage.text, segment=stage.segment, capacity=stage.capacity
    )


def drop(stage: StageInput, selection: Selection, hidden: Tensor | None = None) -> Reduced:
    """A stage whose other tokens vanish. ``hidden`` (B, M, C): the states to keep some of; None: the stage's own."""
    states = stage.hidden if hidden is None else hidden
    return Reduced(selection, ops.gather_tokens(states, selection.index, selection.count, align="right"))


def shrinking(stage: StageInput) -> Iterator[tuple[int, Picture]]:
    """Each image that loses tokens at a stage, with its row of the batch."""
    for row, pictures in enumerate(stage.pictures):
        for picture in pictures:
            if picture.keep < picture.tokens:
                yield row, picture
