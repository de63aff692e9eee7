"""The part of a layer's cache that is packed: segments in 8, 4 or 2 bits, and the sinks before them in 16.

Attention does not ask in which order keys stand, once they are rotated, so tokens of equal precision stand together.
What a prompt left is packed once; generated tokens follow in blocks of 64 with channel scales of their own, in storage
that grows by doubling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext.ops import KVSegment, PackedKV

from .host import upload

Segment = TypeVar("Segment", KVSegment, PackedKV)

BLOCK = 64
"""Generated tokens that share channel scales."""


@dataclass
class PackedStore:
    """Packed tokens of one layer.

    counts: tokens of each row, sinks included.   sinks, prompt: what came of the prompt.   generated: bits -> storage.
    """

    counts: list[int]
    sinks: KVSegment | None = None
    prompt: list[PackedKV] = field(default_factory=list)
    generated: dict[int, GrowingKV] = field(default_factory=dict)

    def append(self, key: Tensor, value: Tensor, bits: int) -> None:
        """Pack generated tokens (B, S, Hkv, D), S a multiple of 64, the same number for each row."""
        if bits not in self.generated:
            self.generated[bits] = GrowingKV()
        self.generated[bits].append(key, value, bits)
        self.counts = [count + key.shape[1] for count in self.counts]

    def segments(self) -> list[KVSegment | PackedKV]:
        """What decode_attention reads."""
        first = [self.sinks] if self.sinks is not None else []
        return [
            *first,
            *self.prompt,
            *(one.packed for one in self.generated.values() if one.packed is not None),
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for segment in self.segments() for tensor in _tensors(segment))

    def select_rows(self, rows: Tensor, on_host: Sequence[int]) -> None:
        """Take these rows of the batch."""
        if self.sinks is not None:
            self.sinks = _rows_of(self.sinks, rows)
        self.prompt = [_rows_of(one, rows) for one in self.prompt]
        for one in self.generated.values():
            if one.packed is not None:
                one.packed = _rows_of(one.packed, rows)
        self.counts = [self.counts[row] for row in on_host]


class GrowingKV:
    """PackedKV storage that whole blocks are appended to."""

    def __init__(self) -> None:
        self.packed: PackedKV | None = None
        self.used = 0

    def append(self, key: Tensor, value: Tensor, bits: int) -> None:
        """Pack (B, S, Hkv, D) behind what is there; S is a multiple of the block."""
        needed = self.used + key.shape[1]
        if self.packed is None:
            self.packed = ops.quantize_kv(key, value, bits=bits, block=BLOCK)
        else:
            if needed > self.packed.tokens:
                self.packed = _with_room(self.packed, self.used, max(needed, 2 * self.packed.tokens))
            ops.quantize_kv_(self.packed, key, value, offset=self.used)
        self.used = needed
        lens = upload([needed] * key.shape[0], key.device)
        self.packed = dataclasses.replace(self.packed, lens=lens)


def _with_room(packed: PackedKV, used: int, tokens: int) -> PackedKV:
    """A copy with room for so many tokens, the first ``used`` of them as they are."""
    blocks, used_blocks = -(-tokens // packed.block), used // packed.block
    changed: dict[str, Any] = {}
    for name in ("key_codes", "value_codes", "value_token", "key_scale", "key_zero", "value_channel"):
        old: Tensor = getattr(packed, name)
        by_token = name in ("key_codes", "value_codes", "value_token")
        room, kept = (tokens, used) if by_token else (blocks, used_blocks)
        changed[name] = old.new_zeros(*old.shape[:2], room, old.shape[3])
        changed[name][:, :, :kept] = old[:, :, :kept]
    return dataclasses.replace(packed, **changed)


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
