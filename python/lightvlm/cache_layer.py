"""CompactLayer: keys and values of one decoder layer, of which it may hold fewer than it has seen."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .host import upload
from .packed_store import PackedStore

SLACK = 128
"""Free rows that a growing buffer starts with, so that short answers never reallocate."""


class CompactLayer(CacheLayerMixin):
    """Keys and values of one decoder layer. Public attributes:

    key_storage, value_storage (B, capacity, Hkv, D); starts, ends: where each row's keys stand; seen: logical
        length;
    ragged: whether stored and seen tokens differ, that is, whether the 2-D mask no longer applies; tail:
        tokens at the
    end of every row that are certainly consecutive, up to which :meth:`crop` works;
    packed: what left the buffer for segments of fewer bits, or None.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.query_rows = 0
        self.scale: float | None = None
        self.key_storage = self.value_storage = torch.empty(0)
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        if self.capacity is None:  # a fixed buffer keeps its address
            self.key_storage = self.value_storage = torch.empty(0)
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.seen = 0
        self.tail = 0
        self.ragged = False
        self.packed: PackedStore | None = None
        self._queries: list[Tensor] = []
        self._bounds: tuple[Tensor, Tensor] | None = None

    # transformers reads the stored states of a layer through these names
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Stored keys (B, Hkv, N, D), a view; None before the first token."""
        return self.key_storage[:, : max(self.ends)].transpose(1, 2) if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Stored values (B, Hkv, N, D), a view; None before the first token."""
        return self.value_storage[:, : max(self.ends)].transpose(1, 2) if self.is_initialized else None

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first token."""
        return len(self.ends) if self.is_initialized else -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, _, length, _ = key_states.shape
        room = self.capacity if self.capacity is not None else length + SLACK
        if _fits(self.key_storage, key_states, room) and _fits(self.value_storage, value_states, room):
            self.key_storage.zero_()
            self.value_storage.zero_()
        else:
            self.key_storage = _token_major(key_states, room)
            self.value_storage = _token_major(value_states, room)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.starts, self.ends = [0] * batch, [0] * batch
        self.is_initialized = True

    def begin(self, starts: list[int], seen: int, tail: int, ragged: bool) -> None:
        """Say what the tokens just stored are: the first prompt, of
        which this layer may have got only a part."""
        self.starts, self.seen, self.tail, self.ragged = list(starts), seen, tail, ragged
        self._bounds = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, S, D) states; returns all stored ones, (B, Hkv, N, D)."""
        new = key_states.shape[2]
        needed = (max(self.ends) if self.is_initialized else 0) + new
        if self.capacity is not None and needed > self.capacity:
            raise ValueError(f"capacity of the cache is {self.capacity} tokens; this step needs {needed}")
        first = not self.is_initialized
        if first:
            self.lazy_initialization(key_states, value_states)
        elif key_states.shape[0] != len(self.ends):
            raise ValueError(f"key_states has {key_states.shape[0]} rows, the cache has {len(self.ends)}")
        if needed > self.key_storage.shape[1]:
            self._grow(needed)
        # detached: a cache that is written again and again must not hold on to every step's graph
        keys, values = key_states.detach().transpose(1, 2), value_states.detach().transpose(1, 2)
        if len(set(self.ends)) == 1:
            self.key_storage[:, needed - new : needed] = keys
            self.value_storage[:, needed - new : needed] = values
        else:
            for row, end in enumerate(self.ends):
                self.key_storage[row, end : end + new] = keys[row]
                self.value_storage[row, end : end + new] = values[row]
        self.ends = [end + new for end in self.ends]
        self.seen += new
        self.tail += new
        self._bounds = None
        if first:  # the states at hand are what was stored, and lie as the attention kernel likes them
            return key_states, value_states
        return self.keys, self.values  # type: ignore[return-value]

    def _grow(self, needed: int) -> None:
        room = max(needed, 2 * self.key_storage.shape[1])
        self.key_storage = _token_major(self.key_storage.transpose(1, 2), room, copy=max(self.ends))
        self.value_storage = _token_major(self.value_storage.transpose(1, 2), room, copy=max(self.ends))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """starts and ends as (B,) int32 on the device."""
        if self._bounds is None:
            both = upload([self.starts, self.ends], self.key_storage.device)
            self._bounds = (both[0], both[1])
        return self._bounds

    def remember_queries(self, query: Tensor, scale: float | None) -> None:
        """Keep the last ``query_rows`` query rows of (B, S, Hq, D);
        they score the keys at the next compaction."""
        if not self.query_rows:
            return
        self.scale = scale
        self._queries.append(query[:, -self.query_rows :].clone())
        del self._queries[: -self.query_rows]

    def recent_queries(self) -> Tensor:
        """The last ``query_rows`` queries (B, W, Hq, D), oldest first; fewer where fewer were remembered."""
        if not self._queries:
            return self.key_storage.new_empty(len(self.ends), 0, 1, self.key_storage.shape[-1])
        return torch.cat(self._queries, dim=1)[:, -self.query_rows :]

    def compacted(self, kept: list[int], tail: int) -> None:
        """Say that the rows were moved to the front of the buffer and ``kept`` of each remain."""
        self.starts, self.ends = [0] * len(kept), list(kept)
        self.ragged, self.tail = True, min(self.tail, tail, *kept)
        self._bounds = None

    def store(self, packed: PackedStore, key: Tensor, value: Tensor, ends: list[int]) -> None:
        """Say that the prompt is packed, but for its last tokens: key, value (B, R, Hkv, D), of which row b has
        ``ends[b]``. They become the buffer."""
        self.packed = packed
        self.key_storage, self.value_storage = key, value
        self.compacted(ends, min(ends))

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers 5.0 passes the positions of the new tokens where later versions pass their number
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return (max(self.ends) if self.is_initialized else 0) + new, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.capacity is None else self.capacity

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def reset(self) -> None:
        self._clear()

    def check_crop(self, tokens_to_remove: int) -> int:
        """The number of tokens, at most 0, that :meth:`crop` is asked to add; raises where it cannot."""
        if tokens_to_remove > 0:  # older transformers says how many tokens shall be left
            tokens_to_remove = min(0, tokens_to_remove - self.seen)
        if self.is_initialized and -tokens_to_remove > self.tail:
            raise ValueError(
                f"cannot crop {-tokens_to_remove} tokens: only the last {self.tail} are all still in the cache"
            )
        return tokens_to_remove

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, or, where the number is positive, all beyond that many;
        a ValueError where some of them were compacted away."""
        tokens_to_remove = self.check_crop(tokens_to_remove)
        if not self.is_initialized or tokens_to_remove == 0:
            return
        self.ends = [end + tokens_to_remove for end in self.ends]
        self.seen += tokens_to_remove
        self.tail += tokens_to_remove
        if self._queries:
            self._queries = [self.recent_queries()[:, :tokens_to_remove]]
        self._bounds = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    @property
    def rows_differ(self) -> bool:
        """Whether the rows' keys stand at different places."""
        counts = self.packed.counts if self.packed is not None else self.starts
        return len(set(zip(self.starts, self.ends, counts, strict=True))) > 1

    def batch_select_indices(self, indices: Tensor, rows: list[int] | None = None) -> None:
        """Take the rows ``indices`` (B',) of the batch; ``rows``: the same on the host, where it is known."""
        if not self.is_initialized:
            return
        if rows is None:  # where no row differs there is no need to ask the device
            rows = indices.tolist() if self.rows_differ else [0] * len(indices)
        on_device = indices.to(self.key_storage.device)
        used = max(self.ends)
        keys = self.key_storage[:, :used].index_select(0, on_device)
        values = self.value_storage[:, :used].index_select(0, on_device)
        if len(rows) != len(self.ends):  # otherwise the buffers stay where they are
            self.key_storage = _buffer(keys, len(rows), *self.key_storage.shape[1:])
            self.value_storage = _buffer(values, len(rows), *self.value_storage.shape[1:])
        self.key_storage[:, :used], self.value_storage[:, :used] = keys, values
        self.starts = [self.starts[row] for row in rows]
        self.ends = [self.ends[row] for row in rows]
        if self.packed is not None:
            self.packed.select_rows(on_device, rows)
        self._queries = [query.index_select(0, on_device) for query in self._queries]
        self._bounds = None

    def shrink(self, slack: int = 0) -> None:
        """Give the free rows of a growing buffer back, all but ``slack``."""
        if self.is_initialized and self.capacity is None:
            used = max(self.ends)
            room = min(used + slack, self.key_storage.shape[1])
            self.key_storage = _token_major(self.key_storage.transpose(1, 2), room, copy=used)
            self.value_storage = _token_major(self.value_storage.transpose(1, 2), room, copy=used)

    def bytes_used(self) -> int:
        """Bytes of the keys and values that are valid."""
        tokens = sum(self.ends) - sum(self.starts)
        return tokens * self._bytes_per_token() + self._bytes_packed()

    def bytes_allocated(self) -> int:
        """Bytes of the buffers."""
        return self.key_storage.nbytes + self.value_storage.nbytes + self._bytes_packed()

    def _bytes_packed(self) -> int:
        return self.packed.nbytes if self.packed is not None else 0

    def bytes_full(self) -> int:
        """Bytes that a cache holding every token seen would use."""
        return len(self.ends) * self.seen * self._bytes_per_token() if self.is_initialized else 0

    def _bytes_per_token(self) -> int:
        if not self.is_initialized:
            return 0
        # from shapes alone: this runs for every layer at every token
        width = sum(math.prod(storage.shape[2:]) for storage in (self.key_storage, self.value_storage))
        return width * self.key_storage.element_size()


def _token_major(states: Tensor, room: int, copy: int = 0) -> Tensor:
    """A buffer (B, room, H, D) for states (B, H, S, D), with their first ``copy`` tokens in it."""
    batch, heads, _, width = states.shape
    buffer = _buffer(states, batch, room, heads, width)
    buffer[:, :copy] = states[:, :, :copy].detach().transpose(1, 2)
    return buffer


def _buffer(like: Tensor, *shape: int) -> Tensor:
    """Zeros: a masked key still meets a weight of 0, which what lies about in fresh memory need not survive."""
    with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _fits(buffer: Tensor, states: Tensor, room: int) -> bool:
    """Whether a buffer of an earlier use is what :func:`_token_major` would make."""
    batch, heads, _, width = states.shape
    same = buffer.dtype == states.dtype and buffer.device == states.device
    return same and buffer.shape == (batch, room, heads, width)
