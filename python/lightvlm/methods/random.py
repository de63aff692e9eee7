"""Random dropping of image tokens: the baseline that every method has to beat at the same counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lightvlm_ext import ops

from ..host import upload
from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import (
    PrefillPart,
    Reduced,
    Stage,
    StageInput,
    ascending,
    check_keep,
    drop,
    highest,
    pyramid_stages,
)


def default_layers(layers: int) -> tuple[int, ...]:
    """Stages at 1/14, but not before layer 2, 2/7 and 4/7 of the depth, each a layer after the last."""
    return ascending([max(2, round(layers / 14)), round(2 * layers / 7), round(4 * layers / 7)], layers)


@register_part("prefill", "random")
@dataclass(frozen=True)
class RandomPrefill(PrefillPart):
    """Keep random image tokens, in a pyramid unless told otherwise."""

    keep: float = option(0.35, "final share of each image's tokens")
    layers: tuple[int, ...] | None = option(
        None, "reduce at the input of these layers; None: by depth, 2, 8, 16 of 28"
    )
    fractions: tuple[float, ...] | None = option(None, "share kept from each stage on; None: geometric")
    merge: Literal["drop", "uniform"] = option(
        "drop", "dropped tokens vanish, or merge", choices=("drop", "uniform")
    )
    seed: int = option(0, "seed of the choice", low=0)
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return pyramid_stages(layers, self.keep, self.layers, self.fractions, default_layers)

    def reduce(self, stage: StageInput) -> Reduced:
        # One number per index in an image, not per place in the batch: a row is reduced alike alone and in a batch,
        # and every stage keeps a subset of what the stage before kept.
        generator = torch.Generator().manual_seed(self.seed)
        numbers = torch.rand(_MAX_IMAGE_TOKENS, generator=generator)
        numbers = upload(numbers, stage.hidden.device, torch.float32)
        scores = numbers[stage.within.long() % _MAX_IMAGE_TOKENS]
        selection = highest(stage, scores)
        if self.merge == "drop":
            return drop(stage, selection)
        weight = torch.ones_like(scores)
        hidden = ops.merge_tokens(stage.hidden, selection, weight, stage.segment, align="right")
        return Reduced(selection, hidden)


_MAX_IMAGE_TOKENS = 1 << 16


def Random(keep: float = 0.35, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """A plan that keeps random image tokens; options: see :class:`RandomPrefill`, and ``keep_for_later``:
    :class:`lightvlm.Plan`."""
    return Plan(
        prefill=RandomPrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
