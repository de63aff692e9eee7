"""flash_attn_varlen_func and its packed relatives: sequences one after the other, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightvlm_ext import _checks

from . import arguments, ops
from .arguments import Window


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    importance_window: Window = None,
) -> Any:
    """:func:`flash_attn_func` for sequences that stand one after the other. Any of them may be empty.

    Args:
        q: (total_q, Hq, D).   k, v: (total_k, Hkv, D).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32: sequence b has queries [cu_seqlens_q[b], cu_seqlens_q[b + 1]).
            Queries outside all sequences get 0.
        max_seqlen_q, max_seqlen_k: no sequence is longer. On a CPU that is checked. An integer tensor of one number is
            taken, as flash-attn does; on a device that waits for it.
        block_table: (B, max_blocks) int32. k and v are pages then, (P, page_size, Hkv, D): key n of sequence b is in
            page block_table[b, n // page_size], at n % page_size, and cu_seqlens_k only says how many keys there are.
            Any page size; flash-attn itself wants a multiple of 256.
        The others: as in :func:`flash_attn_func`; alibi_slopes (Hq,) or (B, Hq). A row that importance_window names and
            a sequence does not have is ignored there.

    Returns:
        As :func:`flash_attn_func`: out (total_q, Hq, D), softmax_lse (Hq, total_q), importance (total_k,), each key's
        from the rows of its own sequence; with block_table (B, max_blocks * page_size), 0 past a sequence's end.
    """
    arguments.check_heads(q, k, v, ("q", "k", "v"), "packed" if block_table is None else "pages")
    arguments.check_forward_only(q=q, k=k, v=v)
    arguments.check_no_dropout(dropout_p)
    arguments.check_flags(deterministic=deterministic, return_attn_probs=return_attn_probs)
    arguments.check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", q)
    arguments.check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", q)
    batch = cu_seqlens_q.shape[0] - 1
    _checks.shape(cu_seqlens_k, "cu_seqlens_k", (batch + 1,))
    max_q = _longest(max_seqlen_q, "max_seqlen_q")
    max_k = _longest(max_seqlen_k, "max_seqlen_k")
    if block_table is not None:
        arguments.check_table(block_table, q, batch)
    shape = arguments.shape_of_logits(
        q,
        batch,
        max_q,
        max_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    probes = arguments.probes_of(importance_window, q, batch)
    out, lse = ops.attend(
        q,
        k,
        v,
        max_q,
        max_k,
        shape,
        wants_lse=bool(return_attn_probs) or probes is not None,
        cu_q=cu_seqlens_q,
        cu_k=cu_seqlens_k,
        block_table=block_table,
    )
    if probes is None:
        return (out, lse, None) if return_attn_probs else out
    scores = ops.importance(
        q, k, lse, probes, max_q, max_k, shape, cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, block_table=block_table
    )
    return (out, lse, None, scores) if return_attn_probs else (out, scores)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    importance_window: Window = None,
) -> Any:
    """:func:`flash_attn_varlen_func` with keys and values in one tensor, kv (total_k, 2, Hkv, D)."""
    _checks.shape(_checks.tensor(kv, "kv"), "kv", ("total_k", 2, "Hkv", "D"))
    options = (
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, *options, importance_window=importance_window)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    importance_window: Window = None,
) -> Any:
    """:func:`flash_attn_varlen_func` with all three in one tensor, qkv (total, 3, H, D)."""
    _checks.shape(_checks.tensor(qkv, "qkv"), "qkv", ("total", 3, "H", "D"))
    options = (
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, *options, importance_window=importance_window)


def _longest(length: object, name: str) -> int:
    if isinstance(length, Tensor) and length.dim() == 0 and length.dtype in (torch.int32, torch.int64):
        length = int(length)
    return _checks.integer(length, name, 0)
