"""Attention and importance as torch ops, so that a compiled function has no graph break at a call site.

Outside torch.compile the same code is called directly: a dispatcher in Python would cost tens of microseconds a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import probing
from .arguments import Probes, Shape
from .call import Call
from .choice import choose
from .result import empty_result, nothing_to_do
from .values import check_rows, check_values


def run(call: Call) -> tuple[Tensor, Tensor]:
    """out and lse, both contiguous, of a call on the backend that is chosen for it."""
    out, lse = empty_result(call) if nothing_to_do(call) else choose(call).run(call)
    return out.contiguous(), lse.contiguous()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    max_q: int,
    max_k: int,
    shape: Shape,
    *,
    wants_lse: bool,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse, both contiguous, of the call that these are fields of."""
    call = _attend_op if torch.compiler.is_compiling() else _attend
    return call(query, key, value, max_q, max_k, *shape, cu_q, cu_k, block_table, wants_lse)


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
    block_table: Tensor | None,
    wants_lse: bool,
) -> tuple[Tensor, Tensor]:
    shape = (max_q, max_k, scale, left, right, softcap, alibi)
    call = Call(query, key, value, *shape, cu_q, cu_k, block_table=block_table, wants_lse=wants_lse)
    check_values(call)
    return run(call)


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
    probes: Probes,
    max_q: int,
    max_k: int,
    shape: Shape,
    *,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    lens: Tensor | None = None,
    leftpad: Tensor | None = None,
    batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """The importance of each key; see probing.importance."""
    where = (cu_q, cu_k, lens, leftpad, batch_idx, block_table)
    call = _importance_op if torch.compiler.is_compiling() else _importance
    return call(query, key, lse, probes.last, probes.rows, max_q, max_k, *shape, *where)


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
    if cu_q is None:
        check_rows(rows, max_q)
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
