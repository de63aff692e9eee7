"""LOOK-M: text stays before images do, and what goes is merged into what stays.

Source: Wan et al., "LOOK-M", arXiv 2406.18139, and its code. A token's score is the attention that it received from all
tokens of the prompt, added up, head by head. Of the budget (published: a fifth of the prompt) half are the last tokens;
then comes text, by score, and where there is room for all of it, image tokens by score. Each token that goes is given
to the most similar one that stays, by the cosine of their keys; values follow their keys. With n tokens e given to k:

    pivot      k' = (k + sum_e (k + e) / 2) / (n + 1)
    average    k' = (k + sum_e e) / (n + 1)

Generated tokens all stay. Where we deviate: the code keeps all text, even beyond the budget; here the budget holds, as
in the paper's equations. Heads that share keys choose together. A row keeps at least ``min_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext.ops import Selection

from ..host import upload
from ..layout import RowLayout
from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import PromptCachePart, PromptChoice, PromptInput, PromptLayer, check_keep
from .eviction import LEAST, budget, choose_places, received, share_of


@register_part("cache", "look_m")
@dataclass(frozen=True)
class LookMCache(PromptCachePart):
    """Keep text first, then what received most attention, and merge the rest into it."""

    per_head = True

    keep: float = option(0.2, "share of the prompt's tokens that stay")
    recent_share: float = option(0.5, "share of the budget for the last tokens", low=0, high=1)
    merge: Literal["pivot", "average"] = option(
        "pivot",
        "what is merged counts half, or as much as what stays",
        choices=("pivot", "average"),
    )
    min_tokens: int = option(LEAST, "tokens of a row that stay at least", low=1)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def observe_prompt(self, prompt: PromptInput) -> Tensor:
        return received(prompt)

    def choose_prompt(self, seen: Sequence[tuple[PromptLayer, Tensor]]) -> list[PromptChoice | None]:
        images: dict[
            tuple[RowLayout, ...], Tensor
        ] = {}  # layers between two stages of a prefill part have the same
        return [self._choose(prompt, scores, images) for prompt, scores in seen]

    def _choose(
        self, prompt: PromptLayer, scores: Tensor, images: dict[tuple[RowLayout, ...], Tensor]
    ) -> PromptChoice | None:
        kept = [
            min(tokens, budget(before, self.keep, 0, self.min_tokens))
            for tokens, before in zip(prompt.tokens, prompt.prompt, strict=True)
        ]
        if kept == prompt.tokens:
            return None
        recent = [share_of(count, self.recent_share) for count in kept]
        # Text before the recent tokens: whether there is room for all of it, the host knows.
        old_text = [
            sum(at < row.tokens - last for at in row.text_positions())
            for row, last in zip(prompt.rows, recent, strict=True)
        ]
        free = [count - last - text for count, last, text in zip(kept, recent, old_text, strict=True)]
        fits = [left >= 0 for left in free]
        free = [left if left >= 0 else left + text for left, text in zip(free, old_text, strict=True)]
        device = scores.device
        if prompt.rows not in images:
            images[prompt.rows] = prompt.images(device)
        image = images[prompt.rows].to(device)  # layers may be on several devices
        start, last = upload([prompt.starts, recent], device)[..., None]
        at = torch.arange(prompt.length, device=device)
        inside, ending = at >= start, at >= prompt.length - last
        all_text = upload(fits, device, torch.bool)[:, None]
        forced = inside & (ending | (all_text & ~image))
        candidates = inside & ~ending & (image == all_text)
        index = choose_places(scores, free, forced, candidates, max(kept), True)
        return PromptChoice(index, kept, min(recent))

    def merge_prompt(
        self, prompt: PromptLayer, choice: PromptChoice, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, heads = key.shape[:3]
        device = key.device
        valid = torch.arange(tokens, device=device) >= upload(prompt.starts, device)[:, None]
        group = torch.where(valid, 0, -1).to(torch.int32).repeat_interleave(heads, dim=0)
        count = upload(choice.kept, device).repeat_interleave(heads)
        index = choice.index.flatten(0, 1)
        chosen = Selection(index, count, torch.empty(len(group), tokens, dtype=torch.int32, device=device))
        ones = torch.ones(group.shape, device=device)
        metric = key.transpose(1, 2).flatten(0, 1)  # (B * Hkv, M, D)
        merged = []
        for states in (key, value):
            rows = states.transpose(1, 2).flatten(0, 1)
            mean: Tensor = ops.merge_tokens(rows, chosen, ones, group, metric=metric)
            if self.merge == "pivot":  # half of what stays, half of the mean: the same formula
                own = ops.gather_tokens(rows, index, count)
                mean = ((own.float() + mean.float()) / 2).to(mean.dtype)
            merged.append(mean.view(batch, heads, *mean.shape[1:]))
        return merged[0], merged[1]


def LookM(keep: float = 0.2, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """A plan that evicts from the prompt and merges as LOOK-M does.

    Options: see :class:`LookMCache`, and ``keep_for_later``: :class:`lightvlm.Plan`.
    """
    return Plan(
        cache=LookMCache(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
