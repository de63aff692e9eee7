"""A call on a cache as one torch op that declares what it writes; `ops.py` says why ops, and when they are used."""

from __future__ import annotations

import torch
from torch import Tensor

from .append import append_
from .call import Call, NewTokens
from .choice import choose
from .result import empty_result, nothing_to_do
from .rotary import rotate
from .values import check_values


def attend(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """out and lse (contiguous), and the rotated query if it was rotated and wanted, else an empty tensor.

    k and v are rotated and written into k_cache and v_cache first. rest: as in _attend below.
    """
    call = _attend_op if torch.compiler.is_compiling() else _attend
    return call(query, k_cache, v_cache, *rest)  # type: ignore[arg-type]


def _attend(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    at_once: bool,
    rotated_wanted: bool,
    wants_lse: bool,
    lens: Tensor | None,
    leftpad: Tensor | None,
    batch_idx: Tensor | None,
    block_table: Tensor | None,
    splits: int,
    capacity: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    alibi: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of a Call and of its NewTokens; capacity: tokens that a row has room for."""
    if block_table is None and batch_idx is None and k_cache.shape[0] > query.shape[0]:
        # A whole cache is a dense call, in which kernels want one row of keys for each row of queries.
        k_cache, v_cache = k_cache[: query.shape[0]], v_cache[: query.shape[0]]
    new = None if k is None or v is None else NewTokens(k, v, cos, sin, interleaved, at_once)
    shape = (query.shape[1], capacity, scale, left, right, softcap, alibi)
    where = (None, None, lens, leftpad, batch_idx, block_table, splits)
    call = Call(query, k_cache, v_cache, *shape, *where, new, wants_lse)
    check_values(call)
    backend = None if nothing_to_do(call) else choose(call)  # raises before anything is written
    rotated = query.new_empty(0)
    if new is not None:
        writer = backend if backend is not None and backend.appends else None
        rotates = writer is not None and writer.rotates and not rotated_wanted and _as_flash_attn(call, new)
        if new.cos is not None and not rotates:
            _rotate(call, new)
            rotated = call.query if rotated_wanted else rotated
        if writer is None:
            _write(call, new)
    out, lse = empty_result(call) if backend is None else backend.run(call)
    return out.contiguous(), lse.contiguous(), rotated


def _as_flash_attn(call: Call, new: NewTokens) -> bool:
    """Whether flash-attn would rotate the queries of this call as `at_once` says. It goes by the mask that it is given,
    and that may be none where the caller's window hid nothing."""
    return call.max_q == 1 or new.at_once == (not call.causal and not call.windowed)


def _rotate(call: Call, new: NewTokens) -> None:
    """Rotates query and new keys: the call is one without rotary embedding afterwards."""
    key, lens = new.key, call.lens
    assert lens is not None
    assert new.cos is not None
    assert new.sin is not None
    first = lens[:, None]
    steps = torch.arange(max(key.shape[1], call.query.shape[1]), device=key.device)
    rows = steps[: 1 if new.at_once else call.query.shape[1]]
    new.key = rotate(key, new.cos, new.sin, first + steps[: key.shape[1]], new.interleaved)
    call.query = rotate(call.query, new.cos, new.sin, first + rows, new.interleaved)
    new.cos = new.sin = None


def _write(call: Call, new: NewTokens) -> None:
    """Writes the new tokens: the call is one on a plain cache afterwards."""
    lens = call.lens
    assert lens is not None
    clip = not new.key.is_cpu
    append_((call.key, call.value), (new.key, new.value), lens, call.batch_idx, call.block_table, clip=clip)
    call.lens, call.new = call.ends(), None


_attend_op = torch.library.custom_op(
    "lightvlm_attention::attend_cache", _attend, mutates_args=("k_cache", "v_cache")
)


@_attend_op.register_fake
def _attend_fake(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, heads, _ = query.shape
    _, _, cos, _, _, _, rotated_wanted = rest[:7]
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32)
    rotated = query.new_empty(query.shape if cos is not None and rotated_wanted else 0)
    return query.new_empty(query.shape), lse, rotated
