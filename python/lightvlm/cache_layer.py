"""CompactLayer: keys and values of one decoder layer, of which it may hold fewer than it has seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext.ops import KVSegment, PackedKV

from .buffers import check_rows, zeros
from .packed_store import PackedStore
from .stored_layer import StoredLayer


class CompactLayer(StoredLayer):
    """What attention reads of a StoredLayer, and what leaves it: compaction, packing, crop, rows of a batch."""

    def in_buffer(self) -> CompactLayer:
        """The layer, or one that holds the same in a buffer."""
        return self

    def remember_queries(self, query: Tensor, scale: float | None) -> None:
        """Keep the last ``query_rows`` query rows of (B, S, Hq, D);
        they score the keys at the next compaction."""
        if not self.query_rows:
            return
        self.scale = scale
        if self.live is not None and self.live.stepping:
            return self.live.remember(query)
        self._queries.append(query[:, -self.query_rows :].clone())
        del self._queries[: -self.query_rows]

    def recent_queries(self) -> Tensor:
        """The last ``query_rows`` queries (B, W, Hq, D), oldest first; fewer where fewer were remembered."""
        if self.live is not None and self.live.queries is not None:
            return self.live.queries[:, self.query_rows - self.live.remembered :]
        if not self._queries:
            return self.key_storage.new_empty(len(self.ends), 0, 1, self.key_storage.shape[-1])
        return torch.cat(self._queries, dim=1)[:, -self.query_rows :]

    @property
    def reads_itself(self) -> bool:
        """Whether attention follows what is stored, not the 2-D mask."""
        return self.ragged or self.mass is not None or self.stepping

    def segments(self, behind: int = 0) -> list[KVSegment | PackedKV]:
        """What decode_attention reads: all that is stored, but for each row's last ``behind`` tokens."""
        key, value = self.buffer()
        packed = self.packed.segments() if self.packed is not None else []
        if not behind and self.filled:
            return [*packed, KVSegment(key, value)]
        starts, ends = self.bounds()
        return [*packed, KVSegment(key, value, lens=ends - behind if behind else ends, leftpad=starts)]

    def masses(self) -> list[Tensor | None] | None:
        """Where attention to each segment of :meth:`segments` is added up; None where it is not."""
        if self.mass is None:
            return None
        packed = self.packed.masses() if self.packed is not None else []
        return [*packed, self.mass[:, :, : self.used]]

    def scores(self, rows: int | None) -> Tensor | None:
        """Attention that each token of the buffer received, (B, N) fp32, mean over heads; None where none is known.

        rows: from so many of the last queries, or, None, from all since the prompt (the mass).
        """
        if rows is None:
            return None if self.mass is None else self.mass[:, :, : max(self.ends)].mean(dim=1)
        queries = self.recent_queries()[:, -rows:]
        if queries.shape[1] == 0:
            return None
        start, end = self.bounds()
        return ops.importance(
            queries, self.buffer()[0], scale=self.scale, lens=end, leftpad=start, rows="sum"
        )

    def compacted(self, kept: list[int], tail: int) -> None:
        """Say that the rows were moved to the front of the buffer and ``kept`` of each remain."""
        self.starts, self.ends = [0] * len(kept), list(kept)
        self.ragged, self.tail = True, min(self.tail, tail, *kept)
        self._bounds = None
        self._clear_mass()

    def store(self, packed: PackedStore, key: Tensor, value: Tensor, ends: list[int]) -> None:
        """Say that all is packed but for each row's last tokens: key, value (B, R, Hkv, D), of which row b has
        ``ends[b]``. They become the buffer."""
        last = [
            self.mass[row, :, end - left : end].clone() if self.mass is not None else None
            for row, (end, left) in enumerate(zip(self.ends, ends, strict=True))
        ]
        self.packed = packed
        self.key_storage, self.value_storage = key, value
        self.mass = self._mass_buffer()
        for row, received in enumerate(last):
            if received is not None and self.mass is not None:
                self.mass[row, :, : received.shape[1]] = received
        self.compacted(ends, min(ends))

    @property
    def room_to_pack(self) -> int:
        """Generated tokens that may have to be packed yet, where that is known; 0 elsewhere."""
        assert self.packed is not None
        if self.capacity is not None:
            return max(0, self.capacity - self.packed.counts[0])
        return max(self.ends) + self.live.expected if self.live is not None else 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers 5.0 passes the positions of the new tokens where later versions pass their number
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        if self.packed is not None:  # on a model that is not attached all tokens are given, in their order
            return self.seen + new, 0
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
        self.waiting = None  # it is the last
        self.ends = [end + tokens_to_remove for end in self.ends]
        self.starts = [min(start, end) for start, end in zip(self.starts, self.ends, strict=True)]
        self.seen += tokens_to_remove
        self.tail += tokens_to_remove
        if self._queries:
            self._queries = [self.recent_queries()[:, :tokens_to_remove].clone()]
        self._bounds = None
        self._clear_mass()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    @property
    def rows_differ(self) -> bool:
        """Whether the rows' keys stand at different places."""
        packed = self.packed.counts_by_segment if self.packed is not None else []
        return len(set(zip(self.starts, self.ends, *packed, strict=True))) > 1

    def batch_select_indices(self, indices: Tensor, rows: list[int] | None = None) -> None:
        """Take the rows ``indices`` (B',) of the batch; ``rows``: the same on the host, where it is known."""
        if not self.is_initialized:
            return
        check_rows(indices, len(self.ends))
        self.settle()
        if rows is None:  # where no row differs there is no need to ask the device
            rows = indices.tolist() if self.rows_differ else [0] * len(indices)
        on_device = indices.to(self.key_storage.device)
        used = max(self.ends)
        keys = self.key_storage[:, :used].index_select(0, on_device)
        values = self.value_storage[:, :used].index_select(0, on_device)
        if len(rows) != len(self.ends):  # otherwise the buffers stay where they are
            self.key_storage = zeros(keys, len(rows), *self.key_storage.shape[1:])
            self.value_storage = zeros(values, len(rows), *self.value_storage.shape[1:])
        self.key_storage[:, :used], self.value_storage[:, :used] = keys, values
        if self.mass is not None:
            taken = self.mass[:, :, :used].index_select(0, on_device)
            self.mass = self._mass_buffer()
            assert self.mass is not None
            self.mass[:, :, :used] = taken
        self.starts = [self.starts[row] for row in rows]
        self.ends = [self.ends[row] for row in rows]
        if self.packed is not None:
            self.packed.select_rows(on_device, rows)
        self._queries = [query.index_select(0, on_device) for query in self._queries]
        self._bounds = None

    def shrink(self, slack: int = 0) -> None:
        """Give the free rows of a growing buffer back, all but ``slack``."""
        if self.is_initialized and self.capacity is None:
            self._resize(min(max(self.ends) + slack, self.key_storage.shape[1]))
            if self.packed is not None:
                self.packed.shrink()

    def bytes_used(self) -> int:
        """Bytes of the keys and values that are valid."""
        tokens = sum(self.ends) - sum(self.starts)
        packed = self.packed.bytes_used if self.packed is not None else 0
        return tokens * self._bytes_per_token() + packed

    def bytes_allocated(self) -> int:
        """Bytes of all tensors."""
        own = [self.key_storage, self.value_storage, self._mass, *self._queries, *(self._bounds or ())]
        return sum(tensor.nbytes for tensor in own) + (self.packed.nbytes if self.packed is not None else 0)

    def bytes_full(self) -> int:
        """Bytes that a cache holding every token seen would use."""
        return len(self.ends) * self.seen * self._bytes_per_token() if self.is_initialized else 0

    def _bytes_per_token(self) -> int:
        if not self.is_initialized:
            return 0
        if not self._token_bytes:  # asked of every layer at every token
            width = sum(math.prod(storage.shape[2:]) for storage in (self.key_storage, self.value_storage))
            self._token_bytes = width * self.key_storage.element_size()
        return self._token_bytes
