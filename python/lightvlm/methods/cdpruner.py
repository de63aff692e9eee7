"""CDPruner: image tokens that are diverse and relevant to the prompt, by a conditional determinantal point process.

Source: Zhang et al., "Beyond Attention or Similarity" (CDPruner), arXiv 2506.10967, section 3; the greedy inference is
that of Chen, Zhang, Zhou, arXiv 1709.05135, algorithm 1.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import Picture, PrefillPart, Reduced, Stage, StageInput, check_keep, drop, pyramid_stages
from .places import select_marked


@register_part("prefill", "cdpruner")
@dataclass(frozen=True)
class CDPrunerPrefill(PrefillPart):
    """Keep the image tokens whose kernel has the largest determinant, found greedily, before the decoder.

    Of each image, with L the cosines of its tokens' input embeddings and r their relevance to the prompt, scaled to
    0 ... 1 in the image, the kernel is diag(r) L diag(r). Each step takes the token that adds most to the log
    determinant; ties go to the lower index. Where all tokens are equally relevant, r is 1. Once no token adds anything
    (as many are chosen as embeddings have dimensions) the lower index decides.

    What differs. The paper measures relevance with CLIP's text tower, and without one with the language model's text
    embeddings. Models of transformers carry no text tower, so here r is always the cosine of a token's input embedding
    with those of the prompt's text tokens, the mean over all of them. With CLIP's towers, the authors' code negates
    that cosine before it is scaled; the paper does not, and is followed.
    """

    keep: float = option(0.111, "share of each image's tokens; 64 of 576 is published")
    layer: int = option(0, "reduce at the input of this layer", low=0)
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return pyramid_stages(layers, self.keep, (self.layer,), None, lambda depth: (self.layer,))

    def reduce(self, stage: StageInput) -> Reduced:
        unit = functional.normalize(stage.hidden.float(), dim=-1)
        asking = stage.text if stage.question is None else stage.question
        prompt = (unit * asking[..., None]).sum(dim=1) / asking.sum(dim=1).clamp_min(1)[:, None]
        relevance = (unit @ prompt[..., None])[..., 0]
        marked = torch.zeros_like(stage.text)
        for alike in _groups(stage):
            places = [(row, slice(picture.start, picture.stop)) for row, picture in alike]
            features = torch.stack([unit[place] for place in places])
            weight = _scaled(torch.stack([relevance[place] for place in places]))
            for place, chosen in zip(
                places, greedy_map(features * weight[..., None], alike[0][1].keep), strict=True
            ):
                marked[place] = chosen
        return drop(stage, select_marked(stage, marked))


def _groups(stage: StageInput) -> list[list[tuple[int, Picture]]]:
    """Images with their rows, those of equal size and count together: they take their steps together."""
    groups: dict[tuple[int, int], list[tuple[int, Picture]]] = defaultdict(list)
    for row, pictures in enumerate(stage.pictures):
        for picture in pictures:
            groups[picture.tokens, picture.keep].append((row, picture))
    return list(groups.values())


def _scaled(relevance: Tensor) -> Tensor:
    """relevance (G, n) brought to 0 ... 1 in each row; 1 where all are equal."""
    low, high = relevance.aminmax(dim=1, keepdim=True)
    return torch.where(high > low, (relevance - low) / (high - low), 1.0)


_ROUNDING = 1e-6
"""Shares of a token's own kernel value that are no more than what fp32 leaves of nothing."""


def greedy_map(features: Tensor, keep: int) -> Tensor:
    """Greedy choice of ``keep`` rows whose Gram matrix has the largest determinant.

    features: (G, n, C) float32, G problems at once; entry (i, j) of a kernel is the product of rows i and j, which is
        computed when it is needed: no n x n matrix is kept.

    Returns (G, n) bool, ``keep`` of them (all where there are fewer) True in each row.
    """
    problems, tokens, _ = features.shape
    own = features.square().sum(dim=-1)
    gain = own.clone()
    chosen = torch.zeros_like(gain, dtype=torch.bool)
    # Row t of the Cholesky factor: what each token shares with the t-th choice beyond what it shares with those before.
    factor = features.new_zeros(problems, min(keep, tokens), tokens)
    for step in range(min(keep, tokens)):
        best = gain.argmax(dim=1, keepdim=True)
        left = gain.gather(1, best)
        kernel = features @ features.gather(1, best[..., None].expand(-1, -1, features.shape[-1])).mT
        before = factor[:, :step]
        shared = before.mT @ before.gather(2, best[:, None].expand(-1, step, -1))
        new = torch.where(left > 0, (kernel - shared)[..., 0] / left.sqrt(), 0.0)
        factor[:, step] = new
        chosen.scatter_(1, best, True)
        gain = gain - new.square()
        gain = torch.where(gain > _ROUNDING * own, gain, 0.0).masked_fill(chosen, -torch.inf)
    return chosen


def CDPruner(keep: float = 0.111, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """CDPruner's plan: diverse and relevant image tokens, chosen before the decoder; options: see
    :class:`CDPrunerPrefill`, and ``keep_for_later``: :class:`lightvlm.Plan`."""
    return Plan(
        prefill=CDPrunerPrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
