"""compact_paged_kv_, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._compact_paged_args import PagedArgs, PagedCompaction, check_paged
from .compact_kv import check_disjoint, check_index


def compact_paged_kv_(
    key_pages: torch.Tensor | Sequence[torch.Tensor],
    value_pages: torch.Tensor | Sequence[torch.Tensor],
    block_table: torch.Tensor | Sequence[torch.Tensor],
    index: torch.Tensor | Sequence[torch.Tensor],
    count: torch.Tensor | Sequence[torch.Tensor],
    *,
    lens: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    refcount: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    extras: Sequence[torch.Tensor] | Sequence[torch.Tensor | Sequence[torch.Tensor]] = (),
) -> PagedCompaction | list[PagedCompaction]:
    """As `lightvlm_ext.ops.compact_paged_kv_`, but it makes copies on the way. Raises on every device."""
    args = check_paged(key_pages, value_pages, block_table, index, count, lens, refcount, extras)
    if not args.pages:
        return []
    check_disjoint(args.pages, [*args.index, *args.count, *args.block_table])
    lengths = [_check_table(args, t) for t in range(len(args.block_table))]
    for i in range(len(args.index)):
        _check_rows(args, i, lengths[args.of[i]])
    for pages, by in zip(args.pages, args.by, strict=True):
        _compact(pages, args.block_table[args.of[by]], args.index[by], args.count[by])
    found = [_freed(args, t, length) for t, length in enumerate(lengths)]
    return found[0] if isinstance(block_table, torch.Tensor) else found


def _page_size(args: PagedArgs, t: int) -> int:
    return next(p.shape[1] for p, by in zip(args.pages, args.by, strict=True) if args.of[by] == t)


def _used(args: PagedArgs, t: int, length: list[int]) -> list[list[int]]:
    """The pages of each row of table t."""
    size = _page_size(args, t)
    return [row[: -(-n // size)] for row, n in zip(args.block_table[t].tolist(), length, strict=True)]


def _check_table(args: PagedArgs, t: int) -> list[int]:
    """Tokens of each row."""
    table, lens, size = args.block_table[t], args.lens[t], _page_size(args, t)
    most = table.shape[1] * size
    length: list[int] = [most] * table.shape[0] if lens is None else lens.tolist()
    if any(not 0 <= n <= most for n in length):
        raise ValueError(f"lens: a value lies outside [0, {most}]")
    pages = next(p.shape[0] for p, by in zip(args.pages, args.by, strict=True) if args.of[by] == t)
    if any(not 0 <= page < pages for row in _used(args, t, length) for page in row):
        raise ValueError(f"block_table: a page in use lies outside [0, {pages})")
    return length


def _rows(args: PagedArgs, i: int) -> list[tuple[int, list[int]]]:
    """(batch row, kept tokens) of index i, of each of its heads."""
    index, count = args.index[i], args.count[i]
    slots, heads = index.shape[-1], index.shape[1] if index.dim() == 3 else 1
    flat = zip(index.reshape(-1, slots).tolist(), count.flatten().tolist(), strict=True)
    return [(row // heads, kept[:n]) for row, (kept, n) in enumerate(flat)]


def _check_rows(args: PagedArgs, i: int, length: list[int]) -> None:
    t = args.of[i]
    refcount, size = args.refcount[t], _page_size(args, t)
    users = [0] * (max((page for row in _used(args, t, length) for page in row), default=0) + 1)
    for row in _used(args, t, length):
        for page in row:
            users[page] += 1
    for b in range(args.index[i].shape[0]):
        check_index(args.index[i][b : b + 1], args.count[i][b : b + 1], length[b])
    for b, kept in _rows(args, i):
        table = args.block_table[t][b].tolist()
        for page in {table[j // size] for j, row in enumerate(kept) if row != j}:
            if users[page] > 1 or (refcount is not None and refcount[page] > 1):
                raise ValueError(f"block_table: row {b} would write into page {page}, which others share")


def _compact(pages: torch.Tensor, table: torch.Tensor, index: torch.Tensor, count: torch.Tensor) -> None:
    size = pages.shape[1]
    for b in range(table.shape[0]):
        for h in range(index.shape[1]) if index.dim() == 3 else [None]:
            at = (b,) if h is None else (b, h)
            kept = index[at][: int(count[at])].long()
            slots = torch.arange(len(kept), device=kept.device)
            kept, slots = kept[kept != slots], slots[kept != slots]
            view = pages if h is None else pages[:, :, h]
            view[table[b, slots // size].long(), slots % size] = view[
                table[b, kept // size].long(), kept % size
            ]


def _freed(args: PagedArgs, t: int, length: list[int]) -> PagedCompaction:
    table, size = args.block_table[t], _page_size(args, t)
    after = [0] * table.shape[0]
    for i, of in enumerate(args.of):
        for b, kept in _rows(args, i) if of == t else []:
            after[b] = max(after[b], -(-len(kept) // size))
    freed = [page for row, n in zip(_used(args, t, length), after, strict=True) for page in row[n:]]
    listed = freed + [-1] * (table.numel() - len(freed))
    return PagedCompaction(table.new_tensor(after), table.new_tensor(listed), table.new_tensor([len(freed)]))
