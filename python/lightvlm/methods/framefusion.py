"""FrameFusion: tokens of a video merge with the same patch of the frame before, then the least attended are dropped.

Source: Fu et al., "FrameFusion", arXiv 2501.01986, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightvlm_ext import ops

from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import (
    Picture,
    PrefillPart,
    Probe,
    Reduced,
    Stage,
    StageInput,
    check_keep,
    drop,
    highest,
    keep_count,
    pyramid_stages,
    shrinking,
)


@register_part("prefill", "framefusion")
@dataclass(frozen=True)
class FrameFusionPrefill(PrefillPart):
    """Merge what does not change from frame to frame at the first layers, then keep what is attended to most.

    Merging: each token of a video is compared, by the cosine of hidden states, with the token of the same patch in the
    latest earlier frame that still has one. The most similar ones merge, ties to the lower index: a run of them, from
    frame to frame, becomes one token in the place of the one that it follows, the mean of them all. Pruning: of each
    image and video the tokens stay that receive most attention in the layer before, summed over all rows, mean over
    heads.

    What differs. In the paper all tokens merge whose similarity is at least 0.6, layer after layer, until fewer than a
    tenth do or a budget of computation is met, and the pruning takes what is left of the budget. Counts here are known
    beforehand: ``keep`` is the final share, merging takes ``merge_share`` of the tokens that are to go (a value of
    ours), an equal part at each of ``merge_layers``, though never the first token of a patch. Images, one-frame videos
    and those whose grid is not known are pruned only.
    """

    keep: float = option(0.3, "final share of each image's tokens")
    merge_layers: tuple[int, ...] = option((0,), "merge frames at the input of these layers")
    merge_share: float = option(0.5, "share of the tokens that go which merge", low=0.0, high=1.0)
    prune_layer: int | None = option(
        None, "prune at the input of this layer; None: the one after the last merging", low=1
    )
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)
        if not self.merge_layers:
            raise ValueError("merge_layers must have at least one layer, got ()")

    def stages(self, layers: int) -> tuple[Stage, ...]:
        prune = self.merge_layers[-1] + 1 if self.prune_layer is None else self.prune_layer
        each = (1 - self.keep) * self.merge_share / len(self.merge_layers)
        shares = [1 - each * (number + 1) for number in range(len(self.merge_layers))]
        fractions = (*(max(self.keep, share) for share in shares), self.keep)
        at = (*self.merge_layers, prune)
        if self.keep < 1 and (list(at) != sorted(set(at)) or at[0] < 0 or prune >= layers):
            raise ValueError(
                f"merge_layers and prune_layer must ascend within 0..{layers - 1}, got {self.merge_layers} and {prune}"
            )
        return pyramid_stages(layers, self.keep, at, fractions, lambda depth: at)

    @property
    def probe(self) -> Probe:
        # The mean over all rows, also those that do not see the key, as in the paper: it orders like the sum.
        return Probe(rows="all", over_rows="sum")

    def counts(self, stage: Stage, pictures: Sequence[Picture]) -> list[int]:
        """At a merging layer, images lose nothing and videos at most all but one frame's worth of tokens."""
        if stage.layer not in self.merge_layers:
            return super().counts(stage, pictures)
        return [
            min(picture.tokens, max(_patches(picture), keep_count(picture.original, stage.keep)))
            for picture in pictures
        ]

    def reduce(self, stage: StageInput) -> Reduced:
        assert stage.stage is not None
        if stage.stage.layer in self.merge_layers:
            return _merge_frames(stage)
        assert stage.scores is not None
        return drop(stage, highest(stage, stage.scores))


def _patches(picture: Picture) -> int:
    """Tokens of a frame; of what is no video, all of them."""
    if picture.grid is None or picture.grid[0] == 1:
        return picture.original
    return picture.grid[1] * picture.grid[2]


def _merge_frames(stage: StageInput) -> Reduced:
    """Merge the tokens of each video with the frames before, as many as the counts ask for."""
    # A window for each token that stays: itself, and what follows it from frame to frame and merges into it.
    places = torch.arange(stage.text.shape[1], device=stage.text.device, dtype=torch.int32)
    window = torch.where(stage.text, -1, torch.where(stage.segment >= 0, places, -2)).to(torch.int32)
    merged = torch.zeros_like(stage.text)
    for row, picture in shrinking(stage):
        tokens = (row, slice(picture.start, picture.stop))
        joins, head = _runs(
            stage.hidden[tokens], stage.within[tokens], _patches(picture), picture.tokens - picture.keep
        )
        merged[tokens] = joins
        window[tokens] = picture.start + head
    done = ops.merge_pairs(
        stage.hidden,
        window,
        merge=stage.hidden.shape[1],
        metric=torch.ones_like(
            stage.hidden[..., :1]
        ),  # a window has one destination: nothing is to be compared
        source=merged,
        align="right",
        capacity=stage.capacity,
    )
    return Reduced(done.selection, done.x)


def _runs(hidden: Tensor, within: Tensor, patches: int, merges: int) -> tuple[Tensor, Tensor]:
    """Which of a video's tokens merge (n,) bool, and the token that each becomes part of (n,) int32.

    hidden (n, C), within (n,) int32: index among the video's original tokens, frame by frame.
    """
    order = (within % patches).argsort(stable=True)  # patch by patch, in each frame by frame
    patch, states = within[order] % patches, hidden[order].float()
    likeness = functional.cosine_similarity(states[1:], states[:-1], dim=-1)
    follows = torch.where(patch[1:] == patch[:-1], likeness, -torch.inf)
    scores = torch.full_like(states[:, 0], -torch.inf)
    scores[order[1:]] = follows
    chosen = ops.select(scores[None], keep=merges).inverse[0] >= 0
    along = torch.arange(order.shape[0], device=order.device)
    first = torch.where(chosen[order], 0, along).cummax(dim=0).values
    head = torch.empty_like(within)
    head[order] = order[first].to(head.dtype)
    return chosen, head


def FrameFusion(keep: float = 0.3, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """FrameFusion's plan: frames of a video merged, then the least attended tokens dropped; options: see
    :class:`FrameFusionPrefill`, and ``keep_for_later``: :class:`lightvlm.Plan`."""
    return Plan(
        prefill=FrameFusionPrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
