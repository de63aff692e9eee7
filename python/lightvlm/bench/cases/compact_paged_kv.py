"""``compact_paged_kv_`` against index_select over the pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightvlm_ext import ops

from ._case import KEEP, Case, Sizes, plain_copies, require
from .compact_kv import Parameters, kept_rows, model_sizes


def cases(sizes: Sizes) -> Iterator[Case]:
    """Keys and values of several layers under one block table, its pages in random order; on a GPU, or for given
    tokens, of whole models and of one layer. The baselines know where each token lies; working that out is not timed.
    """
    for page_size in (16, 64, 256):
        for heads, width in ((4, 128), (2, 64)):
            tokens = max(page_size, sizes.cache_bytes // (4 * 2 * heads * width * 2) // page_size * page_size)
            yield _case(4, 1, tokens, heads, width, page_size, sizes.device, {"model": "", "batch": 1})
    if sizes.device.type == "cuda" or sizes.tokens is not None:
        for name, tokens, batch, geometry, layers in model_sizes(sizes):
            chosen: Parameters = {"model": name, "tokens": tokens, "batch": batch}
            yield _case(layers, batch, tokens, geometry.kv_heads, geometry.head_dim, 16, sizes.device, chosen)


def _case(
    layers: int,
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    page_size: int,
    device: torch.device,
    chosen: Parameters,
) -> Case:
    blocks = -(-tokens // page_size)
    shape = (batch * blocks, page_size, heads, width)
    pages = [
        torch.zeros(shape, dtype=torch.bfloat16, device=device).random_(0, 100) for _ in range(2 * layers)
    ]
    keys, values = pages[:layers], pages[layers:]
    table = torch.randperm(batch * blocks, device=device).int().reshape(batch, blocks)
    index, count = kept_rows(batch, tokens, device)
    lens = torch.full((batch,), tokens, dtype=torch.int32, device=device)

    def places(positions: Tensor) -> Tensor:
        """Where tokens lie in a tensor whose pages are strung together."""
        return (table.long().gather(1, positions // page_size) * page_size + positions % page_size).flatten()

    old = places(index.long())
    new = places(torch.arange(index.shape[1], device=device).expand(batch, -1))
    strung = [tensor.view(-1, heads, width) for tensor in pages]

    def copied_back() -> None:
        for tensor in strung:
            tensor.index_copy_(0, new, tensor.index_select(0, old))

    def assigned() -> None:
        for tensor in strung:
            tensor[new] = tensor[old]

    def op() -> None:
        ops.compact_paged_kv_(keys, values, table, index, count, lens=lens)

    def verify() -> None:
        wanted = [tensor.index_select(0, old) for tensor in strung]
        op()
        for tensor, rows in zip(strung, wanted, strict=True):
            require(torch.equal(tensor[new], rows), "compact_paged_kv_ disagrees with index_select")

    moved = int((old != new).sum())
    total = 4 * layers * moved * heads * width * 2
    baselines: dict[str, Callable[[], object]] = {
        "index_select, index_copy_": copied_back,
        "pages[new] = pages[old]": assigned,
    }
    row_bytes = heads * width * 2
    name = f"{layers} layers x {batch} x {tokens} tokens, pages of {page_size} x {row_bytes} B, keep {KEEP}"
    floors = plain_copies(total // 2, device)
    return Case(name, op, baselines, verify, floors, total, parameters={**chosen, "layers": layers})
