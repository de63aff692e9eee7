"""Segments in pages for the tests of decode_attention."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lightvlm_ext._kv import KVSegment
from tests.ops.decode_cases import NAN, bounds_of, gathered
from tests.ops.paging import make_pages

GARBAGE = torch.tensor([-1, -(2**31), 2**31 - 1], dtype=torch.int32)
LAYOUTS = ("tokens", "heads", "interleaved", "padded")  # of make_pages


def in_pages(
    size: int,
    heads: int,
    width: int,
    dtype: torch.dtype,
    *,
    lens: list[int],
    leftpad: list[int] | None = None,
    blocks: int | None = None,
    pages: int | None = None,
    layout: str = "tokens",
) -> KVSegment:
    """Rows of some lengths in pages that come in any order, some of them twice, in one row or in two.

    blocks: of a row; default: one more than the longest needs.   pages: P; default: some more than there are blocks.
    What no valid token needs is poison: NaN in tokens, and numbers of no page in the table.
    """
    batch = len(lens)
    blocks = max((-(-n // size) for n in lens), default=0) + 1 if blocks is None else blocks
    pages = batch * blocks + 2 if pages is None else pages
    key, value = (
        make_pages(layout, pages, size, heads, width, dtype).copy_(torch.randn(pages, size, heads, width))
        for _ in range(2)
    )
    table = torch.randint(0, max(pages, 1), (batch, blocks)).int()
    bounds = None if leftpad is None else torch.tensor(leftpad, dtype=torch.int32)
    segment = KVSegment(key, value, torch.tensor(lens, dtype=torch.int32), bounds, table)
    poison(segment)
    return segment


def poison(segment: KVSegment) -> None:
    """NaN in every token that is not valid for any row, and garbage in table entries without a valid token."""
    table, size = segment.block_table, segment.key.shape[1]
    assert table is not None
    used = torch.zeros(segment.key.shape[:2], dtype=torch.bool)
    for row in range(len(table)):
        begin, end = bounds_of(segment, row)
        for n in range(begin, end):
            used[table[row, n // size], n % size] = True
        needed = {n // size for n in range(begin, end)}
        for block in range(table.shape[1]):
            if block not in needed:
                table[row, block] = GARBAGE[(row + block) % len(GARBAGE)]
    for tensor in (segment.key, segment.value):
        tensor[~used] = NAN


def unpaged(segment: KVSegment) -> KVSegment:
    """The same tokens in a piece for each row."""
    table = segment.block_table
    assert table is not None
    key, value = gathered(segment.key, table), gathered(segment.value, table)
    return dataclasses.replace(segment, key=key, value=value, block_table=None)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether all are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
