"""CompactCache: a transformers cache whose layers may hold fewer tokens than they have seen.

Two lengths. The *logical* length of a layer is what transformers counts: tokens seen, padding included;
positions and generate()'s bookkeeping follow it. The *physical* one is what is stored. In a layer that was
born short (after a reduction at prefill) or was compacted, row b's keys stand at ``[starts[b], ends[b])`` of
the buffer, and that, never the 2-D attention mask, says which keys are valid.

Storage is (B, capacity, Hkv, D): FlashAttention's layout, in which a token is one contiguous row, so that
    appending
is a copy and compaction moves whole rows.
"""

from __future__ import annotations

import math
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lightvlm_ext import ops

from .host import upload
from .methods.base import CachePart
from .models.base import attention_kinds
from .plan import Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lightvlm_ext.ops import Selection

    from .runtime import Run

_SLACK = 128
"""Free rows that a growing buffer starts with, so that short answers never reallocate."""


class CompactLayer(CacheLayerMixin):
    """Keys and values of one decoder layer. Public attributes:

    key_storage, value_storage (B, capacity, Hkv, D); starts, ends: where each row's keys stand; seen: logical
        length;
    ragged: whether stored and seen tokens differ, that is, whether the 2-D mask no longer applies; tail:
        tokens at the
    end of every row that are certainly consecutive, up to which :meth:`crop` works.
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
        room = self.capacity if self.capacity is not None else length + _SLACK
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
        return len(set(zip(self.starts, self.ends, strict=True))) > 1

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
        return tokens * self._bytes_per_token()

    def bytes_allocated(self) -> int:
        """Bytes of the buffers."""
        return self.key_storage.nbytes + self.value_storage.nbytes

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


class CompactCache(Cache):
    """A KV cache that is compacted in place; pass it as ``past_key_values`` or let :func:`lightvlm.attach`
    make it.

    Args:
        config: the model's configuration (of the whole VLM or of its text decoder).
        plan: its ``cache`` part says when and what to evict; None: that of the run the cache is used with.
            Eviction needs the queries, so it happens on a model that is attached; on another, everything is
            kept (and a warning says so).
        capacity: tokens a row may hold, padding included. None: buffers grow by doubling and may move. An int:
            allocated once, at addresses that stay, also through :meth:`reset` and reordering, as long as the
            number of rows stays; a step that needs more raises a ValueError and changes nothing.

    Raises:
        TypeError, ValueError: a config, plan or capacity of the wrong kind; a decoder with layers that are not
            full attention.
    """

    def __init__(
        self, config: PretrainedConfig, plan: Plan | None = None, *, capacity: int | None = None
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be a configuration of transformers, got {type(config).__name__}")
        if plan is not None and not isinstance(plan, Plan):
            raise TypeError(f"plan must be a lightvlm.Plan, got {type(plan).__name__}")
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int)):
            raise TypeError(f"capacity must be None or an int, got {type(capacity).__name__}")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        text = config.get_text_config(decoder=True)
        other = attention_kinds(text) - {"full_attention"}
        if other:
            raise ValueError(f"config has layers that are not full attention: {', '.join(sorted(other))}")
        self.layers: list[CompactLayer]  # type: ignore[assignment]
        super().__init__(layers=[CompactLayer(capacity) for _ in range(text.num_hidden_layers)])
        self._has_own_plan = plan is not None
        self._set_plan(plan if plan is not None else Plan())
        self.run: weakref.ref[Run] | None = None
        self.leftpad: list[int] = []
        self.since_compaction = 0

    def _set_plan(self, plan: Plan) -> None:
        self.plan = plan
        for layer in self.layers:
            layer.query_rows = plan.cache.rows if isinstance(plan.cache, CachePart) else 0

    def begin(self, run: Run, leftpad: list[int]) -> None:
        """Say that a prompt whose rows have that much padding will now be stored, on the model of ``run``."""
        if not self._has_own_plan:
            self._set_plan(run.plan)
        self.run = weakref.ref(run)
        self.leftpad, self.since_compaction = list(leftpad), 0

    def take_place_of(self, other: Cache) -> CompactCache:
        """Turn ``other``, an empty cache, into this one, so that whoever holds it can go on with it."""
        other.__class__ = CompactCache
        other.__dict__ = self.__dict__
        assert isinstance(other, CompactCache)
        return other

    @property
    def ragged(self) -> bool:
        """Whether a layer holds fewer tokens than it has seen."""
        return any(layer.ragged for layer in self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        # asked of all layers at the first, so that none has changed when it raises
        if not self.attached and (self.ragged if layer_idx == 0 else layer.ragged):
            raise ValueError(
                "this cache was shortened by a plan and only an attached model can read it; attach the plan again"
            )
        if self.plan.cache is not None and not self.attached and layer_idx == 0 and not layer.seen:
            warnings.warn(
                "CompactCache evicts nothing on a model that is not attached: scoring needs the queries; "
                "use lightvlm.attach(model, plan)",
                stacklevel=2,
            )
        return layer.update(key_states, value_states, *args, **kwargs)

    @property
    def attached(self) -> bool:
        """Whether the run that filled this cache is still on its model."""
        run = self.run() if self.run is not None else None
        return run is not None and run.attached

    def step(self, new_tokens: int) -> None:
        """Count ``new_tokens`` decoded tokens, and compact every layer
        in one launch when the plan says it is time."""
        policy = self.plan.cache
        if policy is None:
            return
        assert isinstance(policy, CachePart)
        self.since_compaction += new_tokens
        if self.since_compaction < policy.interval:
            return
        self.since_compaction = 0
        chosen = [(layer, policy.choose(layer, self.leftpad)) for layer in self.layers]
        moves = [(layer, choice) for layer, choice in chosen if choice is not None]
        if not moves:
            return
        ops.compact_kv_(
            [layer.key_storage for layer, _ in moves],
            [layer.value_storage for layer, _ in moves],
            [choice[0] for _, choice in moves],
            [choice[1] for _, choice in moves],
        )
        for layer, (_, _, kept) in moves:
            layer.compacted(kept, policy.recent)

    def keep_only(self, selections: dict[int, Selection], tail: int) -> None:
        """Keep the selected tokens of each layer, in one launch, and give the rest of growing buffers back.

        Args:
            selections: layer -> tokens, by their places in the buffer. How many they are is read from the device,
                once for all layers.
            tail: so many of the last tokens are among them.
        """
        layers = [self.layers[index] for index in selections]
        ops.compact_kv_(
            [layer.key_storage for layer in layers],
            [layer.value_storage for layer in layers],
            [one.index for one in selections.values()],
            [one.count for one in selections.values()],
        )
        counts = torch.stack([one.count for one in selections.values()]).tolist()
        for layer, kept in zip(layers, counts, strict=True):
            layer.compacted(kept, tail)
            layer.shrink(_SLACK)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens from every
        layer, or raise a ValueError and change none."""
        removed = min(layer.check_crop(tokens_to_remove) for layer in self.layers)
        super().crop(removed)
        self.since_compaction = max(0, self.since_compaction + removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows ``beam_idx`` (B',) of the batch, in that order."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch ``repeats`` times."""
        if self.layers[0].is_initialized:
            self.batch_select_indices(torch.arange(self.layers[0].batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows ``indices`` (B',) of the batch, in that order."""
        differ = len(set(self.leftpad)) > 1 or any(layer.rows_differ for layer in self.layers)
        rows = indices.tolist() if differ else [0] * len(indices)
        for layer in self.layers:
            layer.batch_select_indices(indices, rows)
        if self.leftpad:
            self.leftpad = [self.leftpad[row] for row in rows]

    def reset(self) -> None:
        super().reset()
        self.leftpad, self.since_compaction = [], 0

    def shrink(self) -> None:
        """Give free rows of the buffers back to the allocator (buffers move; not with a fixed capacity)."""
        for layer in self.layers:
            layer.shrink()

    @property
    def kv_bytes_used(self) -> int:
        """Bytes of valid keys and values, all layers."""
        return sum(layer.bytes_used() for layer in self.layers)

    @property
    def kv_bytes_allocated(self) -> int:
        """Bytes of the buffers, all layers."""
        return sum(layer.bytes_allocated() for layer in self.layers)

    @property
    def kv_bytes_full(self) -> int:
        """Bytes that a cache holding every token seen would use, all layers."""
        return sum(layer.bytes_full() for layer in self.layers)
