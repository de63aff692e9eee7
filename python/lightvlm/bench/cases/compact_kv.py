"""``compact_kv_`` against index_select and gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightvlm_ext import ops

from ._case import KEEP, Case, Geometry, Sizes, plain_copies, require

Parameters = dict[str, int | float | str]


def cases(sizes: Sizes) -> Iterator[Case]:
    """Keys and values of several layers, each with an index of its own; on a GPU, or for given tokens, of whole models
    and of one layer."""
    # heads, head width, heads-first storage (B, Hkv, N, D)
    for heads, width, heads_first in ((4, 128, False), (2, 64, True), (4, 128, True)):
        tokens = sizes.cache_bytes // (4 * 2 * heads * width * 2)
        yield _case(4, 1, tokens, heads, width, heads_first, sizes.device, {"model": "", "batch": 1})
    if sizes.device.type == "cuda" or sizes.tokens is not None:
        for name, tokens, batch, geometry, layers in model_sizes(sizes):
            chosen: Parameters = {"model": name, "tokens": tokens, "batch": batch}
            yield _case(
                layers, batch, tokens, geometry.kv_heads, geometry.head_dim, False, sizes.device, chosen
            )


def model_sizes(sizes: Sizes) -> Iterator[tuple[str, int, int, Geometry, int]]:
    """(model, tokens, batch, geometry, layers): all layers of each model, and one."""
    for name, geometry in sizes.geometries().items():
        for tokens in sizes.tokens or (2048, 8192, 32768, 131072):
            for batch in sizes.batches:
                for layers in (geometry.layers, 1):
                    yield name, tokens, batch, geometry, layers


def kept_rows(batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index and count of a share KEEP of the tokens, other ones in each row."""
    keep = max(1, round(KEEP * tokens))
    index = torch.rand(batch, tokens, device=device).topk(keep, dim=1).indices.sort(dim=1).values.int()
    return index, torch.full((batch,), keep, dtype=torch.int32, device=device)


def _case(
    layers: int,
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    heads_first: bool,
    device: torch.device,
    chosen: Parameters,
) -> Case:
    shape = (batch, heads, tokens, width) if heads_first else (batch, tokens, heads, width)
    stored = [
        torch.zeros(shape, dtype=torch.bfloat16, device=device).random_(0, 100) for _ in range(2 * layers)
    ]
    caches = [cache.transpose(1, 2) if heads_first else cache for cache in stored]
    keys, values = caches[:layers], caches[layers:]
    chosen_rows = [kept_rows(batch, tokens, device) for _ in range(layers)]
    kept, counts = [index for index, _ in chosen_rows], [count for _, count in chosen_rows]
    wide = [index.long() for index in kept] * 2

    def with_index_select() -> list[Tensor]:
        return [
            torch.stack([row.index_select(0, rows) for row, rows in zip(cache, index, strict=True)])
            if batch > 1
            else cache.index_select(1, index[0])
            for cache, index in zip(caches, wide, strict=True)
        ]

    def with_gather() -> list[Tensor]:
        return [
            cache.gather(1, index[:, :, None, None].expand(-1, -1, heads, width))
            for cache, index in zip(caches, wide, strict=True)
        ]

    def copied_back() -> None:
        for cache, index in zip(caches, wide, strict=True):
            for row, rows in zip(cache, index, strict=True):
                row[: len(rows)].copy_(row.index_select(0, rows))

    def op() -> None:
        ops.compact_kv_(keys, values, kept, counts)

    def verify() -> None:
        wanted = with_index_select()
        op()
        for cache, rows in zip(caches, wanted, strict=True):
            require(torch.equal(cache[:, : rows.shape[1]], rows), "compact_kv_ disagrees with index_select")

    # Read and written, of keys and values; rows that stay in place are not moved.
    moved = sum(int((index != torch.arange(index.shape[1], device=device)).sum()) for index in kept)
    total = 4 * moved * heads * width * 2
    baselines: dict[str, Callable[[], object]] = {
        "index_select, copied back": copied_back,
        "index_select, out of place": with_index_select,
        "gather, out of place": with_gather,
    }
    row_bytes = (width if heads_first else heads * width) * 2
    layout = "B,Hkv,N,D" if heads_first else "B,N,Hkv,D"
    name = (
        f"{layers} layers x {batch} x {tokens} tokens, rows of {row_bytes} B ({layout} bfloat16), keep {KEEP}"
    )
    floors = plain_copies(total // 2, device)
    return Case(name, op, baselines, verify, floors, total, parameters={**chosen, "layers": layers})
