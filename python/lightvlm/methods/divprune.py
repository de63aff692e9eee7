"""DivPrune: image tokens that are as different from each other as can be.

Source: Alvar, Singh, Akbari, Zhang, "DivPrune", arXiv 2503.02175, section 3: of each image choose the tokens whose
smallest distance to each other is largest (the max-min diversity problem), by farthest-point sampling on cosine
distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightvlm_ext import ops

from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import PrefillPart, Reduced, Stage, StageInput, check_keep, drop, pyramid_stages, shrinking


@register_part("prefill", "divprune")
@dataclass(frozen=True)
class DivPrunePrefill(PrefillPart):
    """Keep the image tokens that are farthest from each other, before the decoder.

    The distance of two tokens is 1 minus the cosine of their input embeddings. The first token chosen is the one whose
    smallest distance to another of its image is largest, as in the authors' code. Each further
    one is that whose smallest distance to the chosen ones is largest. Ties go to the lower index. Scores know nothing
    of the prompt. We differ in the rounding of the count alone (theirs is to even).
    """

    keep: float = option(0.098, "share of each image's tokens; published for 56 of 576")
    layer: int = option(0, "reduce at the input of this layer", low=0)
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return pyramid_stages(layers, self.keep, (self.layer,), None, lambda depth: (self.layer,))

    def reduce(self, stage: StageInput) -> Reduced:
        unit = functional.normalize(stage.hidden.float(), dim=-1)
        # The op's cosines count from 0 on. One more channel makes them (1 + cosine) / 2: never negative, same order.
        features = torch.cat([unit, torch.ones_like(unit[..., :1])], dim=-1)
        # With equal scores it chooses the farthest token, but for the first: before that one all are worth their score.
        scores = torch.ones_like(unit[..., 0])
        for row, picture in shrinking(stage):
            tokens = (row, slice(picture.start, picture.stop))
            scores[tokens] += _loneliest(unit[tokens])
        selection = ops.select_diverse(
            scores,
            features,
            keep=stage.keep,
            forced=stage.text,
            segment=stage.segment,
            capacity=stage.capacity,
        )
        return drop(stage, selection)


_ROWS = 1024
"""Tokens that are compared with all others at a time: a video's matrix of cosines is never whole."""

_ROUNDING = 1e-6
"""What fp32 may make of one cosine, summed in one order or another."""


def _loneliest(unit: Tensor) -> Tensor:
    """(n,): 1 for the token of unit (n, C) whose largest cosine to another is smallest, 0 for the others."""
    nearest = []
    for first in range(0, unit.shape[0], _ROWS):
        cosine = unit[first : first + _ROWS] @ unit.T
        cosine.diagonal(offset=first).fill_(-torch.inf)
        nearest.append(cosine.amax(dim=1))
    largest = torch.cat(nearest)
    # Two tokens that are each other's nearest tie, and a product of matrices may round the two cosines apart.
    loneliest = (largest <= largest.amin() + _ROUNDING).int().argmax(dim=0, keepdim=True)
    return torch.zeros_like(largest).scatter_(0, loneliest, 1.0)


def DivPrune(keep: float = 0.098, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """DivPrune's plan: image tokens far from each other, chosen before the decoder; options: see
    :class:`DivPrunePrefill`, and ``keep_for_later``: :class:`lightvlm.Plan`."""
    return Plan(
        prefill=DivPrunePrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
