"""FastV: after two layers, half of the image tokens go: those that the prompt's last token attends to least.

Source: Chen, Zhao, Liu, Bai, Lin, Zhou, Chang, "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764. At the
input of layer K (2) image tokens are ranked by the attention that they receive in layer K - 1 from the last token of
the prompt, averaged over the heads; the lowest share R (0.5) is dropped, the others keep their positions. ``keep`` is
1 - R. The published code computes layer K - 1 with all attention weights; here one row is scored anew. With several
images each keeps its share, where one ranking over all of them would let one image starve another.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import PrefillPart, Probe, Reduced, Stage, StageInput, check_keep, drop, highest


@register_part("prefill", "fastv")
@dataclass(frozen=True)
class FastVPrefill(PrefillPart):
    """Keep the image tokens that the prompt's last token attends to most."""

    keep: float = option(0.5, "final share of each image's tokens")
    layer: int = option(2, "reduce at the input of this layer", low=1)
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        if self.keep == 1:
            return ()
        if self.layer >= layers:
            raise ValueError(f"layer must be within 1..{layers - 1}, got {self.layer}")
        return (Stage(self.layer, self.keep),)

    @property
    def probe(self) -> Probe:
        return Probe(rows="last")

    def reduce(self, stage: StageInput) -> Reduced:
        assert stage.scores is not None
        return drop(stage, highest(stage, stage.scores))


def FastV(keep: float = 0.5, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """FastV's plan: image tokens that the prompt's last token attends to least are dropped after two layers.

    Args:
        keep: final tokens of each image over its original tokens, in (0, 1]; 1 keeps all. The paper's 1 - R.
        keep_for_later: see :class:`lightvlm.Plan`.
        options: see :class:`FastVPrefill`.

    Raises:
        ValueError, TypeError: an option out of range; the message names it.
    """
    return Plan(
        prefill=FastVPrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
