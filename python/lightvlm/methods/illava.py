"""iLLaVA: at a few layers the least attended image tokens collapse into one.

Source: Hu, Shang, Wan, Feng, "iLLaVA: An Image is Worth Fewer Than 1/3 Input Tokens in Large Multimodal Models",
arXiv 2412.06263, as its first released code does it in the decoder; merging in the vision tower is left out. Image
tokens are ranked by the attention that they receive from the last token of the prompt in the layer before, averaged
over the heads. Of an image that has n tokens and shall have n - r, the r + 1 lowest become one in the place of the
highest of them,
    x' = sum_i (i + 1) x_i / sum_i (i + 1),   i = 0 for the highest of them, r for the lowest;
the others stay as they are, and all keep their positions. That the lowest weighs most is what the code does.

Published settings: layers 6, 7, 8 of Qwen2-VL's 28, 0.9 of the tokens each (the default: 0.729 in all), and layer 8 of
LLaVA-OneVision's 28, 0.7 (``ILLaVA(0.7, layers=(8,))``). There the counts are shares of the tokens before each layer,
here of the original ones, which differ by rounding. Where the code runs FlashAttention, it takes a token's own
log-sum-exp as its score; we score as its eager path does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    pyramid_stages,
    scaled_layers,
    shrinking,
)


def default_layers(layers: int) -> tuple[int, ...]:
    """6, 7, 8 of 28 layers, and at the same share of others."""
    return scaled_layers(layers, (6, 7, 8), 28)


def merge_tail(hidden: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """What the lowest tokens of an image become.

    Args:
        hidden (n, C), scores (n,): of the image's tokens.
        keep: tokens that shall be left, at least 1 and less than n.

    Returns:
        The merged token (C,) in fp32, and where it goes (1,) int64.
    """
    # A stable sort has ties in ascending order, as the selection of the tokens that stay has.
    tail = scores.sort(descending=True, stable=True).indices[keep - 1 :]
    weight = torch.arange(1, len(tail) + 1, device=hidden.device, dtype=torch.float32)
    return weight @ hidden[tail].float() / weight.sum(), tail[:1]


@register_part("prefill", "illava")
@dataclass(frozen=True)
class ILLaVAPrefill(PrefillPart):
    """Collapse the image tokens that the prompt's last token attends to least into one."""

    keep: float = option(0.729, "final share of each image's tokens")
    layers: tuple[int, ...] | None = option(
        None, "reduce at the input of these layers; None: by depth, 6, 7, 8 of 28"
    )
    fractions: tuple[float, ...] | None = option(None, "share kept from each stage on; None: geometric")
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return pyramid_stages(layers, self.keep, self.layers, self.fractions, default_layers, scored=True)

    @property
    def probe(self) -> Probe:
        return Probe(rows="last")

    def reduce(self, stage: StageInput) -> Reduced:
        assert stage.scores is not None
        hidden = stage.hidden.clone()
        for row, picture in shrinking(stage):
            span = slice(picture.start, picture.stop)
            merged, place = merge_tail(stage.hidden[row, span], stage.scores[row, span], picture.keep)
            hidden[row].index_copy_(0, picture.start + place, merged[None].to(hidden.dtype))
        return drop(stage, highest(stage, stage.scores), hidden)


def ILLaVA(keep: float = 0.729, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """iLLaVA's plan: at three layers the image tokens that the prompt's last token attends to least become one.

    Args:
        keep: final tokens of each image over its original tokens, in (0, 1]; 1 keeps all.
        keep_for_later: see :class:`lightvlm.Plan`.
        options: see :class:`ILLaVAPrefill`.

    Raises:
        ValueError, TypeError: an option out of range; the message names it.
    """
    return Plan(
        prefill=ILLaVAPrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
