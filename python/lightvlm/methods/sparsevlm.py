"""SparseVLM: image tokens are rated by the text that is about them; the best of what is dropped comes back clustered.

Source: Zhang, Fan, Ma, Zheng, Huang, Cheng, Gudovskiy, Okuno, Nakata, Keutzer, Zhang, "SparseVLM", arXiv 2410.04417,
and its released code.

Raters: of the text behind the image those tokens whose rating, the mean over image tokens v of softmax_t(x_v x_t) on
the decoder's input embeddings, is above the mean. They are chosen once. Score of an image token: its attention from
the raters, mean over raters and heads, in the layer before a stage.

Recycling (version 1): of d dropped tokens the int(0.3 d) + 1 highest, m, are clustered by density peaks around
int(m / 10) + 1 centres, and each cluster's mean stays. ``keep`` counts the clusters, so that fewer tokens than it says
stay as they are. Version 1 numbers tokens anew, while generated ones go on from the whole prompt's end. Version 2.0
has no recycling and keeps positions (``recycle=False, positions="keep"``); its other changes (logits without the rotary
embedding's bias, a choice of heads) are left out.

Where paper and code differ, or we do: counts are like the code's fixed lists (:func:`published`), not the paper's rank
of the attention; by default the share falls geometrically. The code cuts the output of layers 2, 6 and 15 of 32, but
counts tokens ("2 x 576") as if it cut their input; we cut the input, where its lists for 192, 128, 96 and 64 tokens
come to 192.0, 128.6, 96.9 and 64.8; ``layers=(3, 7, 16)`` is where the code cuts. Clusters stand at their centres'
places, which keeps tokens in order; the code puts them behind the image. With several images the raters stand behind
the last, and each image keeps its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    numbering,
    pyramid_stages,
    scaled_layers,
    shrinking,
)

_ALL_TEXT = 1 << 30
_BLOCK = 256


def default_layers(layers: int) -> tuple[int, ...]:
    """2, 6, 15 of 32 layers, and at the same share of others."""
    return scaled_layers(layers, (2, 6, 15), 32)


_COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Tokens of LLaVA-1.5's 576 that the code's lists keep at each stage, clusters not counted, by the mean over layers."""


def published(budget: int) -> dict[str, Any]:
    """``keep`` and ``fractions`` of a published budget: 192, 128, 96 or 64 of 576 tokens, on average over the layers.

    ``SparseVLM(**published(192))`` keeps 300, 200 and 110 tokens, and the clusters of what it drops.

    Raises:
        ValueError: another budget.
    """
    if budget not in _COUNTS:
        raise ValueError(f"budget must be one of {', '.join(map(str, _COUNTS))}, got {budget!r}")
    totals, tokens = [], 576
    for kept in _COUNTS[budget]:
        tokens = kept + _clusters(tokens - kept)
        totals.append(tokens / 576)
    return {"keep": totals[-1], "fractions": tuple(totals)}


def _recycled(dropped: int) -> int:
    """How many of so many dropped tokens go into clusters."""
    return 3 * dropped // 10 + 1 if dropped else 0


def _clusters(dropped: int) -> int:
    """How many clusters become of so many dropped tokens."""
    return _recycled(dropped) // 10 + 1 if dropped else 0


def split(tokens: int, total: int) -> tuple[int, int]:
    """How many of an image's tokens are kept as they are, and how many clusters stand for the rest, ``total`` in all.

    As many are kept as leave room for the clusters of what is dropped; at least one, where that means fewer clusters.
    """
    kept = total
    while kept > 1 and kept + _clusters(tokens - kept) > total:
        kept -= 1
    return kept, total - kept


def cluster(tokens: Tensor, centres: int) -> tuple[Tensor, Tensor]:
    """Clusters of tokens around density peaks (DPC-kNN), as SparseVLM's code makes them.

    Distances are Euclidean over sqrt(C). A token's density is exp(-mean of the squared distances to its k nearest,
    itself one of them), k the number of centres; its reach is the distance to the nearest token of higher density,
    and for the densest the largest distance there is. Centres have the largest density x reach, and every
    token goes to the nearest centre. Of equal densities the lower index is the higher one (the code adds noise).

    Args:
        tokens (m, C): any floating dtype; computed in fp32.
        centres: 1 to m.

    Returns:
        The clusters' means (centres, C) fp32, and their centres' indices (centres,) int64, ascending.
    """
    x = tokens.float()
    # No matrix product: its rounding would put a token at a distance from itself.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    nearest = distance.topk(centres, dim=1, largest=False).values
    density = -nearest.square().mean(1)  # its logarithm: distant states underflow
    order = torch.arange(len(x), device=x.device)
    denser = (density[None] > density[:, None]) | (
        (density[None] == density[:, None]) & (order[None] < order[:, None])
    )
    reach = torch.where(denser, distance, distance.max()).amin(1)
    peaks = (density + reach.log()).sort(descending=True, stable=True).indices
    chosen = peaks[:centres].sort().values
    target = distance[:, chosen].argmin(1)
    numbers = torch.arange(centres, device=x.device)
    target = target.scatter(
        0, chosen, numbers
    )  # a centre stays in its own cluster, whatever lies at its place
    member = (target[None] == numbers[:, None]).float()
    return member @ x / member.sum(1, keepdim=True), chosen


@register_part("prefill", "sparsevlm")
@dataclass(frozen=True)
class SparseVLMPrefill(PrefillPart):
    """Keep the image tokens that text tokens near the image in meaning attend to; recycle some of the others."""

    keep: float = option(0.2, "final share of each image's tokens, clusters included")
    layers: tuple[int, ...] | None = option(
        None, "reduce at the input of these layers; None: by depth, 2, 6, 15 of 32"
    )
    fractions: tuple[float, ...] | None = option(None, "share kept from each stage on; None: geometric")
    recycle: bool = option(True, "cluster the best of what is dropped (version 1)")
    positions: str = numbering("renumber_prompt")
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return pyramid_stages(layers, self.keep, self.layers, self.fractions, default_layers, scored=True)

    @property
    def probe(self) -> Probe:
        return Probe(rows="text", limit=_ALL_TEXT)

    def raters(
        self, hidden: Tensor, pictures: Sequence[Sequence[Picture]], ends: Sequence[int]
    ) -> Tensor | None:
        """Text behind the last image whose rating is above the mean; all of the probe's rows where there is none."""
        rates = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        for row, (images, end) in enumerate(zip(pictures, ends, strict=True)):
            if not images or images[-1].stop >= end:
                continue
            text = hidden[row, images[-1].stop : end].float()
            rating = text.new_zeros(len(text))
            for image in images:
                for block in hidden[row, image.start : image.stop].float().split(_BLOCK):
                    rating += (block @ text.T).softmax(1).sum(0)
            # Where all are equal, all rate, on whichever side of them the mean is rounded to.
            mean = torch.minimum(rating.mean(), rating.max())
            rates[row] = False
            rates[row, images[-1].stop : end] = rating >= mean
        return rates

    def reduce(self, stage: StageInput) -> Reduced:
        assert stage.scores is not None
        if not self.recycle:
            return drop(stage, highest(stage, stage.scores))
        hidden = stage.hidden.clone()
        stays = torch.zeros_like(stage.scores)
        for row, picture in shrinking(stage):
            kept, clusters = split(picture.tokens, picture.keep)
            order = stage.scores[row, picture.start : picture.stop].sort(descending=True, stable=True).indices
            order = order + picture.start
            stays[row].index_fill_(0, order[:kept], 1.0)
            if clusters:
                some = order[kept : kept + _recycled(picture.tokens - kept)].sort().values
                means, centres = cluster(stage.hidden[row, some], clusters)
                hidden[row].index_copy_(0, some[centres], means.to(hidden.dtype))
                stays[row].index_fill_(0, some[centres], 1.0)
        return drop(stage, highest(stage, stays), hidden)


def SparseVLM(keep: float = 0.2, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """SparseVLM's plan: image tokens are rated by related text; the best of what is dropped comes back in clusters.

    Args:
        keep: final tokens of each image over its original tokens, clusters included, in (0, 1]; 1 keeps all. The
            default is near the published budget of 192 of 576 tokens on average over the layers.
        keep_for_later: see :class:`lightvlm.Plan`.
        options: see :class:`SparseVLMPrefill`.

    Raises:
        ValueError, TypeError: an option out of range; the message names it.
    """
    return Plan(
        prefill=SparseVLMPrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
