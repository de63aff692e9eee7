"""VisionZip (arXiv 2412.04467): what the vision tower itself attends to, and the rest merged by its keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightvlm_ext import ops

from ..host import upload
from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import PrefillPart, Reduced, Stage, StageInput, TowerProbe, check_keep, numbering


@register_part("prefill", "visionzip")
@dataclass(frozen=True)
class VisionZipPrefill(PrefillPart):
    """Dominant tokens by the class token's attention, contextual tokens merged from the others; no text has a say.

    Of an image's n tokens to keep, c = floor(contextual * n + 1/2), at most n - 1, are contextual. The n - c with the
    highest attention of the class token (towers without one: attention received) are dominant and stay as they are.
    Of the r others, in reading order, every max(1, r // c)-th is a target until there are c. Each remaining one goes to
    the target whose key (of that tower layer, mean over heads) has the highest cosine to its own; a target becomes
    itself plus the mean of what it gets, and stays at its place.

    That is the authors' code; it adds the mean of the assigned tokens to the target where one might average over all.
    Other than there, tokens are merged at the decoder's input, after the projector instead of before it, and the class
    token is not among those that stay, as it is no image token of transformers' models. Where the model joins patches
    into a token, a token has the mean score and key of its patches.
    """

    keep: float = option(0.25, "share of each image's tokens that are left")
    contextual: float = option(
        10 / 64, "share of what is left that is merged from the other tokens", low=0, high=1
    )
    tower_layer: int = option(-2, "layer of the vision tower whose attention decides")
    positions: str = numbering("renumber")
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return () if self.keep >= 1 else (Stage(0, self.keep),)

    @property
    def tower(self) -> TowerProbe:
        return TowerProbe(self.tower_layer, "class", keys=True)

    def reduce(self, stage: StageInput) -> Reduced:
        assert stage.tower_scores is not None
        assert stage.tower_keys is not None
        dominant, step, contextual, before = self._counts(stage)
        chosen = ops.select(stage.tower_scores, keep=dominant, segment=stage.segment).inverse >= 0
        image = stage.segment.clamp_min(0).long()
        rest = (stage.segment >= 0) & ~chosen
        rank = rest.cumsum(1) - 1 - before.gather(1, image)
        steps = step.gather(1, image)
        target = rest & (rank % steps == 0) & (rank // steps < contextual.gather(1, image))
        selection = ops.select(
            stage.tower_scores, keep=0, forced=stage.text | chosen | target, capacity=stage.capacity
        )
        # a target weighs nothing, so that it becomes the mean of the others; it is added afterwards
        mean, place = ops.merge_tokens(
            stage.hidden,
            selection,
            (~target).float(),
            torch.where(rest, stage.segment, -1),
            metric=stage.tower_keys,
            align="right",
            return_target=True,
        )
        got = _receivers(rest & ~target, place, selection.index)
        own, gets = ops.gather_tokens([stage.hidden, got], selection.index, selection.count, align="right")
        return Reduced(selection, torch.where(gets[..., None] > 0, own + mean, mean))

    def _counts(self, stage: StageInput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each image (B, G): how many are dominant, how far apart targets are, how many there are, and how many
        tokens of the row's earlier images are not dominant."""
        images = max(len(row) for row in stage.pictures)
        table = torch.zeros(4, len(stage.pictures), images, dtype=torch.int32)
        table[1] = 1
        for b, row in enumerate(stage.pictures):
            before = 0
            for picture in row:
                merged = 0
                if picture.keep < picture.tokens:  # an image that loses nothing is left alone
                    merged = min(picture.keep - 1, math.floor(self.contextual * picture.keep + 0.5))
                rest = picture.tokens - (picture.keep - merged)
                found = (picture.keep - merged, max(1, rest // max(1, merged)), merged, before)
                table[:, b, picture.image] = torch.tensor(found, dtype=torch.int32)
                before += rest
        dominant, step, contextual, earlier = upload(table, stage.hidden.device).unbind(0)
        return dominant, step, contextual, earlier


def _receivers(given: Tensor, place: Tensor, index: Tensor) -> Tensor:
    """Which tokens (B, M) int32 get something of the ``given`` ones, which go to slots ``place`` of ``index``."""
    nowhere = given.shape[1]
    slots = torch.where(given & (place >= 0), place, 0).long()
    to = torch.where(given & (place >= 0), index.gather(1, slots), nowhere).long()
    got = torch.zeros(given.shape[0], nowhere + 1, dtype=torch.int32, device=given.device)
    return got.scatter_(1, to, 1)[:, :nowhere]  # the same number to wherever: order plays no part


def VisionZip(
    keep: float = 0.25,
    *,
    contextual: float = 10 / 64,
    positions: Literal["keep", "renumber", "renumber_prompt"] = "renumber",
    keep_for_later: KeepForLater = "offload",
    **options: object,
) -> Plan:
    """A plan that keeps what the vision tower's class token attends to, and merges the rest into a few tokens.

    Args:
        keep: tokens left of each image over its tokens, in (0, 1]; 1 keeps all. The paper's 192, 128 and 64 of LLaVA
            1.5's 576 are 1/3, 2/9 and 1/9.
        contextual: share of them that is merged; the paper's 10 of 64, 20 of 128 and 30 of 192 are all 10/64.
        positions: see :attr:`PrefillPart.positions`; the default numbers tokens as LLaVA numbers a shorter prompt.
        keep_for_later: see :class:`lightvlm.Plan`.   options: see :class:`VisionZipPrefill`.

    Raises:
        ValueError, TypeError: an option out of range; the message names it.
    """
    part = VisionZipPrefill(keep=keep, contextual=contextual, positions=positions, **options)  # type: ignore[arg-type]
    return Plan(prefill=part, keep_for_later=keep_for_later)
