"""Evenly spread image tokens: the baseline of methods that look at what the tokens hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lightvlm_ext import ops

from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import PrefillPart, Reduced, Stage, StageInput, check_keep, drop, highest, pyramid_stages
from .places import mark, select_marked
from .spread import spread_scores


@register_part("prefill", "uniform")
@dataclass(frozen=True)
class UniformPrefill(PrefillPart):
    """Keep tokens that are spread evenly over each image, whatever they hold, before the first layer unless told
    otherwise.

    With ``order="raster"``, of the n tokens that an image has at a stage, in reading order, those numbered
    floor((i + 1/2) n / k) stay, for i from 0 to k - 1; where the raster's width and n / k share a factor, these are
    whole columns.
    """

    keep: float = option(0.35, "final share of each image's tokens")
    layers: tuple[int, ...] | None = option(None, "reduce at the input of these layers; None: 0")
    fractions: tuple[float, ...] | None = option(None, "share kept from each stage on; None: geometric")
    order: Literal["grid", "raster"] = option(
        "grid", "even over rows and columns, or over the tokens in reading order", choices=("grid", "raster")
    )
    merge: Literal["drop", "uniform"] = option(
        "drop", "dropped tokens vanish, or merge", choices=("drop", "uniform")
    )
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return pyramid_stages(layers, self.keep, self.layers, self.fractions, lambda depth: (0,))

    def reduce(self, stage: StageInput) -> Reduced:
        if self.order == "grid":
            selection = highest(stage, spread_scores(stage))
        else:
            places = [
                [
                    picture.start + (2 * i + 1) * picture.tokens // (2 * picture.keep)
                    for picture in row
                    for i in range(picture.keep)
                ]
                for row in stage.pictures
            ]
            selection = select_marked(stage, mark(stage, places))
        if self.merge == "drop":
            return drop(stage, selection)
        weight = torch.ones(stage.segment.shape, device=stage.segment.device)
        return Reduced(
            selection, ops.merge_tokens(stage.hidden, selection, weight, stage.segment, align="right")
        )


def Uniform(keep: float = 0.35, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """A plan that keeps evenly spread image tokens; options: see :class:`UniformPrefill`, and ``keep_for_later``:
    :class:`lightvlm.Plan`."""
    return Plan(
        prefill=UniformPrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
