"""Caches of every layout and indexes of every kind, for the tests of compact_kv_."""

from __future__ import annotations

import torch

LAYOUTS = ("tokens", "heads", "interleaved", "padded", "reversed")
INDEX_KINDS = ("random", "all", "none", "first", "last", "alternating", "runs")
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex128,
)


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Comparable also where floats are NaN."""
    return tensor.contiguous().flatten().view(torch.uint8)


class Buffer:
    """A tensor of random bytes, as a view of a larger buffer, so that writes outside the view show."""

    def __init__(self, storage: tuple[int, ...], view: str, dtype: torch.dtype) -> None:
        elements = torch.Size(storage).numel()
        limit = 2 if dtype == torch.bool else 256
        self.whole = torch.randint(0, limit, (elements * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        self.tensor = eval(f"whole{view}", {"whole": self.whole.reshape(storage)})
        inside = torch.as_strided(
            torch.arange(elements), self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()
        )
        self.outside = torch.ones(elements, dtype=torch.bool)
        self.outside[inside.flatten()] = False
        self.before = self.tensor.clone()
        self.whole_before = self.whole.clone()

    def check_outside(self) -> None:
        assert torch.equal(to_bytes(self.whole[self.outside]), to_bytes(self.whole_before[self.outside]))

    def check_unchanged(self) -> None:
        assert torch.equal(to_bytes(self.whole), to_bytes(self.whole_before))

    def check_moved(self, index: torch.Tensor, count: torch.Tensor, token_dim: int = 1) -> None:
        after, before = self.tensor.transpose(1, token_dim), self.before.transpose(1, token_dim)
        for b in range(index.shape[0]):
            if index.dim() == 2:
                kept = index[b, : count[b]].long()
                assert torch.equal(to_bytes(after[b, : len(kept)]), to_bytes(before[b][kept]))
                continue
            for h in range(index.shape[1]):
                kept = index[b, h, : count[b, h]].long()
                assert torch.equal(to_bytes(after[b, : len(kept), h]), to_bytes(before[b, :, h][kept]))
        self.check_outside()


def make_cache(layout: str, batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> Buffer:
    """(batch, tokens, heads, width), laid out in one way or another."""
    storage, view = {
        "tokens": ((batch, tokens, heads, width), ""),
        "heads": ((batch, heads, tokens, width), ".transpose(1, 2)"),
        "interleaved": ((batch, tokens, heads, 2, width), "[..., 1, :]"),
        "padded": ((batch + 2, tokens + 2, heads + 2, width + 2), "[1:-1, 1:-1, 1:-1, 1:-1]"),
        "reversed": ((width, heads, tokens, batch), ".permute(3, 2, 1, 0)"),
    }[layout]
    return Buffer(storage, view, dtype)


def kept_rows(kind: str, tokens: int) -> torch.Tensor:
    if kind == "random":
        return (torch.rand(tokens) < 0.35).nonzero().flatten()
    if kind == "all":
        return torch.arange(tokens)
    if kind == "none":
        return torch.arange(0)
    if kind == "first":
        return torch.arange(tokens // 2)
    if kind == "last":
        return torch.arange(tokens - tokens // 3, tokens)
    if kind == "alternating":
        return torch.arange(1, tokens, 2)
    return ((torch.arange(tokens) // 5) % 2 == 1).nonzero().flatten()


def make_index(
    kind: str, shape: tuple[int, ...], tokens: int, spare: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index (*shape, M) and count (*shape); what stands past count is poison."""
    rows = [kept_rows(kind, tokens) for _ in range(torch.Size(shape).numel())]
    slots = max((len(row) for row in rows), default=0) + spare
    index = torch.full((len(rows), slots), 2**31 - 1, dtype=torch.int32)
    index[:, 1::2] = -(2**31)
    for i, row in enumerate(rows):
        index[i, : len(row)] = row.int()
    count = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return index.reshape(*shape, slots), count.reshape(shape)


def index_of(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(rows, dtype=torch.int32), torch.tensor([len(r) for r in rows], dtype=torch.int32)
