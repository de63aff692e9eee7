"""``compact_kv_`` against index_select and gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightvlm_ext import ops

from ._case import KEEP, Case, Sizes, plain_copies, require


def cases(sizes: Sizes) -> Iterator[Case]:
    """Keys and values of several layers, rows of different length, each layer with an index of its own."""
    layers = 4
    # heads, head width, heads-first storage (B, Hkv, N, D)
    for heads, width, heads_first in ((4, 128, False), (2, 64, True), (4, 128, True)):
        item = heads * width * 2
        count = sizes.cache_bytes // (layers * 2 * item)
        shape = (1, heads, count, width) if heads_first else (1, count, heads, width)
        stored = [
            torch.zeros(shape, dtype=torch.bfloat16, device=sizes.device).random_(0, 100)
            for _ in range(2 * layers)
        ]
        caches = [cache.transpose(1, 2) if heads_first else cache for cache in stored]
        kept = [
            (torch.rand(count, device=sizes.device) < KEEP).nonzero().flatten().int()[None]
            for _ in range(layers)
        ]
        counts = [torch.tensor([one.shape[1]], dtype=torch.int32, device=sizes.device) for one in kept]
        row_bytes = (width if heads_first else heads * width) * 2
        layout = "B,Hkv,N,D" if heads_first else "B,N,Hkv,D"
        name = f"{layers} layers x {count} tokens, rows of {row_bytes} B ({layout} bfloat16), keep {KEEP}"
        yield _compaction(name, caches, kept, counts)


def _compaction(name: str, caches: list[Tensor], kept: list[Tensor], counts: list[Tensor]) -> Case:
    layers = len(kept)
    keys, values = caches[:layers], caches[layers:]
    wide = [one[0].long() for one in kept] * 2

    def out_of_place() -> list[Tensor]:
        return [cache.index_select(1, index) for cache, index in zip(caches, wide, strict=True)]

    def with_gather() -> list[Tensor]:
        shapes = [(1, len(index), *cache.shape[2:]) for cache, index in zip(caches, wide, strict=True)]
        return [
            cache.gather(1, index[None, :, None, None].expand(shape))
            for cache, index, shape in zip(caches, wide, shapes, strict=True)
        ]

    def copied_back() -> None:
        for cache, index in zip(caches, wide, strict=True):
            cache[:, : len(index)].copy_(cache.index_select(1, index))

    def op() -> None:
        ops.compact_kv_(keys, values, kept, counts)

    def verify() -> None:
        wanted = out_of_place()
        op()
        for cache, rows in zip(caches, wanted, strict=True):
            require(torch.equal(cache[:, : rows.shape[1]], rows), "compact_kv_ disagrees with index_select")

    # Read and written, of keys and values; rows that stay in place are not moved.
    moved = sum(int((one[0] != torch.arange(one.shape[1], device=one.device)).sum()) for one in kept)
    total = 4 * moved * caches[0][0, 0].numel() * caches[0].element_size()
    baselines: dict[str, Callable[[], object]] = {
        "index_select, copied back": copied_back,
        "index_select, out of place": out_of_place,
        "gather, out of place": with_gather,
    }
    return Case(name, op, baselines, verify, plain_copies(total // 2, caches[0].device), total)
