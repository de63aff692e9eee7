"""Eviction from a prompt: what a cache method sees of every layer, and what becomes of its choice.

Each layer is shown to the method right after its attention, and keeps the whole prompt until the last layer has read
it: budgets may depend on all layers. Then one launch moves what stays to the front of every layer's buffer.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .contract.cache import CachePart, PromptChoice, PromptInput, PromptLayer
from .contract.sparse import AttentionPart
from .host import lasting, upload
from .layout import BatchLayout, RowLayout, Run

if TYPE_CHECKING:
    from .cache import CompactCache
    from .plan import Plan
    from .session import Level


def check_eviction(plan: Plan) -> None:
    """Raise a ValueError where two parts of a plan would evict from the prompt."""
    drops = isinstance(plan.prefill, AttentionPart) and plan.prefill.unimportant == "drop"
    if drops and isinstance(plan.cache, CachePart) and plan.cache.evicts_prompt:
        raise ValueError(
            "plan.prefill drops the keys of tokens that did not attend (unimportant='drop'), and plan.cache evicts "
            "from the prompt, too; use one of the two"
        )


class PromptEviction:
    """One prompt under a cache method that evicts from it.

    The last ``drafts`` tokens may be cropped again, or are answers to be rated: they have no say, and all stay. Where a
    row's text after its images is not longer than that, they are taken as part of the prompt.
    """

    def __init__(self, part: CachePart, layout: BatchLayout, layers: int, drafts: int = 0) -> None:
        own_text = all(drafts <= row.trailing_text and drafts < row.tokens for row in layout.rows)
        self.part, self.layers = part, layers
        self.drafts = drafts if own_text else 0
        self._layout = layout
        self._prompt = [row.tokens - self.drafts for row in layout.rows]
        self._seen: dict[int, tuple[PromptLayer, Any]] = {}

    def observe(
        self, index: int, level: Level | None, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> None:
        """Show a layer. query (B, Hq, M, D), key and value (B, Hkv, M, D), as attention gets them; ``level``: what a
        prefill method left of the prompt, None: all."""
        rows = level.rows if level is not None else self._layout.rows
        length = query.shape[2] - self.drafts
        rows = tuple(_without_last(row, self.drafts) for row in rows)
        layer = PromptLayer(index, self.layers, rows, length, self._prompt)
        query, key, value = (x.detach().transpose(1, 2)[:, :length] for x in (query, key, value))
        self._seen[index] = (layer, self.part.observe_prompt(PromptInput(layer, query, key, value, scale)))

    @lasting
    def evict(self, cache: CompactCache) -> bool:
        """Leave in the cache what the method chooses; whether anything went."""
        if len(self._seen) < self.layers:  # the decoder has been told to leave layers out
            return False
        seen = [self._seen[index] for index in range(self.layers)]
        chosen = self.part.choose_prompt(seen)
        moves: dict[int, PromptChoice] = {}
        for (prompt, found), choice in zip(seen, chosen, strict=True):
            layer = cache.layers[prompt.layer]
            if self.part.starts_mass and layer.mass is not None:
                left_out = getattr(layer, "left_out", None)
                _start_mass(layer.mass, found, prompt, left_out)
            if choice is None:
                continue
            merged = None
            if type(self.part).merge_prompt is not CachePart.merge_prompt:
                key, value = (x[:, : prompt.length] for x in layer.buffer())
                merged = self.part.merge_prompt(prompt, choice, key, value)
            if merged is not None:
                _put(layer.key_storage, choice.index, merged[0])
                _put(layer.value_storage, choice.index, merged[1])
            moves[prompt.layer] = self._with_drafts(choice, prompt)
        if moves:
            cache.keep_chosen(moves)
        return bool(moves)

    def _with_drafts(self, choice: PromptChoice, prompt: PromptLayer) -> PromptChoice:
        """The choice, with the drafts behind it."""
        if not self.drafts:
            return choice
        kept = [count + self.drafts for count in choice.kept]
        index = torch.nn.functional.pad(choice.index, (0, self.drafts), value=-1)
        at = torch.arange(index.shape[-1], device=index.device)
        count = upload(choice.kept, index.device).view(-1, *[1] * (index.dim() - 1))
        behind = prompt.length + at - count
        drafts = (at >= count) & (at < count + self.drafts)
        index = torch.where(drafts, behind, index).to(torch.int32)
        return PromptChoice(index, kept, choice.tail + self.drafts)


def _without_last(row: RowLayout, tokens: int) -> RowLayout:
    """A row without so many tokens of the text at its end."""
    if not tokens:
        return row
    last = row.runs[-1]
    return dataclasses.replace(row, runs=(*row.runs[:-1], Run(None, last.tokens - tokens)))


def _start_mass(mass: Tensor, received: Tensor, prompt: PromptLayer, left_out: list[int] | None) -> None:
    """Write what the prompt's tokens have received (B, Hkv, M) where the layer adds up."""
    if not left_out or not any(left_out):
        mass[:, :, : prompt.length] = received
        return
    for row, less in enumerate(left_out):  # pages of padding that the layer left out
        mass[row, :, : prompt.length - less] = received[row, :, less:]


def _put(storage: Tensor, index: Tensor, states: Tensor) -> None:
    """Write states (B, Hkv, M', D) to their places in a buffer (B, N, Hkv, D)."""
    batch, heads = states.shape[:2]
    index = index if index.dim() == 3 else index[:, None].expand(-1, heads, -1)
    # what stands past the count is the first one once more: who writes last does not matter
    past = (index < 0)[..., None]
    at = torch.where(index < 0, index[..., :1], index).long()
    row = torch.arange(batch, device=index.device)[:, None, None]
    head = torch.arange(heads, device=index.device)[:, None]
    storage.index_put_((row, at, head), torch.where(past, states[:, :, :1], states).to(storage.dtype))
