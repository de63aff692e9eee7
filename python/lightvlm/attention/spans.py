"""Where each sequence of a call has its queries and keys."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor

from .call import Call


class Span(NamedTuple):
    """Sequence ``row``: queries [q_begin, q_end) of its row (packed: of all), keys [begin, end) of what keys() gives.

    begin and end are 0-dim tensors where only the device knows them.
    """

    row: int
    q_begin: int
    q_end: int
    begin: int | Tensor
    end: int | Tensor

    def query(self, call: Call) -> Tensor:
        """(Sq, Hq, D)."""
        rows = call.query if call.packed else call.query[self.row]
        return rows[self.q_begin : self.q_end]

    def keys(self, call: Call) -> tuple[Tensor, Tensor]:
        """key, value (N, Hkv, D): a view, except where pages are gathered."""
        return _keys(call.key, call, self), _keys(call.value, call, self)


def spans(call: Call) -> list[Span]:
    """All sequences. On a CPU with their lengths as numbers; elsewhere nothing is read from the device.

    Raises:
        ValueError: a packed call on another device than the CPU, where the numbers would have to be fetched.
    """
    if call.cu_q is not None:
        assert call.cu_k is not None
        if call.cu_q.device.type != "cpu":
            raise ValueError("cu_seqlens_q: lengths on a device cannot be read without waiting for it")
        queries, keys = call.cu_q.tolist(), call.cu_k.tolist()
        of_keys = [(0, end - begin) for begin, end in itertools.pairwise(keys)]
        return [Span(row, queries[row], queries[row + 1], *ends) for row, ends in enumerate(of_keys)]
    length, capacity = call.query.shape[1], capacity_of(call)
    begins, ends = _numbers(call.leftpad, call.batch, 0), _numbers(call.lens, call.batch, capacity)
    return [Span(row, 0, length, begins[row], ends[row]) for row in range(call.batch)]


def capacity_of(call: Call) -> int:
    """Keys that a batch row has room for."""
    blocks = 1 if call.block_table is None else call.block_table.shape[1]
    return blocks * call.key.shape[1]


def _numbers(values: Tensor | None, batch: int, default: int) -> list[int] | list[Tensor]:
    if values is None:
        return [default] * batch
    return values.tolist() if values.device.type == "cpu" else list(values.unbind())


def _keys(tensor: Tensor, call: Call, span: Span) -> Tensor:
    known = isinstance(span.end, int)
    if call.block_table is not None:
        blocks = call.block_table[span.row]
        if known:
            blocks = blocks[: -(-span.end // tensor.shape[1])]
        rows = tensor.index_select(0, blocks).flatten(0, 1)
    elif call.cu_k is not None:
        return tensor.narrow(0, int(call.cu_k[span.row]), int(span.end))
    elif call.batch_idx is not None:
        at = call.batch_idx[span.row]
        rows = tensor[int(at)] if known else tensor.index_select(0, at[None])[0]
    else:
        rows = tensor[span.row]
    return rows[: span.end] if known else rows
