"""What tensors of numbers say, checked on a CPU before anything is computed or written.

Inside the ops, so that compiled functions are checked, too. On a device looking would mean waiting: there backends stay
within the buffers, and nobody says that a length was wrong.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .call import Call
from .spans import capacity_of


def check_values(call: Call) -> None:
    """Lengths fit buffers and each other, pages and rows of a cache exist.

    Raises:
        ValueError: named as the arguments of flash-attn's functions.
    """
    if not call.query.is_cpu:
        return
    if call.cu_q is not None and call.cu_k is not None:
        check_offsets(call.cu_q, "cu_seqlens_q", call.query.shape[0], "q", call.max_q, "max_seqlen_q")
        room = call.key.shape[0] if call.block_table is None else None
        check_offsets(call.cu_k, "cu_seqlens_k", room, "k", call.max_k, "max_seqlen_k")
        if call.block_table is not None:
            _check_pages(call.block_table, call.key, call.cu_k.diff().tolist(), "cu_seqlens_k")
    elif not call.dense:
        _check_cache(call)


def check_rows(rows: Tensor | None, length: int) -> None:
    """Every chosen probe row is one of the sequence's. Not looked at while a graph is traced: the op does when it runs.

    Raises:
        ValueError: naming the row.
    """
    if rows is None or rows.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (int(x) for x in rows.aminmax())
    if low < -length or high >= length:
        wrong = low if low < -length else high
        raise ValueError(f"importance_window: has row {wrong}, must be in [-{length}, {length})")


def check_offsets(
    offsets: Tensor, name: str, room: int | None, of: str, longest: int, longest_name: str
) -> None:
    """On a CPU: (B + 1,) offsets ascend, no sequence is longer than said, and all lie in the room that there is (None:
    anywhere).

    Raises:
        ValueError: with the names of the arguments.
    """
    numbers = offsets.tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(numbers)):
        if not 0 <= begin <= end:
            raise ValueError(f"{name}: row {row} is [{begin}, {end}), must ascend from 0 or more")
        if end - begin > longest:
            raise ValueError(
                f"{longest_name}: got {longest}, must be at least {end - begin}, the length of row {row} in {name}"
            )
    if room is not None and numbers[-1] > room:
        raise ValueError(f"{name}: ends at {numbers[-1]}, must be at most {room}, the tokens of {of}")


def _check_cache(call: Call) -> None:
    capacity, new = capacity_of(call), 0 if call.new is None else call.new.key.shape[1]
    lens = [capacity] * call.batch if call.lens is None else call.lens.tolist()
    for row, length in enumerate(lens):
        if not 0 <= length <= capacity - new:
            raise ValueError(no_room(f"row {row} has {length}", new, capacity))
    if call.leftpad is not None:
        for row, pad in enumerate(call.leftpad.tolist()):
            if not 0 <= pad <= lens[row]:
                raise ValueError(
                    f"cache_leftpad: row {row} has {pad}, must be in [0, {lens[row]}], its cache_seqlens"
                )
    if call.batch_idx is not None:
        for row, at in enumerate(call.batch_idx.tolist()):
            if not 0 <= at < call.key.shape[0]:
                raise ValueError(f"cache_batch_idx: row {row} has {at}, must be in [0, {call.key.shape[0]})")
    if call.block_table is not None:
        _check_pages(call.block_table, call.key, [length + new for length in lens], "cache_seqlens")


def _check_pages(table: Tensor, pages: Tensor, lens: list[int], name: str) -> None:
    count, size = pages.shape[:2]
    for row, (blocks, length) in enumerate(zip(table.tolist(), lens, strict=True)):
        room = len(blocks) * size
        if length > room:
            raise ValueError(
                f"{name}: row {row} has {length} keys, must be at most {room}, what block_table has room for"
            )
        for page in blocks[: -(-length // size) if size else 0]:
            if not 0 <= page < count:
                raise ValueError(f"block_table: row {row} has page {page}, must be in [0, {count})")


def no_room(what: str, new: int, capacity: int) -> str:
    """The message about a cache that is too small."""
    return f"cache_seqlens: {what}, must be in [0, {capacity - new}]: {new} new tokens and a capacity of {capacity}"
