"""flash_attn_func and its packed relatives: sequences of one length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightvlm_ext import _checks

from . import arguments, ops
from .arguments import Window
from .values import check_rows


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    """Attention with flash-attn 2.8's arguments, on whatever attention kernel is there, CPU included.

    Row i of Sq stands at the key p = i + Sk - Sq (bottom-right alignment). It sees key j if not causal or j <= p, and
    within window_size = (left, right): p - left <= j <= p + right, -1 for no limit. Its logit is
    s = softmax_scale * <q, k>, then softcap * tanh(s / softcap) if softcap > 0, minus alibi_slope * |p - j|. A row that
    sees no key has output 0.

    Args:
        q: (B, Sq, Hq, D) fp32, fp16 or bf16, D at most 256.   k, v: (B, Sk, Hkv, D), Hq a multiple of Hkv: query head h
            attends to key head h // (Hq // Hkv). Any strides.
        dropout_p: 0.0; anything else is refused.   softmax_scale: default D ** -0.5.
        alibi_slopes: (Hq,) or (B, Hq) fp32.   deterministic: accepted; the forward pass always is.
        return_attn_probs: also return the log-sum-exp.
        importance_window: also return how much attention each key gets: from the last so many rows (an int, at least
            1), or from given rows (a list or tensor, (W,) or (B, W); negative ones count from the end).

    Returns:
        out (B, Sq, Hq, D) in q's dtype; a tuple that begins with it if more was asked for:
        softmax_lse (B, Hq, Sq) fp32, natural logarithm, -inf for a row that sees no key, and then None, in the place of
        S_dmask, which stands for dropout (return_attn_probs);
        importance (B, Sk) fp32 (importance_window): the softmax weight of each key, mean over the rows that see it,
        then over the query heads (``lightvlm_ext.ops.importance``), from the log-sum-exp of this call.

    Raises:
        TypeError, ValueError: an argument does not fit, is not supported (dropout, gradients), or no backend can run
        the call; the message names each and its reason.
    """
    arguments.check_heads(q, k, v, ("q", "k", "v"), "dense")
    arguments.check_forward_only(q=q, k=k, v=v)
    arguments.check_no_dropout(dropout_p)
    arguments.check_flags(deterministic=deterministic, return_attn_probs=return_attn_probs)
    batch, rows = q.shape[:2]
    keys = k.shape[1]
    _checks.shape(k, "k", (batch, *k.shape[1:]))
    shape = arguments.shape_of_logits(
        q,
        batch,
        rows,
        keys,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    probes = arguments.probes_of(importance_window, q, batch)
    check_rows(None if probes is None else probes.rows, rows)
    out, lse = ops.attend(q, k, v, rows, keys, shape, wants_lse=bool(return_attn_probs) or probes is not None)
    if probes is None:
        return (out, lse, None) if return_attn_probs else out
    scores = ops.importance(q, k, lse, probes, rows, keys, shape)
    return (out, lse, None, scores) if return_attn_probs else (out, scores)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
    """:func:`flash_attn_func` with keys and values in one tensor, kv (B, Sk, 2, Hkv, D). Nothing is copied."""
    _checks.shape(_checks.tensor(kv, "kv"), "kv", ("B", "Sk", 2, "Hkv", "D"))
    k, v = kv.unbind(2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *options, return_attn_probs, importance_window=importance_window)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
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
    """:func:`flash_attn_func` with all three in one tensor, qkv (B, S, 3, H, D). Nothing is copied."""
    _checks.shape(_checks.tensor(qkv, "qkv"), "qkv", ("B", "S", 3, "H", "D"))
    q, k, v = qkv.unbind(2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *options, return_attn_probs, importance_window=importance_window)
