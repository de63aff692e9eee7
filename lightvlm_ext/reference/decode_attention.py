"""decode_attention, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import _checks
from .._decode_args import DecodeArgs, check_decode
from .._kv import KVSegment, PackedKV


def decode_attention(
    query: torch.Tensor,
    segments: Sequence[KVSegment | PackedKV],
    *,
    scale: float | None = None,
    mass: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `lightvlm_ext.ops.decode_attention`; float64 inputs give float64. Raises on every device."""
    args = check_decode(query, segments, scale=scale, mass=mass, dtypes=(*_checks.FLOATING, torch.float64))
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    bounds = [bounds_of(args, segment) for segment in range(len(args.key))]
    for segment, of_rows in enumerate(bounds):
        check_pages(args, segment, of_rows)
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.full((query.shape[0], query.shape[2], 1), -math.inf, dtype=compute, device=query.device)
    tensors = [_unpacked(args, segment, compute) for segment in range(len(args.key))]

    for row in range(query.shape[0]):
        spans = [range(*segment[row]) for segment in bounds]
        if not any(spans):
            continue
        key, value = (
            torch.cat([_rows(args, s, tensors[s][i], row, span) for s, span in enumerate(spans)])
            for i in range(2)
        )
        # (key head, head of its group, token)
        grouped = query[row, 0].to(compute).unflatten(0, (args.key_heads(), -1))
        logits = torch.einsum("kgd,nkd->kgn", grouped, key) * args.scale
        total = logits.logsumexp(dim=-1, keepdim=True)
        # Logits that are all -inf are as good as no key.
        weights = logits.softmax(dim=-1).masked_fill(total == -math.inf, 0)
        out[row, 0] = torch.einsum("kgn,nkd->kgd", weights, value).flatten(0, 1).to(query.dtype)
        lse[row, :, 0] = total.flatten()
        shares = weights.mean(dim=1).split([len(span) for span in spans], dim=-1)
        for buffer, segment in zip(args.mass, args.mass_segment, strict=True):
            valid = spans[segment]
            buffer[row, :, valid.start : valid.stop] += shares[segment].to(buffer.dtype)
    return out, lse


def bounds_of(args: DecodeArgs, segment: int) -> list[tuple[int, int]]:
    """Of each batch row: where the segment's valid tokens begin and end."""
    batch, tokens = args.query.shape[0], args.tokens(segment)
    lens, leftpad = args.lens[segment], args.leftpad[segment]
    ends = [tokens] * batch if lens is None else lens.tolist()
    begins = [0] * batch if leftpad is None else leftpad.tolist()
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if not 0 <= begin <= end <= tokens:
            raise ValueError(
                f"lens, leftpad: row {row} of segments[{segment}] has lens {end} and leftpad {begin}, "
                f"must satisfy 0 <= leftpad <= lens <= {tokens}"
            )
    return list(zip(begins, ends, strict=True))


def check_pages(args: DecodeArgs, segment: int, bounds: list[tuple[int, int]]) -> None:
    """Raises ValueError unless the pages of all valid tokens exist."""
    table = args.block_table[segment]
    if table is None:
        return
    pages, size = args.key[segment].shape[:2]
    for row, span in enumerate(bounds):
        blocks = _blocks(range(*span), size)
        for block, page in zip(blocks, table[row, blocks.start : blocks.stop].tolist(), strict=True):
            if not 0 <= page < pages:
                raise ValueError(
                    f"block_table: row {row} of segments[{segment}] has page {page} at {block}, "
                    f"must be in [0, {pages})"
                )


def _blocks(tokens: range, size: int) -> range:
    """The blocks of a table that these tokens lie in."""
    return range(tokens.start // size, -(-tokens.stop // size) if tokens else tokens.start // size)


def _rows(args: DecodeArgs, segment: int, tensor: torch.Tensor, row: int, tokens: range) -> torch.Tensor:
    """These tokens of a batch row, (tokens, Hkv, D), of the segment's keys or values."""
    table = args.block_table[segment]
    if table is None:
        return tensor[row, tokens.start : tokens.stop]
    size = tensor.shape[1]
    blocks = _blocks(tokens, size)
    pages = tensor[table[row, blocks.start : blocks.stop].long()].flatten(0, 1)
    return pages[tokens.start - blocks.start * size :][: len(tokens)]


def _unpacked(args: DecodeArgs, segment: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The segment's keys and values, (B, N, Hkv, D), or its pages."""
    if args.bits[segment] == 0:
        return args.key[segment].to(dtype), args.value[segment].to(dtype)
    block = torch.arange(args.tokens(segment), device=args.query.device) // args.block[segment]
    of_channel = (args.key_scale[segment], args.key_zero[segment], args.value_channel[segment])
    scale, zero, channel = (_present(x).to(dtype)[:, :, block] for x in of_channel)
    token = _present(args.value_token[segment]).to(dtype)
    key = scale * _codes(args, args.key[segment], args.bits[segment], dtype) + zero
    value = channel * (
        token[..., :1] * _codes(args, args.value[segment], args.bits[segment], dtype) + token[..., 1:]
    )
    return key.transpose(1, 2), value.transpose(1, 2)


def _codes(args: DecodeArgs, rows: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of codes (..., row_bytes) as numbers (..., D)."""
    shift = torch.arange(0, 8, bits, device=rows.device)
    each = rows.int()[..., None] >> shift & (2**bits - 1)
    return each.flatten(-2)[..., : args.query.shape[3]].to(dtype)


def _present(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value
