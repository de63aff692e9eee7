"""``decode_attention`` over caches of 16, 8, 4 and 4/2 bits against the attention that torch has for 16 bits, and over
one in pages against the same after the pages were gathered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightvlm_ext import ops, reference
from lightvlm_ext._kv import KVSegment, PackedKV

from ._case import Case, Geometry, Sizes, dtype_name, require

_CPU_TOKENS, _GPU_TOKENS = (8192, 32768), (2048, 8192, 32768, 131072)
_LARGEST_ON_CPU = 65536  # batch times tokens
_PAGE_SIZES = (16, 256)
_HIGH_SHARE = 0.4  # of the tokens of a 4/2-bit cache

Segment = KVSegment | PackedKV


def cases(sizes: Sizes) -> Iterator[Case]:
    """One layer, one new token per row; keys and values that are normally distributed. With the mass of each key and
    without; on a CPU also a dense cache in fp32. Pages of all heads, in random order."""
    on_cpu = sizes.device.type == "cpu"
    for tokens in sizes.tokens or (_CPU_TOKENS if on_cpu else _GPU_TOKENS):
        for model, geometry in sizes.geometries().items():
            for batch in sizes.batches:
                if on_cpu and batch * tokens > _LARGEST_ON_CPU:
                    continue
                yield from of_size(batch, tokens, model, geometry, sizes.device)


def of_size(batch: int, tokens: int, model: str, geometry: Geometry, device: torch.device) -> Iterator[Case]:
    """The cases of one geometry, called ``model``."""
    key, value = (_stored(batch, tokens, geometry, device) for _ in range(2))
    query = torch.randn(batch, 1, geometry.heads, geometry.head_dim, device=device)
    if device.type == "cpu":
        wide = [KVSegment(key.float(), value.float())]
        yield _case(_name("16", batch, tokens, model, geometry), query, wide, "32", None)
    for size in _PAGE_SIZES:
        yield _in_pages(size, tokens, model, geometry, query.bfloat16(), key, value)
    for bits in ("16", "8", "4", "4/2"):
        segments = _segments(key, value, bits)
        mass = [torch.zeros(batch, geometry.kv_heads, one.tokens, device=device) for one in segments]
        name = _name(bits, batch, tokens, model, geometry)
        yield _case(name, query.bfloat16(), segments, bits, None)
        yield _case(f"{name}, with mass", query.bfloat16(), segments, bits, mass)


def _name(bits: str, batch: int, tokens: int, model: str, geometry: Geometry) -> str:
    heads = f"{geometry.heads}/{geometry.kv_heads} heads of {geometry.head_dim}"
    return f"{bits} bits, {batch} x {tokens} tokens, {heads} ({model})"


def _stored(batch: int, tokens: int, geometry: Geometry, device: torch.device) -> Tensor:
    """(B, N, Hkv, D), stored as transformers' caches are, heads first."""
    shape = (batch, geometry.kv_heads, tokens, geometry.head_dim)
    return torch.randn(shape, device=device).bfloat16().transpose(1, 2)


def _segments(key: Tensor, value: Tensor, bits: str) -> list[Segment]:
    if bits == "16":
        return [KVSegment(key, value)]
    if bits != "4/2":
        return [ops.quantize_kv(key, value, bits=int(bits))]
    high = int(key.shape[1] * _HIGH_SHARE)
    return [
        ops.quantize_kv(key[:, :high], value[:, :high], bits=4),
        ops.quantize_kv(key[:, high:], value[:, high:], bits=2),
    ]


def _case(
    name: str, query: Tensor, segments: Sequence[Segment], bits: str, mass: list[Tensor] | None
) -> Case:
    # What torch attends to: the same numbers, dense, heads first, in the query's dtype.
    pairs = [_dense(one, query.dtype) for one in segments]
    key, value = (torch.cat(parts, 1).transpose(1, 2).contiguous() for parts in zip(*pairs, strict=True))
    baselines = _baselines(query, key, value, mass is not None)

    def op() -> tuple[Tensor, Tensor]:
        return ops.decode_attention(query, segments, mass=mass)

    def verify() -> None:
        exact = exactly(query, segments)
        largest = exact.abs().max()
        fine = 1e-5 if query.dtype == torch.float32 else 1e-2
        require(bool((op()[0] - exact).abs().max() <= fine * largest), "decode_attention is wrong")
        for way, baseline in baselines.items():
            found = baseline()
            assert isinstance(found, Tensor)
            error = (found.view(query.shape) - exact).abs().max()
            require(bool(error <= 0.1 * largest), f"{way} attends to something else")
        for buffer in mass or ():
            buffer.zero_()
        op()
        for buffer, one in zip(mass or (), _masses(query, segments) if mass else (), strict=True):
            require(bool(((buffer - one).abs() <= 1e-2 * one.max()).all()), "its mass is wrong")

    total = sum(
        one.nbytes if isinstance(one, PackedKV) else one.key.nbytes + one.value.nbytes for one in segments
    )
    total += sum(2 * one.nbytes for one in mass or ())
    batch, _, tokens, width = key.shape
    words = torch.ones(total // 8, dtype=torch.int64, device=query.device)
    return Case(
        name if bits != "32" else name.replace("16 bits", "32 bits"),
        op,
        baselines,
        verify,
        {"sum of as many bytes": words.sum},
        bytes=total,
        flops=4 * batch * query.shape[2] * width * tokens,
        precision=query.dtype,
        parameters={
            "tokens": tokens,
            "batch": batch,
            "bits": bits,
            "dtype": dtype_name(query.dtype),
            "mass": "yes" if mass else "no",
        },
    )


def _in_pages(
    size: int, tokens: int, model: str, geometry: Geometry, query: Tensor, key: Tensor, value: Tensor
) -> Case:
    """The same cache in pages of `size` tokens. Beside it, in the place of a copy: the op over the cache in a piece."""
    batch, blocks = key.shape[0], -(-tokens // size)
    table = torch.randperm(batch * blocks, device=key.device).int().view(batch, blocks)
    lens = torch.full((batch,), tokens, dtype=torch.int32, device=key.device)
    key_pages, value_pages = (_paged(one, table, size) for one in (key, value))
    segment = KVSegment(key_pages, value_pages, lens, block_table=table)
    piece = KVSegment(key, value)
    room = [torch.empty_like(key_pages) for _ in range(2)]
    gathered = [one.view(batch, blocks * size, *one.shape[2:])[:, :tokens].transpose(1, 2) for one in room]
    dense = _case(_name("16", batch, tokens, model, geometry), query, [piece], "16", None)

    def gather() -> None:
        for pages, to in zip((key_pages, value_pages), room, strict=True):
            torch.index_select(pages, 0, table.flatten(), out=to)

    def after_gather(attend: Callable[[], object]) -> Callable[[], object]:
        def both() -> object:
            gather()
            return attend()

        return both

    def op() -> tuple[Tensor, Tensor]:
        return ops.decode_attention(query, [segment])

    def verify() -> None:
        dense.verify()
        gather()
        require(torch.equal(gathered[0].transpose(1, 2), key), "the pages hold something else")
        difference = (op()[0].float() - ops.decode_attention(query, [piece])[0].float()).abs().max()
        require(bool(difference <= 1e-2), "decode_attention over pages is wrong")

    ways = _baselines(query, gathered[0], gathered[1], False)
    return dataclasses.replace(
        dense,
        name=f"{dense.name}, pages of {size}",
        op=op,
        baselines={f"gather, {way}": after_gather(attend) for way, attend in ways.items()},
        verify=verify,
        floors={"decode_attention, not in pages": dense.op},
        parameters={**dense.parameters, "page_size": size},
    )


def _paged(rows: Tensor, table: Tensor, size: int) -> Tensor:
    """Pages (P, size, Hkv, D) with the rows (B, N, Hkv, D) where the table says; zeros after the last token."""
    batch, blocks = table.shape
    room = rows.new_zeros(batch, blocks * size, *rows.shape[2:])
    room[:, : rows.shape[1]] = rows
    pages = torch.empty_like(room.view(batch * blocks, size, *rows.shape[2:]))
    pages[table.flatten().long()] = room.view_as(pages)
    return pages


def _dense(segment: Segment, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if isinstance(segment, PackedKV):
        return ops.dequantize_kv(segment, dtype)
    return segment.key.to(dtype), segment.value.to(dtype)


def _baselines(query: Tensor, key: Tensor, value: Tensor, with_mass: bool) -> dict[str, Callable[[], object]]:
    """Ways to the result from keys and values (B, Hkv, N, D), all as (B, Hkv, G, D) or of its size."""
    batch, _, heads, width = query.shape
    kv_heads, tokens = key.shape[1:3]
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    grouped = query.view(batch, kv_heads, heads // kv_heads, width)
    one_row = query.transpose(1, 2)
    module: Any = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
    mass = torch.zeros(batch, kv_heads, tokens, device=query.device)

    def by_matmul() -> Tensor:
        weights = torch.softmax(grouped @ key.mT * width**-0.5, -1)
        if with_mass:
            mass.add_(weights.mean(2))
        return weights @ value

    def packed() -> Tensor:
        return F.scaled_dot_product_attention(grouped, key, value)

    def grouped_query() -> Tensor:
        return F.scaled_dot_product_attention(one_row, key, value, enable_gqa=True)

    def by_transformers() -> Tensor:
        return sdpa_attention_forward(module, one_row, key, value, None, scaling=width**-0.5)[0]

    if with_mass:  # SDPA has no weights to give: they would have to be computed again
        return {"matmul, softmax, mean, matmul": by_matmul}
    return {
        "matmul, softmax, matmul": by_matmul,
        "SDPA, group as rows": packed,
        "SDPA, enable_gqa": grouped_query,
        "SDPA as transformers calls it": by_transformers,
    }


def exactly(query: Tensor, segments: Sequence[Segment], rows: Iterable[int] | None = None) -> Tensor:
    """In float64, a batch row at a time; of all rows, or of these."""
    asked = range(query.shape[0]) if rows is None else rows
    found = [
        reference.decode_attention(query[b : b + 1].double(), [_row(one, b) for one in segments])[0]
        for b in asked
    ]
    return torch.cat(found)


def _masses(query: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """Of each segment, as exactly()."""
    shares = []
    for b in range(query.shape[0]):
        rows = [_row(one, b) for one in segments]
        mass = [
            torch.zeros(1, one.key_codes.shape[1], one.tokens, device=query.device)
            if isinstance(one, PackedKV)
            else torch.zeros(1, one.key.shape[2], one.key.shape[1], device=query.device)
            for one in rows
        ]
        reference.decode_attention(query[b : b + 1].double(), rows, mass=mass)
        shares.append(mass)
    return [torch.cat(parts) for parts in zip(*shares, strict=True)]


def _row(segment: Segment, b: int) -> Segment:
    """Batch row b; in float64 where it is dense."""
    if isinstance(segment, KVSegment):
        return KVSegment(segment.key[b : b + 1].double(), segment.value[b : b + 1].double())
    tensors = {
        field.name: getattr(segment, field.name)[b : b + 1]
        for field in dataclasses.fields(segment)
        if isinstance(getattr(segment, field.name), Tensor)
    }
    return dataclasses.replace(segment, **tensors)
