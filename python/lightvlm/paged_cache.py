"""PagedCompactCache: a CompactCache in pages, so that what compaction frees is free for other requests."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lightvlm_ext import OutOfPages

from .block_rows import missing
from .buffers import check_rows
from .cache import CompactCache
from .cache_file import load_cache
from .contract.cache import CachePart
from .host import upload
from .paged_conversion import to_pages
from .paged_layer import PagedLayer
from .pages import KVPages
from .paging import move_pages, reserve

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lightvlm_ext.ops import Selection

    from .cache_layer import CompactLayer
    from .contract.cache import PromptChoice
    from .plan import Plan
from .positions import select_rows


class PagedCompactCache(CompactCache):
    """A KV cache in pages that it shares with other caches; pass it as ``past_key_values``.

    A layer has pages for what it stores: one that was born short, or was compacted, has fewer, and the rest is there
    for others. Copies (:meth:`fork`, beams, several sequences of a prompt) share pages until one of them writes. On an
    attached model attention reads the pages; on another, keys and values are laid out for as long as a layer takes.

    Args:
        config: the model's configuration (of the whole VLM or of its text decoder).
        plan: as of a CompactCache, without a precision part: pages hold 16 or 32 bits.
        pages: where keys and values go.

    A step that needs more pages than are free raises ``lightvlm_ext.OutOfPages`` and changes nothing; where a plan
    compacts, it is compacted before, at the end of the step before. An empty cache whose prompt does not fit is empty
    afterwards. Pages go back at :meth:`release`, and when the cache is dropped.
    Which rows reordering takes is read from the device: the tables are the host's.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; pages for heads of another shape; a plan with a precision
            part; a decoder with layers that are not full attention.
    """

    def __init__(self, config: PretrainedConfig, plan: Plan | None = None, *, pages: KVPages) -> None:
        if not isinstance(pages, KVPages):
            raise TypeError(f"pages must be a lightvlm.KVPages, got {type(pages).__name__}")
        self.pages = pages
        self.layers: list[PagedLayer]  # type: ignore[assignment]
        super().__init__(config, plan)
        if pages.heads != self.heads:
            raise ValueError(
                "pages hold {} heads of {} channels, config says {} of {}".format(*pages.heads, *self.heads)
            )

    def _new_layer(self, capacity: int | None) -> CompactLayer:
        return PagedLayer(self.pages)

    def _set_plan(self, plan: Plan) -> None:
        if plan.precision is not None:
            raise ValueError(
                "plan.precision packs the cache, and pages hold 16 or 32 bits; use a CompactCache"
            )
        if isinstance(plan.cache, CachePart) and plan.cache.per_head:
            raise ValueError(
                "plan.cache keeps other tokens in every head, and a page holds all heads of its tokens; use "
                "per_head=False, or a CompactCache"
            )
        super()._set_plan(plan)

    def fork(self) -> Self:
        """A second cache that holds the same and goes its own way; also what ``copy.deepcopy`` makes."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = [layer.fork() for layer in self.layers]
        other.leftpad, other.transcript = list(self.leftpad), copy.deepcopy(self.transcript)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()

    @classmethod
    def load(cls, path: str | Path, config: PretrainedConfig, *, pages: KVPages) -> Self:  # type: ignore[override]
        """Read what :meth:`save` wrote, of this kind of cache or a CompactCache, into pages.

        Raises:
            ValueError: the file is of another kind, another format, or of another model or dtype; or its plan packs.
            OutOfPages: too few pages are free.
        """
        found = load_cache(path, config, capacity=None, device=pages.device)
        cache = cls(config, found.plan, pages=pages)
        to_pages(found.layers, cache.layers, follows_mask=not found.leftpad)
        cache.leftpad, cache.since_compaction = found.leftpad, found.since_compaction
        cache.transcript, cache.position_shifts = found.transcript, found.position_shifts
        return cache

    def release(self) -> None:
        """Give all pages back. The cache is empty then, and can be used again."""
        self.reset()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        first = self.get_seq_length(layer_idx) == 0
        filled = [layer for layer in self.layers if layer.is_initialized]
        if layer_idx == 0 and not first and (self.attached or self.complete):
            self.layers[0].check_room(key_states, value_states)
            reserve(filled, key_states.shape[2])
        try:
            stored = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except OutOfPages:
            if first:  # layers before this one have got their part of the prompt
                said = self.transcript
                self.reset()
                if said is not None and said.unfinished:  # of a conversation, of which this was not all
                    self.transcript = said
            raise
        layer = self.layers[layer_idx]
        reads_itself = layer.ragged and self.attached
        return stored if first or reads_itself else layer.whole()

    def keep_only(self, selections: dict[int, Selection], tail: int) -> None:
        """As of a CompactCache, right after a prompt."""
        here = {}  # the places are those of the prompt, of whose padding the layers left whole pages out
        for index, selection in selections.items():
            left_out = upload(self.layers[index].left_out, self.pages.device)
            here[index] = selection._replace(index=selection.index - left_out[:, None])
        super().keep_only(here, tail)

    def keep_chosen(self, choices: dict[int, PromptChoice]) -> None:
        """As of a CompactCache; the places are those of the prompt, too."""
        here = {}
        for index, choice in choices.items():
            left_out = upload(self.layers[index].left_out, self.pages.device)
            here[index] = dataclasses.replace(choice, index=choice.index - left_out[:, None])
        super().keep_chosen(here)

    def _move(self, layers: Sequence[CompactLayer], index: list[Tensor], count: list[Tensor]) -> None:
        move_pages([layer for layer in layers if isinstance(layer, PagedLayer)], index, count)

    @property
    def _full(self) -> bool:
        """Whether the next token finds no page, and compaction could make room without copies."""
        rows = sum(len(layer.ends) for layer in self.layers)
        if self.pages.available >= rows:  # a page for each row will do
            return False
        blocks = [layer.blocks for layer in self.layers]
        next_tokens = [[(end, end + 1) for end in layer.ends] for layer in self.layers]
        if missing(blocks, next_tokens) <= self.pages.available:
            return False
        return max(self.pages.pool.refcount([page for own in blocks for page in own.ids]), default=0) == 1

    def lacks_room(self, tokens: int) -> str | None:
        # as if no layer were born short: which are, shows only while they are filled
        needed = sum(len(layer.ends) for layer in self.layers) * self.pages.blocks(tokens)
        own = Counter(page for layer in self.layers for page in layer.blocks.ids)
        users = self.pages.pool.refcount(list(own))
        alone = sum(count == number for count, number in zip(own.values(), users, strict=True))
        if needed > self.pages.available + alone:
            return "too few pages are left to read the conversation anew"
        return None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.get_seq_length() == 0:
            self.leftpad = []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows ``indices`` (B',) of the batch, in that order, sharing their pages; waits for the device.

        Raises:
            ValueError: indices is not a vector of integers, or names a row that is not there.
        """
        check_rows(indices, self.layers[0].batch_size)
        rows = indices.tolist()
        check_rows(torch.tensor(rows, dtype=torch.int64), self.layers[0].batch_size)
        for layer in self.layers:
            layer.batch_select_indices(indices, rows)
        if self.leftpad:
            self.leftpad = [self.leftpad[row] for row in rows]
        self.position_shifts = select_rows(self.position_shifts, indices)
        if self.transcript is not None:
            self.transcript.select_rows(indices)

    @property
    def kv_bytes_allocated(self) -> int:
        """Bytes of the pages that this cache uses, one that its rows share counted once, and of what it keeps beside
        them. Pages that it shares with other caches are counted in each."""
        return super().kv_bytes_allocated
