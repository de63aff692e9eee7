"""LLaVA-PruMerge (arXiv 2403.15388): the class token's choice, each token with its neighbours' content added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightvlm_ext import ops

from ..host import upload
from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import Picture, PrefillPart, Reduced, Stage, StageInput, TowerProbe, check_keep, numbering

PLAIN_KEEP, PLUS_KEEP = 0.055, 0.25
"""Average shares that the paper reports for PruMerge and PruMerge+ on LLaVA 1.5."""


@register_part("prefill", "prumerge")
@dataclass(frozen=True)
class PruMergePrefill(PrefillPart):
    """Tokens by the class token's attention a; each gets its nearest neighbours added, and one stands for what is left.

    Of an image's n tokens to keep, n - 1 are chosen: those with the highest a; with ``plus`` (PruMerge+) only a quarter
    of them, and the others uniformly spaced over the tokens not chosen yet. Chosen token i becomes

        x_i + sum over its ``neighbours`` nearest tokens j of a_j x_j,

    nearest by the cosine of their keys among all other tokens of the image, chosen or not, ties to the lower index;
    there is no division. The n-th token is the sum of a_j x_j over all tokens that are not chosen. An image of which a
    single token stays has no such token.

    That is the authors' code, but for: The number of tokens is ``keep``, the same share of each image, where the paper
    counts the outliers of a (above the third quartile by 1.5 interquartile ranges), since here counts are known before
    the decoder runs. Attention is the layer's own, mean over its heads, and keys are the mean over heads, where the
    code takes all heads as one. Tokens are merged at the decoder's input, after the projector instead of before it, and
    stand in reading order, the extra one at the place of the last token that is not chosen. The code's spaced tokens
    are three for each chosen one, less those chosen already; the quarter is that without the overlap. Where the model
    joins patches into a token, a and keys are means over them.
    """

    keep: float = option(PLAIN_KEEP, "share of each image's tokens that are left")
    plus: bool = option(False, "PruMerge+: three quarters of the tokens are uniformly spaced")
    neighbours: int = option(32, "tokens that are added to each chosen one", low=0)
    tower_layer: int = option(-1, "layer of the vision tower whose attention decides")
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
        hidden, kept = stage.hidden.clone(), stage.text | (stage.segment >= 0)
        for b, row in enumerate(stage.pictures):
            for picture in row:
                if picture.keep < picture.tokens:  # an image that loses nothing is left alone
                    part = slice(picture.start, picture.stop)
                    hidden[b, part], kept[b, part] = self._merge(
                        # copies, so that results do not hang on where in memory a row stands
                        stage.hidden[b, part].clone(),
                        stage.tower_scores[b, part].clone(),
                        stage.tower_keys[b, part].clone(),
                        picture,
                    )
        zeros = torch.zeros_like(stage.tower_scores)
        selection = ops.select(zeros, keep=0, forced=kept, capacity=stage.capacity)
        return Reduced(selection, ops.gather_tokens(hidden, selection.index, selection.count, align="right"))

    def _merge(self, x: Tensor, score: Tensor, key: Tensor, picture: Picture) -> tuple[Tensor, Tensor]:
        """An image's tokens (t, C) with those that stay changed, and which do (t,)."""
        extra = picture.keep > 1
        chosen = self._choose(score, replace(picture, keep=picture.keep - extra))
        index = chosen.index[0].long()
        device, tokens = x.device, picture.tokens
        places = torch.arange(tokens, device=device)
        dropped = chosen.inverse[0] < 0
        unit = normalize(key, dim=-1)
        near = ops.select(
            unit[index] @ unit.T, keep=min(self.neighbours, tokens - 1), candidates=places != index[:, None]
        )
        weights = (near.inverse >= 0) * score + (places == index[:, None])
        if extra:
            weights = torch.cat([weights, (dropped * score)[None]])
            index = torch.cat([index, torch.where(dropped, places, -1).amax(keepdim=True)])
        merged = (weights @ x.float()).to(x.dtype)
        return x.index_copy(0, index, merged), (~dropped).index_fill(0, index, True)

    def _choose(self, score: Tensor, picture: Picture) -> ops.Selection:
        """The ``keep`` tokens that are chosen by their score (t,), and with ``plus`` by their place."""
        if not self.plus:
            return ops.select(score[None], keep=picture.keep)
        most = max(1, (picture.keep + 2) // 4)
        top = ops.select(score[None], keep=most).inverse >= 0
        rest, spaced = picture.tokens - most, picture.keep - most
        ranks = [number * rest // spaced for number in range(spaced)]
        wanted = torch.zeros(rest, dtype=torch.bool)
        wanted[ranks] = True
        rank = (~top).cumsum(1) - 1
        among = upload(wanted, score.device, torch.bool)[rank.clamp_min(0)]
        return ops.select(score[None], keep=0, forced=top | (~top & among), capacity=picture.keep)


def PruMerge(
    keep: float | None = None,
    *,
    plus: bool = False,
    positions: Literal["keep", "renumber", "renumber_prompt"] = "renumber",
    keep_for_later: KeepForLater = "offload",
    **options: object,
) -> Plan:
    """A plan that keeps what the vision tower's class token attends to, with the content of similar tokens added.

    Args:
        keep: tokens left of each image over its tokens, in (0, 1]; 1 keeps all. None: the paper's averages, 0.055, and
            0.25 with ``plus``.
        plus: PruMerge+, which also keeps uniformly spaced tokens.
        positions: see :attr:`PrefillPart.positions`; the default numbers tokens as LLaVA numbers a shorter prompt.
        keep_for_later: see :class:`lightvlm.Plan`.   options: see :class:`PruMergePrefill`.

    Raises:
        ValueError, TypeError: an option out of range; the message names it.
    """
    if keep is None:
        keep = PLUS_KEEP if plus else PLAIN_KEEP
    part = PruMergePrefill(keep=keep, plus=plus, positions=positions, **options)  # type: ignore[arg-type]
    return Plan(prefill=part, keep_for_later=keep_for_later)
