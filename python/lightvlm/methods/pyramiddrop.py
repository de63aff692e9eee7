"""PyramidDrop: image tokens are dropped in stages, the more the deeper.

Source: Xing, Huang, Dong, Lu, Zhang, Zang, Cao, He, Wang, Wu, Lin, "PyramidDrop", arXiv 2410.17247. The decoder is cut
in four; after each part but the last, a share of the image tokens stays (half of those before: 0.5, 0.25, 0.125 of the
original ones), ranked by what the last token of the prompt would attend to in the coming layer: its input norm and its
query and key projections are applied to the tokens as they are, softmax, mean over the heads. So no layer needs its
attention weights shown.

The published code numbers the tokens that stay 0, 1, 2, ... anew after each stage, and generated tokens go on from
there in the layers behind it. We follow it; ``positions="keep"`` leaves positions as they were. Where the code
truncates the number of tokens that stay, we round, as all methods here do.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import (
    PrefillPart,
    Probe,
    Reduced,
    Stage,
    StageInput,
    check_keep,
    drop,
    highest,
    numbering,
    pyramid_stages,
    scaled_layers,
)


def quarters(layers: int) -> tuple[int, ...]:
    """Stages after 1/4, 1/2 and 3/4 of the depth: 8, 16, 24 of 32 layers."""
    return scaled_layers(layers, (1, 2, 3), 4)


@register_part("prefill", "pyramiddrop")
@dataclass(frozen=True)
class PyramidDropPrefill(PrefillPart):
    """Drop image tokens in stages, by what the last token would attend to in the coming layer."""

    keep: float = option(0.125, "final share of each image's tokens")
    layers: tuple[int, ...] | None = option(
        None, "reduce at the input of these layers; None: by depth, 8, 16, 24 of 32"
    )
    fractions: tuple[float, ...] | None = option(None, "share kept from each stage on; None: geometric")
    positions: str = numbering("renumber")
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return pyramid_stages(layers, self.keep, self.layers, self.fractions, quarters)

    @property
    def probe(self) -> Probe:
        return Probe(rows="last", layer="coming")

    def reduce(self, stage: StageInput) -> Reduced:
        assert stage.scores is not None
        return drop(stage, highest(stage, stage.scores))


def PyramidDrop(keep: float = 0.125, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """PyramidDrop's plan: image tokens are dropped after each quarter of the decoder, half of them at each by default.

    Args:
        keep: final tokens of each image over its original tokens, in (0, 1]; 1 keeps all.
        keep_for_later: see :class:`lightvlm.Plan`.
        options: see :class:`PyramidDropPrefill`.

    Raises:
        ValueError, TypeError: an option out of range; the message names it.
    """
    return Plan(
        prefill=PyramidDropPrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
