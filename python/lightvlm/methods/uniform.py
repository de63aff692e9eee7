"""Evenly spaced image tokens: the baseline of methods that look at what the tokens hold."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import PrefillPart, Reduced, Stage, StageInput, check_keep, drop, pyramid_stages
from .lightvlm import default_layers
from .places import mark, select_marked


@register_part("prefill", "uniform")
@dataclass(frozen=True)
class UniformPrefill(PrefillPart):
    """Keep evenly spaced tokens of each image, at the layers and counts of LightVLM's default schedule unless told
    otherwise.

    Of the n tokens that an image has at a stage, in reading order, those numbered floor((i + 1/2) n / k) stay, for i
    from 0 to k - 1. So the tokens of a later stage are evenly spaced among those of the one before.
    """

    keep: float = option(0.35, "final share of each image's tokens")
    layers: tuple[int, ...] | None = option(None, "reduce at the input of these layers; None: as LightVLM")
    fractions: tuple[float, ...] | None = option(None, "share kept from each stage on; None: geometric")
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return pyramid_stages(layers, self.keep, self.layers, self.fractions, default_layers)

    def reduce(self, stage: StageInput) -> Reduced:
        places = [
            [
                picture.start + (2 * i + 1) * picture.tokens // (2 * picture.keep)
                for picture in row
                for i in range(picture.keep)
            ]
            for row in stage.pictures
        ]
        return drop(stage, select_marked(stage, mark(stage, places)))


def Uniform(keep: float = 0.35, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """A plan that keeps evenly spaced image tokens; options: see :class:`UniformPrefill`, and ``keep_for_later``:
    :class:`lightvlm.Plan`."""
    return Plan(
        prefill=UniformPrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
