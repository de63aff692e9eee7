"""Arguments of compact_paged_kv_, checked and flattened, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from . import _checks
from ._compact_args import per_layer, sequence

T = TypeVar("T")


class PagedCompaction(NamedTuple):
    """What the rows of one block table have after compact_paged_kv_, and what they gave up.

    row_pages: (B,) int32, pages that row b still has: its first row_pages[b] blocks.
    freed: (B * max_blocks,) int32, pages that came free, row by row, in the order of their blocks; -1 past
    freed_count. A page that other rows still name is listed once for each row that gave it up.
    freed_count: (1,) int32.
    """

    row_pages: torch.Tensor
    freed: torch.Tensor
    freed_count: torch.Tensor

    def freed_pages(self) -> list[int]:
        """The pages that came free, on the host (waits for the device): what `PagePool.free` takes."""
        listed: list[int] = self.freed.tolist()
        return listed[: listed.index(-1)] if -1 in listed else listed


@dataclass
class PagedArgs:
    """What moves, by which index and which table.

    pages: every tensor that moves.   by: for each, its index.   of: for each index, its table; ascending.
    """

    pages: list[torch.Tensor] = field(default_factory=list)
    by: list[int] = field(default_factory=list)
    index: list[torch.Tensor] = field(default_factory=list)
    count: list[torch.Tensor] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    block_table: list[torch.Tensor] = field(default_factory=list)
    lens: list[torch.Tensor | None] = field(default_factory=list)
    refcount: list[torch.Tensor | None] = field(default_factory=list)


MAX_INDEXES = 124  # of one table: what fits into a kernel's parameters


def check_paged(
    key_pages: object,
    value_pages: object,
    block_table: object,
    index: object,
    count: object,
    lens: object,
    refcount: object,
    extras: object,
) -> PagedArgs:
    """Checks types, shapes, dtypes and devices; raises TypeError or ValueError naming the argument."""
    if isinstance(key_pages, torch.Tensor):
        key_pages, value_pages = [key_pages], [value_pages]
        extras = [sequence(extras, "extras")]
        single = True
        for value, name in ((block_table, "block_table"), (index, "index"), (count, "count")):
            _checks.tensor(value, name)
    else:
        single = False
    keys = [
        _checks.tensor(k, _at("key_pages", i, single)) for i, k in enumerate(sequence(key_pages, "key_pages"))
    ]
    values = per_layer(value_pages, "value_pages", len(keys), "key_pages")
    more = _extras(extras, len(keys))
    args = PagedArgs()
    if not keys:
        return args
    _checks.shape(keys[0], _at("key_pages", 0, single), ("P", "page_size", "Hkv", "D"))
    _add_tables(args, keys, block_table, lens, refcount, single)
    of_layer = _add_indexes(args, keys, index, count, single)
    for layer, key in enumerate(keys):
        name = _at("key_pages", layer, single)
        _checks.shape(key, name, ("P", "page_size", "Hkv", "D"))
        if key.shape[1] == 0:
            raise ValueError(f"{name}: has shape {tuple(key.shape)}, a page must hold a token")
        first = keys[0] if len(args.block_table) == 1 else key
        pages, size = first.shape[:2]
        heads = key.shape[2]
        value_name = _at("value_pages", layer, single)
        value = _checks.tensor(values[layer], value_name)
        _checks.shape(key, name, (pages, size, "Hkv", "D"))
        _checks.shape(value, value_name, (pages, size, heads, "D"))
        by = of_layer[layer]
        chosen = args.index[by]
        if chosen.dim() == 3 and chosen.shape[1] != heads:
            shape = tuple(chosen.shape)
            raise ValueError(f"index: has shape {shape}, must be ({shape[0]}, {heads}, M) for {name}")
        extra_shape = (pages, size, heads) if chosen.dim() == 3 else (pages, size)
        moving = [(key, name), (value, value_name)]
        for i, extra in enumerate(more[layer]):
            extra_name = f"extras[{i}]" if single else f"extras[{layer}][{i}]"
            extra = _checks.tensor(extra, extra_name)
            if tuple(extra.shape[: len(extra_shape)]) != extra_shape:
                wanted = ", ".join(map(str, extra_shape))
                raise ValueError(f"{extra_name}: has shape {tuple(extra.shape)}, must be ({wanted}, ...)")
            moving.append((extra, extra_name))
        for tensor, tensor_name in moving:
            _checks.same_device(tensor, tensor_name, keys[0], "the other arguments")
            args.pages.append(tensor)
            args.by.append(by)
    return args


def _at(name: str, i: int, single: bool) -> str:
    return name if single else f"{name}[{i}]"


def _extras(extras: object, layers: int) -> list[Sequence[object]]:
    entries = sequence(extras, "extras")
    if len(entries) not in (0, layers):
        raise ValueError(
            f"extras: has {len(entries)} entries, must have one for each of the {layers} layers, or none"
        )
    if not entries:
        return [()] * layers
    return [
        (entry,) if isinstance(entry, torch.Tensor) else sequence(entry, f"extras[{i}]")
        for i, entry in enumerate(entries)
    ]


def _ints(value: object, name: str, shape: Sequence[int | str], other: torch.Tensor) -> torch.Tensor:
    """An int32 tensor of that shape; a copy where it is not contiguous."""
    tensor = _checks.tensor(value, name)
    _checks.dtype(tensor, name, torch.int32)
    _checks.shape(tensor, name, shape)
    _checks.same_device(tensor, name, other, "the other arguments")
    return tensor.contiguous()


def _add_tables(
    args: PagedArgs,
    keys: list[torch.Tensor],
    block_table: object,
    lens: object,
    refcount: object,
    single: bool,
) -> None:
    shared = isinstance(block_table, torch.Tensor)
    tables = [block_table] if shared else per_layer(block_table, "block_table", len(keys), "key_pages")
    for t, table in enumerate(tables):
        table = _ints(table, _at("block_table", t, shared), ("B", "max_blocks"), keys[0])
        args.block_table.append(table)
        key = keys[t]
        for name, value, shape, into in (
            ("lens", lens, (table.shape[0],), args.lens),
            ("refcount", refcount, key.shape[:1], args.refcount),
        ):
            if isinstance(value, (list, tuple)):
                if shared:
                    raise TypeError(f"{name}: got a list, must be a torch.Tensor as block_table is")
                value = per_layer(value, name, len(keys), "key_pages")[t]
                into.append(None if value is None else _ints(value, f"{name}[{t}]", shape, keys[0]))
            else:
                into.append(None if value is None else _ints(value, name, shape, keys[0]))


def _add_indexes(
    args: PagedArgs, keys: list[torch.Tensor], index: object, count: object, single: bool
) -> list[int]:
    """Adds the indexes, and says which one each layer moves by."""
    tables = args.block_table
    if isinstance(index, torch.Tensor):
        # All layers keep the same rows: one index for each table.
        _checks.tensor(count, "count")
        for t, table in enumerate(tables):
            _add_index(args, index, count, "", table, t, keys)
        return [layer if len(tables) > 1 else 0 for layer in range(len(keys))]
    indexes = per_layer(index, "index", len(keys), "key_pages")
    counts = per_layer(count, "count", len(keys), "key_pages")
    if len(tables) == 1 and len(keys) > MAX_INDEXES:
        raise ValueError(f"index: has {len(keys)} entries, at most {MAX_INDEXES} may share one block table")
    for layer in range(len(keys)):
        t = layer if len(tables) > 1 else 0
        _add_index(args, indexes[layer], counts[layer], f"[{layer}]", tables[t], t, keys)
    return list(range(len(keys)))


def _add_index(
    args: PagedArgs, index: object, count: object, suffix: str, table: torch.Tensor, of: int,
    keys: list[torch.Tensor],
) -> None:  # fmt: skip
    batch = table.shape[0]
    index = _checks.tensor(index, f"index{suffix}")
    per_head = index.dim() == 3
    heads = index.shape[1] if per_head else 0
    shape: tuple[int | str, ...] = (batch, heads, "M") if per_head else (batch, "M")
    args.index.append(_ints(index, f"index{suffix}", shape, keys[0]))
    counts = (batch, heads) if per_head else (batch,)
    args.count.append(_ints(count, f"count{suffix}", counts, keys[0]))
    args.of.append(of)


def allocate(args: PagedArgs) -> list[PagedCompaction]:
    """Room for the results of each table. freed_count is zero, as the kernel wants it."""
    return [
        PagedCompaction(table.new_empty(table.shape[0]), table.new_empty(table.numel()), table.new_zeros(1))
        for table in args.block_table
    ]
