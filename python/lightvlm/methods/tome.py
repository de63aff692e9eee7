"""ToMe inside the decoder: in every layer some image tokens merge with the ones most like them.

Source: Bolya et al., "Token Merging", arXiv 2210.09461, section 3; inside a decoder it is a baseline of LightKV's paper
(arXiv 2605.00789), there ToMe(P).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightvlm_ext import ops

from ..host import rectangular, upload
from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import Picture, PrefillPart, Reduced, Stage, StageInput, check_keep, keep_count, pyramid_stages


@register_part("prefill", "tome")
@dataclass(frozen=True)
class ToMePrefill(PrefillPart):
    """Merge a few pairs of image tokens in every layer (bipartite soft matching).

    The tokens that an image has at a stage are in turn sources and destinations. Each source's best destination is the
    one of the highest cosine between keys, averaged over heads; of these pairs the r best merge, several sources into
    one destination where it is best for them, as the mean weighted with the original tokens that each stands for. Ties
    go to the lower index. r is what the counts ask for.

    What differs. ToMe works in a vision transformer, between the attention and the MLP of a layer, with that layer's
    keys; here tokens are merged at the input of a layer, and the keys are those of the layer before, after the rotary
    embedding. Proportional attention (log size added to the logits) is left out, because FlashAttention takes no bias.
    The vision tower is not touched, and text and other images take no part.
    """

    wants_keys: ClassVar[bool] = True
    counts_sizes: ClassVar[bool] = True

    keep: float = option(0.35, "final share of each image's tokens")
    layers: tuple[int, ...] | None = option(
        None, "merge at the input of these layers; None: of all but the first"
    )
    fractions: tuple[float, ...] | None = option(
        None, "share kept from each stage on; None: as many tokens less each time, as far as halves allow"
    )
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        at = tuple(range(1, layers)) if self.layers is None else self.layers
        fractions = self.fractions
        if fractions is None and at:
            fractions = constant_steps(len(at), self.keep)
        found = pyramid_stages(layers, self.keep, at, fractions, lambda depth: at)
        if found and found[0].layer == 0:
            raise ValueError("layers must start at 1 or later: the keys come from the layer before")
        shares = [1.0, *(stage.keep for stage in found)]
        for before, stage in zip(shares, found, strict=False):
            if before > 2 * stage.keep * (1 + _SLACK):
                raise ValueError(
                    f"fractions must not fall to less than a half at once (layer {stage.layer}: {before:g} to "
                    f"{stage.keep:g}); give more layers"
                )
        return found

    def counts(self, stage: Stage, pictures: Sequence[Picture]) -> list[int]:
        """The counts of ``stage.keep``, and never fewer than half of what an image has.

        Where stages halve, roundings up would leave an image with more than its final count in the end; so a stage
        leaves no more than halving it until the end can bring down to that.
        """
        halvings = math.ceil(math.log2(stage.keep / self.keep) - _SLACK)
        found = []
        for picture in pictures:
            most = keep_count(picture.original, self.keep) << halvings
            wanted = min(keep_count(picture.original, stage.keep), most)
            found.append(max(picture.tokens - picture.tokens // 2, wanted))
        return found

    def reduce(self, stage: StageInput) -> Reduced:
        assert stage.keys is not None
        assert stage.sizes is not None
        merge = [[picture.tokens - picture.keep for picture in row] for row in stage.pictures]
        merged = ops.merge_pairs(
            stage.hidden,
            torch.where(stage.text, -1, torch.where(stage.segment >= 0, stage.segment, -2)).to(torch.int32),
            merge=upload(rectangular(merge), stage.hidden.device),
            weight=stage.sizes,
            metric=stage.keys.float().mean(dim=2),
            align="right",
            capacity=stage.capacity,
        )
        return Reduced(merged.selection, merged.x, merged.weight)


_SLACK = 1e-9
"""What shares may be off by from being halved and doubled."""


def constant_steps(stages: int, keep: float) -> tuple[float, ...]:
    """Shares of the original tokens after each of so many stages, the last ``keep``: each merges the same number,
    ToMe's r, but where that would be more than half of what is left, the stages before merge more.

    Raises:
        ValueError: so many halvings do not lead to ``keep``.
    """
    if keep * 2**stages < 1 - _SLACK:
        raise ValueError(
            f"keep must be at least {0.5**stages:g}: each of {stages} layers can merge half of its tokens, got {keep}"
        )
    found = [keep]
    for stage in range(stages - 1, 0, -1):
        found.append(min(1 - (1 - keep) * stage / stages, 2 * found[-1]))
    return tuple(reversed(found))


def ToMe(keep: float = 0.35, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """ToMe's plan: image tokens merged pair by pair in every layer of the decoder; options: see :class:`ToMePrefill`,
    and ``keep_for_later``: :class:`lightvlm.Plan`."""
    return Plan(
        prefill=ToMePrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
