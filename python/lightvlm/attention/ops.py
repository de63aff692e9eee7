"""Attention and importance as torch ops, so that a compiled function has no graph break at a call site.

Outside torch.compile the same code is called directly: a dispatcher in Python would cost tens of microseconds a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import probing
from .call import Call
from .choice import choose
from .result import empty_result, nothing_to_do


def run(call: Call) -> tuple[Tensor, Tensor]:
    """out and lse of a call, on the backend that is chosen for it."""
    if nothing_to_do(call):
        return empty_result(call)
    return choose(call).run(call)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    alibi: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    lens: Tensor | None = None,
    leftpad: Tensor | None = None,
    batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """out and lse (contiguous) of the call that these are the fields of."""
    args = (query, key, value, max_q, max_k, scale, left, right, softcap, alibi, cu_q, cu_k, lens, leftpad)
    call = _attend_op if torch.compiler.is_compiling() else _attend
    return call(*args, batch_idx, block_table, splits)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    alibi: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    lens: Tensor | None,
    leftpad: Tensor | None,
    batch_idx: Tensor | None,
    block_table: Tensor | None,
    splits: int,
) -> tuple[Tensor, Tensor]:
    where = (alibi, cu_q, cu_k, lens, leftpad, batch_idx, block_table, splits)
    out, lse = run(Call(query, key, value, max_q, max_k, scale, left, right, softcap, *where))
    return out.contiguous(), lse.contiguous()


_attend_op = torch.library.custom_op("lightvlm_attention::attend", _attend, mutates_args=())


@_attend_op.register_fake
def _attend_fake(query: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    shape = query.shape
    packed = len(shape) == 3
    of_rows = (shape[1], shape[0]) if packed else (shape[0], shape[2], shape[1])
    return query.new_empty(shape), query.new_empty(of_rows, dtype=torch.float32)


def importance(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    last: int,
    rows: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    alibi: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    lens: Tensor | None = None,
    leftpad: Tensor | None = None,
    batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """The importance of each key from the rows that `last` or `rows` names; see probing.importance."""
    args = (query, key, lse, last, rows, max_q, max_k, scale, left, right, softcap, alibi, cu_q, cu_k, lens)
    call = _importance_op if torch.compiler.is_compiling() else _importance
    return call(*args, leftpad, batch_idx, block_table)


def _importance(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    last: int,
    rows: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    alibi: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    lens: Tensor | None,
    leftpad: Tensor | None,
    batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> Tensor:
    where = (alibi, cu_q, cu_k, lens, leftpad, batch_idx, block_table)
    call = Call(query, key, key, max_q, max_k, scale, left, right, softcap, *where)
    return probing.importance(call, lse, last, rows)


_importance_op = torch.library.custom_op("lightvlm_attention::importance", _importance, mutates_args=())


@_importance_op.register_fake
def _importance_fake(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    last: int,
    rows: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    alibi: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    lens: Tensor | None,
    leftpad: Tensor | None,
    batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> Tensor:
    if block_table is not None:
        shape: tuple[int, ...] = (block_table.shape[0], block_table.shape[1] * key.shape[1])
    elif cu_q is not None:
        shape = (key.shape[0],)
    else:
        shape = (query.shape[0], key.shape[1])
    return query.new_empty(shape, dtype=torch.float32)
