"""The part of a layer's cache that is packed: segments in 8, 4 or 2 bits, and the sinks before them in 16.

Attention does not ask in which order keys stand, once they are rotated, so tokens of equal precision stand together.
What a prompt left is packed once; generated tokens follow in blocks of 64 with channel scales of their own, in storage
that grows by doubling, or is there from the start where the capacity of the cache is fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext.ops import KVSegment, PackedKV

Segment = TypeVar("Segment", KVSegment, PackedKV)

BLOCK = 64
"""Generated tokens that share channel scales."""


@dataclass
class PromptKV:
    """Tokens of the prompt in one number of bits; one block of channel scales holds them all, unless the plan says how
    many.

    counts: tokens of each row, on the host.   mass (B, Hkv, N) fp32: attention that each received, or None.
    """

    packed: PackedKV
    counts: list[int]
    mass: Tensor | None = None


@dataclass
class PackedStore:
    """Packed tokens of one layer.

    sinks: in 16 bits, with the number that each row has in sink_counts.   prompt: what came of the prompt.
    generated: bits -> storage.   in_order: whether the segments, one after the other, hold all tokens in their order.
    """

    batch: int
    sinks: KVSegment | None = None
    sink_counts: list[int] = field(default_factory=list)
    prompt: list[PromptKV] = field(default_factory=list)
    generated: dict[int, GrowingKV] = field(default_factory=dict)
    in_order: bool = True

    @property
    def counts(self) -> list[int]:
        """Tokens of each row, sinks included."""
        grown = sum(one.used for one in self.generated.values())
        return [grown + sum(row) for row in zip(*self.counts_by_segment, strict=True)] or [grown] * self.batch

    @property
    def counts_by_segment(self) -> list[list[int]]:
        """Tokens of each row in the segments in which rows may differ."""
        sinks = [self.sink_counts] if self.sinks is not None else []
        return [*sinks, *(one.counts for one in self.prompt)]

    def append(
        self, key: Tensor, value: Tensor, bits: int, mass: Tensor | None = None, room: int = 0
    ) -> None:
        """Pack generated tokens (B, S, Hkv, D), S a multiple of 64, the same number for each row.

        mass (B, Hkv, S): the attention they received.   room: tokens to make room for, where this is known.
        """
        if bits not in self.generated:
            self.generated[bits] = GrowingKV()
        self.generated[bits].append(key, value, bits, mass, room)
        self.in_order = self.in_order and len(self.generated) == 1

    def segments(self) -> list[KVSegment | PackedKV]:
        """What decode_attention reads."""
        first: list[KVSegment | PackedKV] = [self.sinks] if self.sinks is not None else []
        first += [one.packed for one in self.prompt]
        return [*first, *(one.packed for one in self.generated.values() if one.packed is not None)]

    def masses(self) -> list[Tensor | None]:
        """Where attention to each of these segments is added up."""
        first: list[Tensor | None] = [None] if self.sinks is not None else []
        first += [one.mass for one in self.prompt]
        return [*first, *(one.mass for one in self.generated.values() if one.packed is not None)]

    @property
    def bytes_used(self) -> int:
        """Bytes of the tokens that there are, with the channel scales of their blocks."""
        used = 0
        if self.sinks is not None:
            heads = self.sinks.key.shape[2]
            used += sum(self.sink_counts) * heads * _row_bytes(self.sinks.key, self.sinks.value)
        for one in self.prompt:
            blocks = sum(-(-count // one.packed.block) for count in one.counts)
            used += _bytes_of_packed(one.packed, sum(one.counts), blocks)
        for storage in self.generated.values():
            if storage.packed is not None:
                tokens = self.batch * storage.used
                used += _bytes_of_packed(storage.packed, tokens, tokens // BLOCK)
        return used

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [tensor for segment in self.segments() for tensor in _tensors(segment)]
        return sum(tensor.nbytes for tensor in [*tensors, *(one for one in self.masses() if one is not None)])

    def shrink(self) -> None:
        """Give back the room that no token uses."""
        for one in self.prompt:
            tokens = max(one.counts)
            if tokens < one.packed.tokens:
                one.packed = _with_room(one.packed, tokens, tokens)
                one.mass = one.mass[:, :, :tokens].clone() if one.mass is not None else None
        for storage in self.generated.values():
            storage.shrink()

    def select_rows(self, rows: Tensor, on_host: Sequence[int]) -> None:
        """Take these rows of the batch."""
        if self.sinks is not None:
            self.sinks = _rows_of(self.sinks, rows)
            self.sink_counts = [self.sink_counts[row] for row in on_host]
        for one in self.prompt:
            one.packed = _rows_of(one.packed, rows)
            one.counts = [one.counts[row] for row in on_host]
            one.mass = one.mass.index_select(0, rows) if one.mass is not None else None
        for storage in self.generated.values():
            if storage.packed is not None:
                storage.packed = _rows_of(storage.packed, rows)
                storage.mass = storage.mass.index_select(0, rows) if storage.mass is not None else None
        self.batch = len(on_host)

    def unpacked(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, list[int]]]:
        """Keys and values (B, N, Hkv, D) of each segment, and how many tokens each row has in it."""
        found = []
        if self.sinks is not None:
            found.append((self.sinks.key.to(dtype), self.sinks.value.to(dtype), self.sink_counts))
        found += [(*ops.dequantize_kv(one.packed, dtype), one.counts) for one in self.prompt]
        for storage in self.generated.values():
            if storage.used and storage.packed is not None:
                used = dataclasses.replace(storage.packed.narrow(0, storage.used), lens=None)
                found.append((*ops.dequantize_kv(used, dtype), [storage.used] * self.batch))
        return found


class GrowingKV:
    """PackedKV storage that whole blocks are appended to; every row has as many tokens.

    ``packed.lens`` is one tensor as long as the storage lives, so that whoever holds the segment sees it grow.
    """

    def __init__(self) -> None:
        self.packed: PackedKV | None = None
        self.mass: Tensor | None = None
        self.used = 0

    def append(self, key: Tensor, value: Tensor, bits: int, mass: Tensor | None, room: int) -> None:
        """Pack (B, S, Hkv, D) behind what is there; S is a multiple of the block."""
        new = key.shape[1]
        needed = self.used + new
        if self.packed is None:
            first = ops.quantize_kv(key, value, bits=bits, block=BLOCK)
            if room > new:
                first = _with_room(first, new, -(-room // BLOCK) * BLOCK)
            lens = torch.full((key.shape[0],), new, dtype=torch.int32, device=key.device)
            self.packed = dataclasses.replace(first, lens=lens)
            self.mass = mass.new_zeros(*mass.shape[:2], first.tokens) if mass is not None else None
        else:
            if needed > self.packed.tokens:
                self._resize(max(needed, 2 * self.packed.tokens))
            ops.quantize_kv_(self.packed, key, value, offset=self.used)
        if self.mass is not None and mass is not None:
            self.mass[:, :, self.used : needed] = mass
        self.keep(needed)

    def keep(self, tokens: int) -> None:
        """Say that the first ``tokens`` tokens of each row are what there is."""
        assert self.packed is not None
        assert self.packed.lens is not None
        self.used = tokens
        self.packed.lens.fill_(tokens)
        if self.mass is not None:
            self.mass[:, :, tokens:] = 0

    def shrink(self) -> None:
        """Give back the room that no token uses."""
        if self.packed is not None and self.used < self.packed.tokens:
            self._resize(self.used)

    def _resize(self, tokens: int) -> None:
        assert self.packed is not None
        self.packed = _with_room(self.packed, self.used, tokens)
        if self.mass is not None:
            before = self.mass[:, :, : self.used]
            self.mass = before.new_zeros(*before.shape[:2], tokens)
            self.mass[:, :, : self.used] = before


def _with_room(packed: PackedKV, used: int, tokens: int) -> PackedKV:
    """A copy with room for so many tokens, the first ``used`` of them as they are."""
    blocks, used_blocks = -(-tokens // packed.block), -(-used // packed.block)
    changed: dict[str, Any] = {}
    for name in ("key_codes", "value_codes", "value_token", "key_scale", "key_zero", "value_channel"):
        old: Tensor = getattr(packed, name)
        by_token = name in ("key_codes", "value_codes", "value_token")
        room, kept = (tokens, used) if by_token else (blocks, used_blocks)
        changed[name] = old.new_zeros(*old.shape[:2], room, old.shape[3])
        changed[name][:, :, :kept] = old[:, :, :kept]
    return dataclasses.replace(packed, **changed)


def _bytes_of_packed(packed: PackedKV, tokens: int, blocks: int) -> int:
    """Bytes of so many tokens, of all rows together, and of the channel scales of so many blocks."""
    heads = packed.key_codes.shape[1]
    by_token = _row_bytes(packed.key_codes, packed.value_codes, packed.value_token)
    by_block = _row_bytes(packed.key_scale, packed.key_zero, packed.value_channel)
    return heads * (tokens * by_token + blocks * by_block)


def _row_bytes(*tensors: Tensor) -> int:
    """Bytes of a row of the last dimension of each, together."""
    return sum(one.shape[-1] * one.element_size() for one in tensors)


def _tensors(segment: KVSegment | PackedKV) -> Iterator[Tensor]:
    for item in dataclasses.fields(segment):
        value = getattr(segment, item.name)
        if isinstance(value, Tensor):
            yield value


def _rows_of(segment: Segment, rows: Tensor) -> Segment:
    """The segment with other rows of the batch."""
    changed: dict[str, Any] = {
        item.name: value.index_select(0, rows)
        for item in dataclasses.fields(segment)
        if isinstance(value := getattr(segment, item.name), Tensor)
    }
    return dataclasses.replace(segment, **changed)
