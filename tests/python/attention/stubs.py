"""Stand-ins for GPU kernels: their signatures and conventions, computed from the formula on a CPU.

They pin down what is handed over and what is made of the answer. Whether the kernels do the same, test_attention_gpu.py
asks.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from torch import Tensor

from . import oracle
from .oracle import Shaping


def fa2_row(query: Tensor, key: Tensor, value: Tensor, shaping: Shaping, row: int) -> tuple[Tensor, Tensor]:
    """One sequence as flash-attn 2 computes it: +inf for a row that sees nothing, and causal ALiBi adds slope * j."""
    out, lse = oracle.attend(query, key, value, shaping, row)
    rows, keys = query.shape[0], key.shape[0]
    left, right = shaping.window_size
    triangle = left < 0 and (right == 0 or shaping.causal)
    if shaping.alibi_slopes is not None and triangle and rows > 1:
        slopes = shaping.alibi_slopes if shaping.alibi_slopes.dim() == 1 else shaping.alibi_slopes[row]
        lse = lse + slopes.double()[:, None] * (torch.arange(rows) + keys - rows)
    return out.to(query.dtype), torch.where(lse == -math.inf, math.inf, lse).float()


def shaping_of(
    softmax_scale: Any, causal: Any, window_size: Any, softcap: Any, alibi_slopes: Any = None
) -> Shaping:
    window = tuple(-1 if side is None else side for side in window_size)
    return Shaping(softmax_scale, causal, (window[0], window[1]), softcap, alibi_slopes)


def dense(q: Tensor, k: Tensor, v: Tensor, shaping: Shaping) -> tuple[Tensor, Tensor]:
    assert q.shape[0] == k.shape[0] == v.shape[0]
    rows = [fa2_row(q[b], k[b], v[b], shaping, b) for b in range(q.shape[0])]
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


def packed(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, begins: list[int], used: list[int], shaping: Shaping
) -> tuple[Tensor, Tensor]:
    """Sequence b has the keys [begins[b], begins[b] + used[b])."""
    assert cu_q.dtype == torch.int32
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), math.inf)
    at = cu_q.tolist()
    for b, (begin, count) in enumerate(zip(begins, used, strict=True)):
        own, keys = slice(at[b], at[b + 1]), slice(begin, begin + count)
        out[own], lse[:, own] = fa2_row(q[own], k[keys], v[keys], shaping, b)
    return out, lse


def pages_of(pages: Tensor, table: Tensor, lens: list[int]) -> list[Tensor]:
    size = pages.shape[1]
    return [pages[row[: -(-n // size)].long()].flatten(0, 1)[:n] for row, n in zip(table, lens, strict=True)]


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, table: Tensor | None, shaping: Shaping
) -> tuple[Tensor, Tensor]:
    used = cu_k.diff().tolist()
    if table is None:
        return packed(q, k, v, cu_q, cu_k[:-1].tolist(), used, shaping)
    assert k.shape[1] % 256 == 0
    keys, values = (torch.cat(pages_of(x, table, used)) for x in (k, v))
    begins = [sum(used[:b]) for b in range(len(used))]
    return packed(q, keys, values, cu_q, begins, used, shaping)


# --- flash_attn 2.8.3


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert return_attn_probs
    return *dense(q, k, v, shaping_of(softmax_scale, causal, window_size, softcap, alibi_slopes)), None


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert return_attn_probs
    assert max_seqlen_q >= cu_seqlens_q.diff().max()
    assert max_seqlen_k >= cu_seqlens_k.diff().max()
    shaping = shaping_of(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return *varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, shaping), None


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False,
):  # type: ignore[no-untyped-def]  # fmt: skip
    from .test_kvcache import turned

    assert return_softmax_lse
    assert block_table is None or (cache_leftpad is None and cache_batch_idx is None)
    shaping = shaping_of(softmax_scale, causal, window_size, softcap, alibi_slopes)
    rows = []
    for b, length in enumerate(cache_seqlens.tolist()):
        query, at = q[b], b if cache_batch_idx is None else int(cache_batch_idx[b])
        end = length + (0 if k is None else k.shape[1])
        if k is not None:
            key = k[b]
            if rotary_cos is not None:
                tables = (rotary_cos, rotary_sin)
                key = turned(key, *tables, list(range(length, end)), rotary_interleaved).to(k.dtype)
                masked = causal or max(window_size) >= 0
                positions = [length + i if masked else length for i in range(q.shape[1])]
                query = turned(query, *tables, positions, rotary_interleaved).to(q.dtype)
            for cache, new in ((k_cache, key), (v_cache, v[b])):
                for n in range(length, end):
                    page = (at, n) if block_table is None else divmod(n, cache.shape[1])
                    place = page if block_table is None else (int(block_table[b, page[0]]), page[1])
                    cache[place] = new[n - length]
        begin = 0 if cache_leftpad is None else int(cache_leftpad[b])
        if block_table is None:
            keys, values = k_cache[at, begin:end], v_cache[at, begin:end]
        else:
            keys, values = (pages_of(x, block_table[b : b + 1], [end])[0] for x in (k_cache, v_cache))
        rows.append(fa2_row(query, keys, values, shaping, b))
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


FLASH_ATTN_2 = types.SimpleNamespace(
    flash_attn_func=flash_attn_func,
    flash_attn_varlen_func=flash_attn_varlen_func,
    flash_attn_with_kvcache=flash_attn_with_kvcache,
)


# --- FlashAttention 3


def fa3_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert return_attn_probs
    return dense(q, k, v, shaping_of(softmax_scale, causal, window_size, softcap))


def fa3_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """An early version, without a flag for the log-sum-exp."""
    return varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, None, shaping_of(softmax_scale, causal, window_size, softcap)
    )


def fa3_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert return_softmax_lse
    assert k is None
    shaping = shaping_of(softmax_scale, causal, window_size, softcap)
    lens = cache_seqlens.tolist()
    if cu_seqlens_q is not None:
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        keys, values = (torch.cat(pages_of(x, page_table, lens)) for x in (k_cache, v_cache))
        begins = [sum(lens[:b]) for b in range(len(lens))]
        return *packed(q, keys, values, cu_seqlens_q, begins, lens, shaping), None, None
    rows = []
    for b, end in enumerate(lens):
        at = b if cache_batch_idx is None else int(cache_batch_idx[b])
        begin = 0 if cache_leftpad is None else int(cache_leftpad[b])
        if page_table is None:
            held = k_cache[at, begin:end], v_cache[at, begin:end]
        else:
            held = tuple(pages_of(x, page_table[b : b + 1], [end])[0][begin:] for x in (k_cache, v_cache))
        rows.append(fa2_row(q[b], *held, shaping, b))
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows]), None, None


FLASH_ATTN_3 = types.SimpleNamespace(
    flash_attn_func=fa3_func,
    flash_attn_varlen_func=fa3_varlen_func,
    flash_attn_with_kvcache=fa3_with_kvcache,
)


# --- FlashAttention 4


def fa4_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, mask_mod=None, return_lse=False,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert return_lse
    assert all(side is None or side >= 0 for side in window_size)
    return dense(q, k, v, shaping_of(softmax_scale, causal, window_size, softcap))


def fa4_varlen_func(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
    seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
):  # type: ignore[no-untyped-def]  # fmt: skip
    assert return_lse
    return varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, None, shaping_of(softmax_scale, causal, window_size, softcap)
    )


FLASH_ATTN_4 = types.SimpleNamespace(flash_attn_func=fa4_func, flash_attn_varlen_func=fa4_varlen_func)


# --- torch


def flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
    block_table=None, num_splits=None,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """aten::_flash_attention_forward."""
    assert dropout_p == 0.0
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    window = tuple(-1 if side is None else side for side in (window_size_left, window_size_right))
    shaping = shaping_of(scale, is_causal, window, 0.0, alibi_slopes)
    if cum_seq_q is None:
        assert (max_q, max_k) == (query.shape[1], key.shape[1])
        found = dense(query, key, value, shaping)
    elif block_table is not None:
        offsets = torch.cat([seqused_k.new_zeros(1), seqused_k.cumsum(0)]).int()
        found = varlen(query, key, value, cum_seq_q, offsets, block_table, shaping)
    else:
        used = cum_seq_k.diff() if seqused_k is None else seqused_k
        found = packed(query, key, value, cum_seq_q, cum_seq_k[:-1].tolist(), used.tolist(), shaping)
    return *found, None, None, None


def cudnn_attention(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale=None
):  # type: ignore[no-untyped-def]  # fmt: skip
    """aten::_scaled_dot_product_cudnn_attention: heads first, and a log-sum-exp with a dimension of 1."""
    assert attn_bias is None
    assert compute_log_sumexp
    assert not is_causal or query.shape[2] == key.shape[2]
    out, lse = dense(*(x.transpose(1, 2) for x in (query, key, value)), Shaping(scale, is_causal))
    return out.transpose(1, 2), lse[..., None], None, None, query.shape[2], key.shape[2], None, None, None
