"""StoredLayer: where a cache layer's keys and values stand, and how new ones get there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .buffers import fits, token_major
from .host import upload
from .new_token import NewToken
from .packed_store import PackedStore

if TYPE_CHECKING:
    from .live_cache import LiveLayer

SLACK = 128
"""Free rows that a growing buffer starts with, so that short answers never reallocate."""


class StoredLayer(CacheLayerMixin):
    """Keys and values of one decoder layer. Public attributes:

    key_storage, value_storage (B, capacity, Hkv, D): the buffer.   starts, ends: where each row's keys stand in it.
    seen: logical length.   ragged: whether what is stored is no longer what the 2-D mask is about.   tail: tokens at
    the end of every row that are certainly consecutive, up to which :meth:`crop` works.
    dropped: whether tokens are gone for good.   packed: what left the buffer for segments of fewer bits, or None.
    wants_mass: whether attention shall add up what each stored token receives;   mass (B, Hkv, capacity) fp32: that sum
    for the buffer (packed tokens have theirs in ``packed``), or None.
    live: in a loop of decode steps that ask the host for nothing, what they need on the device; None elsewhere.
    waiting: a token that is counted, and that the attention of the step under way will write; None elsewhere.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.will_be_packed = False
        self.query_rows = 0
        self.wants_mass = False
        self.scale: float | None = None
        self.key_storage = self.value_storage = self._mass = torch.empty(0)
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self._token_bytes = 0
        if self.capacity is None:  # a fixed buffer keeps its address
            self.key_storage = self.value_storage = self._mass = torch.empty(0)
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.seen = 0
        self.tail = 0
        self.ragged = False
        self.dropped = False
        self.packed: PackedStore | None = None
        self.mass: Tensor | None = None
        self._queries: list[Tensor] = []
        self._bounds: tuple[Tensor, Tensor] | None = None
        self.live: LiveLayer | None = None
        self.waiting: NewToken | None = None

    # transformers reads the stored states of a layer through these names
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Stored keys (B, Hkv, N, D), a view; None before the first token."""
        self.settle()
        return self.key_storage[:, : max(self.ends)].transpose(1, 2) if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Stored values (B, Hkv, N, D), a view; None before the first token."""
        self.settle()
        return self.value_storage[:, : max(self.ends)].transpose(1, 2) if self.is_initialized else None

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first token."""
        return len(self.ends) if self.is_initialized else -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, _, length, _ = key_states.shape
        fixed = self.capacity is not None and not self.will_be_packed
        room = self.capacity if fixed and self.capacity is not None else length + SLACK
        if fits(self.key_storage, key_states, room) and fits(self.value_storage, value_states, room):
            self.key_storage.zero_()
            self.value_storage.zero_()
        else:
            self.key_storage = token_major(key_states, room)
            self.value_storage = token_major(value_states, room)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.starts, self.ends = [0] * batch, [0] * batch
        self.mass = self._mass_buffer()
        self.is_initialized = True

    def begin(self, starts: list[int], seen: int, tail: int, ragged: bool) -> None:
        """Say what the tokens just stored are: the first prompt, of
        which this layer may have got only a part."""
        self.starts, self.seen, self.tail, self.ragged = list(starts), seen, tail, ragged
        self.dropped = ragged
        self._bounds = None

    @property
    def complete(self) -> bool:
        """Whether every token seen is stored, in an order that is known."""
        return not self.dropped and (self.packed is None or self.packed.in_order)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, S, D) states; returns all stored ones, (B, Hkv, N, D)."""
        self.settle()
        if self.live is not None and self.live.stepping:
            return self.live.write(self, key_states, value_states)
        self.check_room(key_states, value_states)
        first = not self.is_initialized
        if first:
            self.lazy_initialization(key_states, value_states)
        self._count(key_states.shape[2])
        self._write(key_states, value_states)
        self._bounds = None
        if first:  # the states at hand are what was stored, and lie as the attention kernel likes them
            return key_states, value_states
        return self.keys, self.values  # type: ignore[return-value]

    def announce(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`update` with a token a row, (B, Hkv, 1, D), but leave writing to the attention that reads it
        (:attr:`waiting`): a step is short enough for that to count. Returns what it was given."""
        starts = before = None
        if self.live is not None and self.live.stepping:
            starts, before = self.live.bounds[0], self.live.before
        else:
            self.settle()
            self.check_room(key_states, value_states)
            if not self.filled:
                starts, before = self.bounds()
            self._count(1)
            self._bounds = None if starts is None or before is None else (starts, before + 1)
        self.waiting = NewToken(key_states.detach(), value_states.detach(), before, starts)
        return key_states, value_states

    def write_waiting(self) -> tuple[Tensor, Tensor]:
        """What :meth:`update` would have done instead of :meth:`announce`, and what it returns."""
        waiting, self.waiting = self.waiting, None
        assert waiting is not None
        if self.live is not None and self.live.stepping:
            return self.live.write(self, waiting.key, waiting.value)
        self._write(waiting.key, waiting.value)
        return self.keys, self.values  # type: ignore[return-value]

    def settle(self) -> None:
        """Write what a step that did not get to its end has left waiting: the token is counted."""
        if self.waiting is not None:
            if self.stepping:
                self.waiting = None  # whose steps it was forgets them (LiveCache.take_back)
            else:
                self.write_waiting()

    def _count(self, new: int) -> None:
        """Make room for so many tokens more, and count them."""
        needed = max(self.ends) + new
        if needed > self.key_storage.shape[1]:
            self._grow(needed)
        self.ends = [end + new for end in self.ends]
        self.seen += new
        self.tail += new

    def _write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write (B, Hkv, S, D) states to the end of each row, where they have been counted."""
        # detached: a cache that is written again and again must not hold on to every step's graph
        keys, values = key_states.detach().transpose(1, 2), value_states.detach().transpose(1, 2)
        new = keys.shape[1]
        if len(set(self.ends)) == 1:
            end = self.ends[0]
            self.key_storage[:, end - new : end] = keys
            self.value_storage[:, end - new : end] = values
        else:
            for row, end in enumerate(self.ends):
                self.key_storage[row, end - new : end] = keys[row]
                self.value_storage[row, end - new : end] = values[row]

    def restore(
        self, key: Tensor, value: Tensor, mass: Tensor | None, state: dict[str, Any], slack: int
    ) -> None:
        """Take over a buffer (B, N, Hkv, D) that was saved, the mass (B, Hkv, N) of its tokens, and attributes."""
        used = key.shape[1]
        fixed = self.capacity is not None and not self.will_be_packed
        room = self.capacity if fixed and self.capacity is not None else used + slack
        if used > room:
            raise ValueError(f"capacity of the cache is {self.capacity} tokens; the file holds {used}")
        self.key_storage = token_major(key.transpose(1, 2), room, copy=used)
        self.value_storage = token_major(value.transpose(1, 2), room, copy=used)
        self.dtype, self.device, self.is_initialized = key.dtype, key.device, True
        self.mass = self._mass_buffer()
        if self.mass is not None and mass is not None:
            self.mass[:, :, :used] = mass
        for name, saved in state.items():
            setattr(self, name, saved)
        self._bounds = None
        if self.capacity is not None and self.held > self.capacity:
            raise ValueError(f"capacity of the cache is {self.capacity} tokens; the file holds {self.held}")

    def check_room(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise a ValueError unless (B, Hkv, S, D) states fit what is stored, and the capacity."""
        self.check_capacity(key_states.shape[2])
        if not self.is_initialized:
            return
        if key_states.shape[0] != len(self.ends):
            raise ValueError(f"key_states has {key_states.shape[0]} rows, the cache has {len(self.ends)}")
        self._check_kind(key_states, value_states)

    def _check_kind(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise a ValueError unless states have the heads and the dtype of the storage."""
        for name, states, storage in (
            ("key_states", key_states, self.key_storage),
            ("value_states", value_states, self.value_storage),
        ):
            found, wanted = (states.shape[1], states.shape[3]), tuple(storage.shape[2:])
            if found != wanted or states.dtype != storage.dtype:
                raise ValueError(
                    f"{name} has {found[0]} heads of {found[1]} channels in {states.dtype}, the cache {wanted[0]} of "
                    f"{wanted[1]} in {storage.dtype}: it belongs to another model"
                )

    def check_capacity(self, new: int) -> None:
        """Raise a ValueError where a fixed capacity has no room for so many tokens more."""
        if self.capacity is not None and self.held + new > self.capacity:
            raise ValueError(
                f"capacity of the cache is {self.capacity} tokens; this step needs {self.held + new}"
            )

    @property
    def held(self) -> int:
        """Tokens of the longest row, packed ones included, padding too unless it was left out."""
        if not self.is_initialized:
            return 0
        packed = self.packed.counts if self.packed is not None else [0] * len(self.ends)
        return max(end + count for end, count in zip(self.ends, packed, strict=True))

    def _grow(self, needed: int) -> None:
        self._resize(max(needed, 2 * self.key_storage.shape[1]))

    def _resize(self, room: int) -> None:
        """Move what is stored into buffers of so many rows."""
        used = max(self.ends)
        self.key_storage = token_major(self.key_storage.transpose(1, 2), room, copy=used)
        self.value_storage = token_major(self.value_storage.transpose(1, 2), room, copy=used)
        if self.mass is not None:
            before = self.mass[:, :, :used].clone()
            self.mass = self._mass_buffer()
            assert self.mass is not None
            self.mass[:, :, :used] = before

    def _mass_buffer(self) -> Tensor | None:
        """Zeros for each place of the buffer, where attention is to be added up."""
        if not self.wants_mass:
            return None
        batch, room, heads, _ = self.key_storage.shape
        if self._mass.shape == (batch, heads, room) and self._mass.device == self.key_storage.device:
            self._mass.zero_()  # a fixed buffer keeps its address
        else:
            with torch.inference_mode(False):
                self._mass = torch.zeros(batch, heads, room, device=self.key_storage.device)
        return self._mass

    def _clear_mass(self) -> None:
        """Forget what places behind the last tokens received: other tokens will stand there."""
        if self.mass is not None:
            at = torch.arange(self.mass.shape[2], device=self.mass.device)
            self.mass.masked_fill_((at >= self.bounds()[1][:, None])[:, None], 0)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """starts and ends as (B,) int32 on the device."""
        if self._bounds is None:
            both = upload([self.starts, self.ends], self.key_storage.device)
            if self.live is not None:  # whoever holds its bounds sees them change
                both = self.live.bounds.copy_(both)
            self._bounds = (both[0], both[1])
        return self._bounds

    def buffer(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, N, Hkv, D) that are not packed, views; row b's stand at [starts[b], ends[b])."""
        self.settle()
        return self.key_storage[:, : self.used], self.value_storage[:, : self.used]

    @property
    def used(self) -> int:
        """Places of the buffer that are looked at: all where only the device knows the ends."""
        return self.key_storage.shape[1] if self.stepping else max(self.ends)

    @property
    def stepping(self) -> bool:
        """Whether a step is under way that must not look at what the host knows of the rows."""
        return self.live is not None and self.live.stepping

    @property
    def filled(self) -> bool:
        """Whether every place of :meth:`buffer` is valid in every row, as far as the host knows."""
        return not (self.stepping or any(self.starts) or len(set(self.ends)) > 1)

    def unpacked(self, leftpad: list[int]) -> tuple[Tensor, Tensor]:
        """All keys and values (B, Hkv, seen, D) in their order, in 16 bits; zeros where row b has its padding."""
        assert self.packed is not None
        batch, _, heads, width = self.key_storage.shape
        out = self.key_storage.new_zeros(2, batch, self.seen, heads, width)
        at, none = leftpad or [0] * batch, [0] * batch
        parts = [(*part, none) for part in self.packed.unpacked(self.key_storage.dtype)]
        counts = [end - start for start, end in zip(self.starts, self.ends, strict=True)]
        for key, value, count, first in [*parts, (*self.buffer(), counts, self.starts)]:
            whole = len({*zip(at, count, first, strict=True)}) == 1
            for row in range(1 if whole else batch):
                rows = slice(None) if whole else slice(row, row + 1)
                to = slice(at[row], at[row] + count[row])
                taken = slice(first[row], first[row] + count[row])
                out[0, rows, to], out[1, rows, to] = key[rows, taken], value[rows, taken]
            at = [begin + number for begin, number in zip(at, count, strict=True)]
        return out[0].transpose(1, 2), out[1].transpose(1, 2)
