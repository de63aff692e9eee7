"""Sequences in pages, and their dense model, for the tests of compact_paged_kv_."""

from __future__ import annotations

import torch

from lightvlm_ext import ops

LAYOUTS = ("tokens", "heads", "interleaved", "padded")
INDEX_KINDS = ("random", "all", "none", "first", "last", "alternating", "prefix")


def int32(*values: object) -> torch.Tensor:
    return torch.tensor(*values, dtype=torch.int32)


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Comparable also where floats are NaN."""
    return tensor.contiguous().flatten().view(torch.uint8)


def make_pages(
    layout: str, pages: int, size: int, heads: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """(pages, size, heads, width) of random bytes, laid out in one way or another."""
    storage = {
        "tokens": (pages, size, heads, width),
        "heads": (pages, heads, size, width),
        "interleaved": (pages, 2, size, heads, width),
        "padded": (pages + 2, size + 1, heads + 1, width + 1),
    }[layout]
    elements = torch.Size(storage).numel()
    whole = (
        torch.randint(0, 256, (elements * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(storage)
    )
    return {
        "tokens": whole,
        "heads": whole.transpose(1, 2),
        "interleaved": whole[:, 1] if whole.dim() == 5 else whole,
        "padded": whole[1:-1, 1:, 1:, 1:],
    }[layout]


class Sequences:
    """Sequences of some lengths in the pages of one table, and a page or two that nobody uses."""

    def __init__(self, lens: list[int], size: int, spare_blocks: int = 1) -> None:
        self.size = size
        self.lens = int32(lens)
        self.used = [-(-n // size) for n in lens]
        self.pages = sum(self.used) + 2
        order = torch.randperm(self.pages).tolist()
        blocks = max(self.used, default=0) + spare_blocks
        # What stands past a sequence's pages is poison.
        self.table = torch.full((len(lens), blocks), -(2**31), dtype=torch.int32)
        for b, n in enumerate(self.used):
            self.table[b, :n] = int32([order.pop() for _ in range(n)])

    def dense(self, pages: torch.Tensor, b: int) -> torch.Tensor:
        """Sequence b as (tokens, ...)."""
        n = int(self.lens[b])
        return pages[self.table[b, : self.used[b]].long()].flatten(0, 1)[:n]

    def keep(self, kind: str, heads: int | None, spare: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        """Index (B, M) and count (B,), or one for each head; what stands past count is poison."""
        kept = [kept_tokens(kind, int(n)) for n in self.lens for _ in range(heads or 1)]
        index = torch.full(
            (len(kept), max((len(k) for k in kept), default=0) + spare), 2**31 - 1, dtype=torch.int32
        )
        for row, tokens in zip(index, kept, strict=True):
            row[: len(tokens)] = tokens.int()
        count = int32([len(k) for k in kept])
        if heads is None:
            return index, count
        return index.reshape(len(self.used), heads, index.shape[1]), count.reshape(len(self.used), heads)

    def check(
        self, before: torch.Tensor, after: torch.Tensor, index: torch.Tensor, count: torch.Tensor
    ) -> None:
        """Kept tokens stand in front, and no other page than theirs was touched."""
        touched = set()
        for b in range(len(self.used)):
            heads = range(index.shape[1]) if index.dim() == 3 else [None]
            for h in heads:
                at = (b,) if h is None else (b, h)
                kept = index[at][: int(count[at])].long()
                old, new = self.dense(before, b), self.dense(after, b)
                if h is not None:
                    old, new = old[:, h], new[:, h]
                assert torch.equal(to_bytes(new[: len(kept)]), to_bytes(old[kept]))
                touched |= set(self.table[b, : -(-len(kept) // self.size)].tolist())
        others = [page for page in range(self.pages) if page not in touched]
        assert torch.equal(to_bytes(after[others]), to_bytes(before[others]))

    def check_freed(self, found: ops.PagedCompaction, counts: list[torch.Tensor]) -> None:
        batch = len(self.used)
        most = torch.stack([c.reshape(batch, -1).amax(1) for c in counts]).amax(0) if batch else int32([])
        left = [-(-int(n) // self.size) for n in most]
        freed = [p for b, n in enumerate(left) for p in self.table[b, n : self.used[b]].tolist()]
        assert found.row_pages.tolist() == left
        assert found.freed_count.tolist() == [len(freed)]
        assert found.freed.tolist() == freed + [-1] * (self.table.numel() - len(freed))
        assert found.freed_pages() == freed
        assert {t.dtype for t in found} == {torch.int32}


def kept_tokens(kind: str, tokens: int) -> torch.Tensor:
    every = torch.arange(tokens)
    return {
        "random": every[torch.rand(tokens) < 0.35],
        "all": every,
        "none": every[:0],
        "first": every[: tokens // 2],
        "last": every[tokens - tokens // 3 :],
        "alternating": every[1::2],
        "prefix": torch.cat([every[: tokens // 2], every[tokens // 2 + 2 :: 3]]),
    }[kind]


# Two sequences of 12 tokens on pages of 4: they share page 5, their first.
SHARED_TABLE = [[5, 1, 2], [5, 3, 0]]
SHARED_USERS = [1, 1, 1, 1, 0, 2]


K, V = torch.zeros(6, 4, 3, 8), torch.zeros(6, 4, 3, 8)
T, I, C = int32([[0, 1], [2, 3]]), int32([[1, 2], [3, 4]]), int32([2, 2])  # noqa: E741


def raw_arguments() -> list[object]:
    found = (
        torch.empty(2, dtype=torch.int32),
        torch.empty(4, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
    )
    outputs = [[t] for t in found]
    return [[K, V], [0, 0], [I], [C], [0], [T], [C + 5], [torch.ones(6).int()], *outputs, None]
