"""Selections of tokens that are known by their place in a row, as methods without scores find them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightvlm_ext import ops

from ..host import upload
from .base import StageInput

if TYPE_CHECKING:
    from lightvlm_ext.ops import Selection


def mark(stage: StageInput, places: Sequence[Sequence[int]]) -> Tensor:
    """(B, M) bool: the places of each row; they are known on the host."""
    marked = torch.zeros(stage.text.shape, dtype=torch.bool)
    for row, found in zip(marked, places, strict=True):
        row[list(found)] = True
    return upload(marked, stage.text.device, torch.bool)


def select_marked(stage: StageInput, marked: Tensor) -> Selection:
    """The image tokens that are marked (B, M) bool, and all text; as many as ``stage.keep`` says."""
    kept = stage.text | marked
    scores = torch.zeros(kept.shape, device=kept.device)
    return ops.select(scores, keep=0, forced=kept, capacity=stage.capacity)
