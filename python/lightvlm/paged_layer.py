"""PagedLayer: a CompactLayer whose tokens stand in pages that it shares with other layers and other caches.

Row b's token n lies in page ``blocks.rows[b][n // page_size]``, at n % page_size; which tokens are valid,
``starts`` and ``ends`` say, as in a buffer. A page that anyone else uses is never written.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from lightvlm_ext import OutOfPages
from lightvlm_ext.ops import KVSegment, PackedKV

from .block_rows import BlockRows
from .buffers import check_rows
from .cache_layer import CompactLayer
from .host import upload
from .new_token import NewToken
from .paged_conversion import to_buffer
from .pages import KVPages
from .paging import reserve, slots
from .stored_layer import SLACK


class PagedLayer(CompactLayer):
    """Keys and values of one decoder layer in pages. Attributes as of CompactLayer, but:

    key_storage, value_storage (P, page_size, Hkv, D): all pages.   blocks: which of them are this layer's.
    left_out: tokens of padding that each row of the prompt had before its first page.
    ragged: in a layer that an attached model filled, always: attention follows the block table.
    """

    def __init__(self, pages: KVPages) -> None:
        self.pages = pages
        self.blocks = BlockRows(pages)
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.key_storage, self.value_storage = self.pages.key_pages, self.pages.value_pages
        self.blocks.release()
        self.left_out: list[int] = []
        self._slots: Tensor | None = None
        self._bounds_to_come: tuple[Tensor, Tensor] | None = None

    def fork(self) -> Self:
        """A second layer that holds the same; their pages are shared until one of the two writes."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.blocks = self.blocks.fork()
        with torch.inference_mode(False):
            other.mass = self.mass.clone() if self.mass is not None else None
        other._queries, other._slots = list(self._queries), None
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()

    # -- writing

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.starts, self.ends = [0] * batch, [0] * batch
        self.blocks.start(batch)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, S, D) states, and return them: attention reads the pages (:meth:`segments`,
        :meth:`whole`).

        Raises:
            OutOfPages: too few pages are free; nothing has changed then.
        """
        self.settle()
        self.check_room(key_states, value_states)
        first = not self.is_initialized
        if first:
            self.lazy_initialization(key_states, value_states)
        try:
            self._reserve(key_states.shape[2])
        except OutOfPages:
            if first:
                self._clear()
            raise
        self._write(key_states, value_states)
        self._count(key_states.shape[2])
        return key_states, value_states

    def announce(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """As of a CompactLayer.

        Raises:
            OutOfPages: too few pages are free; nothing has changed then.
        """
        self.settle()
        self.check_room(key_states, value_states)
        self._reserve(1)
        starts, before = self.bounds()
        self._count(1)
        self.waiting = NewToken(key_states.detach(), value_states.detach(), before, starts)
        return key_states, value_states

    def write_waiting(self) -> tuple[Tensor, Tensor]:
        waiting, self.waiting = self.waiting, None
        assert waiting is not None
        ends = zip(self.blocks.rows, self.ends, strict=True)
        places = [place for row, end in ends for place in slots(row, end - 1, end, self.pages.page_size)]
        self._slots = upload(places, self.pages.device, torch.int64)
        self._write(waiting.key, waiting.value)
        self._slots = None
        return waiting.key, waiting.value

    def _reserve(self, new: int) -> None:
        """Pages for so many tokens more of each row, unless that was done for all layers at once."""
        if self._slots is None or len(self._slots) != new * len(self.ends):
            reserve([self], new)

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self._slots is not None
        for storage, states in ((self.key_storage, key_states), (self.value_storage, value_states)):
            rows = states.detach().transpose(1, 2).reshape(-1, *storage.shape[2:])
            storage.view(-1, *storage.shape[2:]).index_copy_(0, self._slots, rows)

    def _count(self, new: int) -> None:
        self.ends = [end + new for end in self.ends]
        self.seen += new
        self.tail += new
        self._bounds, self._slots = self._bounds_to_come, None
        self._fit_mass()

    def check_room(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise a ValueError unless (B, Hkv, S, D) states fit the pages and what is stored."""
        super().check_room(key_states, value_states)
        if not self.is_initialized:
            self._check_kind(key_states, value_states)
        if key_states.device != self.pages.device:
            raise ValueError(f"key_states is on {key_states.device}, the pages are on {self.pages.device}")

    def begin(self, starts: list[int], seen: int, tail: int, ragged: bool) -> None:
        """As of a CompactLayer; whole pages of padding are given up."""
        super().begin(starts, seen, tail, ragged)
        self.ragged = True  # pages are no tensor that another attention could read
        whole = [start // self.pages.page_size for start in starts]
        self.left_out = [blocks * self.pages.page_size for blocks in whole]
        if any(whole):
            self.blocks.drop_front(whole)
            self.starts = [start - less for start, less in zip(self.starts, self.left_out, strict=True)]
            self.ends = [end - less for end, less in zip(self.ends, self.left_out, strict=True)]

    def _fit_mass(self, slack: int = SLACK) -> None:
        """Room in ``mass`` for every token that there are pages for."""
        if not self.wants_mass or (self.mass is not None and self.mass.shape[2] >= self.blocks.room):
            return
        before = self.mass
        with torch.inference_mode(False):
            room = self.blocks.room + slack
            self.mass = torch.zeros(len(self.ends), self.pages.heads[0], room, device=self.pages.device)
        if before is not None:
            self.mass[:, :, : before.shape[2]] = before

    def in_buffer(self) -> CompactLayer:
        """A copy in a buffer, with its padding where nothing is gone."""
        return to_buffer(self)

    # -- reading

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Stored keys (B, Hkv, N, D), a copy; None before the first token."""
        return self.buffer()[0].transpose(1, 2) if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Stored values (B, Hkv, N, D), a copy; None before the first token."""
        return self.buffer()[1].transpose(1, 2) if self.is_initialized else None

    def buffer(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, N, Hkv, D), gathered from the pages; row b's stand at [starts[b], ends[b])."""
        self.settle()
        table, used = self.blocks.table(), max(self.ends)
        outside = None
        if any(self.starts) or len(set(self.ends)) > 1:
            # Others' tokens may lie there, and a masked key still meets a weight of 0, which NaN survives.
            starts, ends = self.bounds()
            at = torch.arange(used, device=table.device)
            outside = ((at < starts[:, None]) | (at >= ends[:, None]))[..., None, None]
        found = []
        for storage in (self.key_storage, self.value_storage):
            taken = storage.index_select(0, table.reshape(-1))
            taken = taken.view(len(table), -1, *storage.shape[2:])[:, :used]
            found.append(taken if outside is None else taken.masked_fill_(outside, 0))
        return found[0], found[1]

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hkv, seen, D) of a layer from which nothing is gone; zeros where a row has padding that
        is not stored."""
        found = self.buffer()
        if any(self.starts) or set(self.ends) != {self.seen}:
            out = [states.new_zeros(len(states), self.seen, *states.shape[2:]) for states in found]
            for row, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)):
                for to, states in zip(out, found, strict=True):
                    to[row, self.seen - (end - start) :] = states[
                        row, start:end
                    ]  # padding stands on the left
            found = (out[0], out[1])
        return found[0].transpose(1, 2), found[1].transpose(1, 2)

    def segments(self, behind: int = 0) -> list[KVSegment | PackedKV]:
        starts, ends = self.bounds()
        ends = ends - behind if behind else ends
        table = self.blocks.table()
        return [KVSegment(self.key_storage, self.value_storage, lens=ends, leftpad=starts, block_table=table)]

    def masses(self) -> list[Tensor | None] | None:
        return None if self.mass is None else [self.mass[:, :, : self.blocks.room]]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        if self.dropped:
            return super().get_mask_sizes(query_length)
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + new, 0  # what a model that is not attached is given, padding included

    # -- what leaves, and what is shared

    def compacted(self, kept: list[int], tail: int) -> None:
        super().compacted(kept, tail)
        self.blocks.keep(self.ends)

    def crop(self, tokens_to_remove: int) -> None:
        tokens_to_remove = self.check_crop(tokens_to_remove)
        if not self.is_initialized or tokens_to_remove == 0:
            return
        if self.seen + tokens_to_remove <= 0:
            self._clear()
            return
        starts = self.starts
        super().crop(tokens_to_remove)
        self.starts = starts
        self.ends = [max(start, end) for start, end in zip(starts, self.ends, strict=True)]
        self._bounds = self._slots = None
        self.blocks.keep(self.ends)

    @property
    def rows_differ(self) -> bool:
        """Whether it matters which row is taken: each has its own pages."""
        return len(self.ends) > 1

    def batch_select_indices(self, indices: Tensor, rows: list[int] | None = None) -> None:
        """Take the rows ``indices`` (B',) of the batch, sharing their pages; ``rows``: the same on the host, which
        otherwise waits for them."""
        if not self.is_initialized:
            return
        check_rows(indices, len(self.ends))
        self.settle()
        if rows is None:
            rows = indices.tolist()
        self.blocks.select(rows)
        self.starts = [self.starts[row] for row in rows]
        self.ends = [self.ends[row] for row in rows]
        on_device = indices.to(self.pages.device)
        if self.mass is not None:
            with torch.inference_mode(False):
                self.mass = self.mass.index_select(0, on_device)
        self._queries = [query.index_select(0, on_device) for query in self._queries]
        self._bounds = self._slots = None

    def shrink(self, slack: int = 0) -> None:
        """Pages are given back at once; only the mass has room to spare."""
        if self.mass is not None and self.mass.shape[2] > self.blocks.room + slack:
            with torch.inference_mode(False):
                self.mass = self.mass[:, :, : self.blocks.room + slack].clone()

    def bytes_allocated(self) -> int:
        """Bytes of the pages, one that rows share counted once, and of all other tensors."""
        tensors = [*self._queries, *(self._bounds or ())]
        if self.mass is not None:
            tensors.append(self.mass)
        others = sum(tensor.nbytes for tensor in tensors) + self.blocks.table_bytes
        return len(set(self.blocks.ids)) * self.pages.page_bytes + others
