"""Queries and segments for the tests of decode_attention, and what a result is held to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightvlm_ext._kv import KVSegment, PackedKV, packed_row_bytes
from tests.ops.backends import Backend
from tests.ops.packing import unpack_codes

INF, NAN = math.inf, math.nan
Segment = KVSegment | PackedKV


def query_of(batch: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 1, heads, width).to(dtype)


def dense(
    batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype = torch.float32, **bounds: Tensor
) -> KVSegment:
    key, value = (torch.randn(batch, tokens, heads, width).to(dtype) for _ in range(2))
    return KVSegment(key, value, **bounds)


def packed(
    bits: int,
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    *,
    block: int | None = None,
    lens: Tensor | None = None,
) -> PackedKV:
    """Any codes, scales and zeros are a packed cache; these give keys and values of about 1."""
    block = block or max(tokens, 1)
    blocks, levels = -(-tokens // block), 2**bits - 1

    def codes() -> Tensor:
        numbers = torch.randint(0, 256, (batch, heads, tokens, packed_row_bytes(width, bits)))
        numbers[..., -(-width * bits // 8) :] = 0  # past the last channel
        return numbers.to(torch.uint8)

    def channels() -> Tensor:
        return torch.rand(batch, heads, blocks, width)

    token = torch.rand(batch, heads, tokens, 2) * torch.tensor([2 / levels, -1])
    return PackedKV(
        bits=bits,
        head_dim=width,
        block=block,
        key_codes=codes(),
        value_codes=codes(),
        key_scale=(channels() + 0.2) * 3 / levels,
        key_zero=channels() - 2,
        value_channel=channels() * 2 + 0.1,
        value_token=token.half(),
        lens=lens,
    )


def wide(segment: Segment) -> Segment:
    if isinstance(segment, PackedKV):
        return segment
    return dataclasses.replace(segment, key=segment.key.double(), value=segment.value.double())


def dequantised(segment: Segment, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values (B, N, Hkv, D), by the words of the documentation."""
    if isinstance(segment, KVSegment):
        if segment.block_table is None:
            return segment.key, segment.value
        return gathered(segment.key, segment.block_table), gathered(segment.value, segment.block_table)
    block = torch.arange(segment.tokens) // segment.block
    scale, zero, channel = (
        x.double()[:, :, block] for x in (segment.key_scale, segment.key_zero, segment.value_channel)
    )
    token = segment.value_token.double()
    key = scale * unpack_codes(segment.key_codes, segment.bits, segment.head_dim) + zero
    inner = (
        token[..., :1] * unpack_codes(segment.value_codes, segment.bits, segment.head_dim) + token[..., 1:]
    )
    return key.to(dtype).transpose(1, 2), (channel * inner).to(dtype).transpose(1, 2)


def gathered(pages: Tensor, table: Tensor) -> Tensor:
    """The pages of each row one after the other, (B, N, Hkv, D); a page that there is not is of zeros."""
    there = (table >= 0) & (table < len(pages))
    padded = torch.cat([pages, pages.new_zeros(1, *pages.shape[1:])])
    return padded[table.long().where(there, len(pages))].flatten(1, 2)


def bounds_of(segment: Segment, row: int) -> tuple[int, int]:
    leftpad = None if isinstance(segment, PackedKV) else segment.leftpad
    end = segment.tokens if segment.lens is None else int(segment.lens[row])
    return (0 if leftpad is None else int(leftpad[row])), end


def plain(
    query: Tensor, segments: Sequence[Segment], dtype: torch.dtype, scale: float | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What a user would write: dequantise to `dtype`, attend in it. Returns out, lse and each segment's mass."""
    batch, _, heads, width = query.shape
    out, lse = torch.zeros(query.shape, dtype=dtype), torch.full((batch, heads, 1), -INF, dtype=dtype)
    numbers = [dequantised(segment, dtype) for segment in segments]
    mass = [torch.zeros(batch, key.shape[2], key.shape[1], dtype=torch.float64) for key, _ in numbers]
    for row in range(batch):
        places = [slice(*bounds_of(segment, row)) for segment in segments]
        if not any(place.stop > place.start for place in places):
            continue
        key = torch.cat([key[row, at] for (key, _), at in zip(numbers, places, strict=True)]).to(dtype)
        value = torch.cat([value[row, at] for (_, value), at in zip(numbers, places, strict=True)]).to(dtype)
        group = heads // key.shape[1]
        each_key, each_value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = torch.einsum("hd,nhd->hn", query[row, 0].to(dtype), each_key)
        logits = logits * (width**-0.5 if scale is None else scale)
        weights = logits.softmax(-1)
        out[row, 0] = torch.einsum("hn,nhd->hd", weights, each_value)
        lse[row, :, 0] = logits.logsumexp(-1)
        shares = weights.double().unflatten(0, (-1, group)).mean(1)
        lengths = [place.stop - place.start for place in places]
        for buffer, place, share in zip(mass, places, shares.split(lengths, -1), strict=True):
            buffer[row, :, place] = share
    return out, lse, mass


def buffers(segments: Sequence[Segment], heads: int) -> list[Tensor]:
    return [torch.zeros(rows_of(segment), heads, segment.tokens) for segment in segments]


def rows_of(segment: Segment) -> int:
    """Batch rows."""
    if isinstance(segment, PackedKV):
        return segment.key_codes.shape[0]
    return (segment.key if segment.block_table is None else segment.block_table).shape[0]


def check(backend: Backend, query: Tensor, segments: Sequence[Segment], heads: int, **options: Any) -> None:
    """Twice the error of plain torch in the query's dtype, and a few roundings; for out, lse and mass."""
    mass = buffers(segments, heads)
    out, lse = backend.decode_attention(query, segments, mass=mass, **options)
    assert out.dtype == query.dtype
    assert out.shape == query.shape
    assert lse.dtype == torch.float32
    assert lse.shape == (query.shape[0], query.shape[2], 1)
    exact = plain(query.double(), [wide(s) for s in segments], torch.float64, **options)
    rough = plain(query, segments, query.dtype, **options)
    empty = exact[1] == -INF
    assert torch.equal(lse == -INF, empty)
    assert (out[:, 0][empty[..., 0]] == 0).all()

    def compare(found: Tensor, precise: Tensor, same: Tensor, step: float) -> None:
        if precise.numel() == 0:
            return
        precise, same = precise.double(), same.double()
        bound = 2 * (same - precise).abs().max() + 4 * step * precise.abs().max()
        assert (found.double() - precise).abs().max() <= bound

    # Roundings of the result, and in fp32 those of sums in another order.
    eps = torch.finfo(query.dtype).eps * (4 if query.dtype == torch.float32 else 1)
    compare(out, exact[0], rough[0], eps / 2)
    compare(lse[~empty], exact[1][~empty], rough[1][~empty], eps / 2)
    for found, precise, same in zip(mass, exact[2], rough[2], strict=True):
        compare(found, precise, same, eps / 2)
    if not segments:
        return
    total = torch.stack([buffer.double().sum(-1) for buffer in mass]).sum(0)
    kept = ~empty.unflatten(1, (heads, -1))[:, :, 0, 0]
    # Weights that are kept for mass have 11 bits where the query has 16.
    near = 1e-5 if query.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(total, kept.double(), rtol=0, atol=near)
