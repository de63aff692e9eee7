"""``attn_implementation="lightvlm"``: models of transformers on the attention functions of this package.

>>> lightvlm.register_attention()
>>> model = AutoModelForImageTextToText.from_pretrained(..., attn_implementation="lightvlm")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import arguments
from .dense import flash_attn_func
from .kvcache import flash_attn_with_kvcache
from .masked import attend_masked
from .row_spans import RowSpans, from_mask, is_spans
from .transformers_mask import make_mask
from .varlen import flash_attn_varlen_func

NAME = "lightvlm"

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_REFUSED = {
    "position_bias": "a learned bias of positions cannot be added to the logits",
    "cache": "continuous batching (a paged cache of transformers) is not supported",
    "block_table": "continuous batching (a paged cache of transformers) is not supported",
    "head_mask": "heads cannot be masked",
}


def register_attention() -> None:
    """Make ``attn_implementation="lightvlm"`` known to transformers, with its mask function.

    Afterwards ``from_pretrained(..., attn_implementation="lightvlm")`` works, and
    ``model.set_attn_implementation("lightvlm")``, also for a part of a model:
    ``{"text_config": "lightvlm", "vision_config": "sdpa"}``. Nothing else of transformers changes. May be called again.
    Importing lightvlm does not call it, as that would import transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Args:
        query: (B, Hq, Sq, D).   key: (B, Hkv, Sk, D).   value: (B, Hkv, Sk, Dv).   Hq a multiple of Hkv.
        attention_mask: what :func:`.transformers_mask.make_mask` made, or an explicit 4-D mask, bool or additive, which
            then alone says what is seen. None: nothing is hidden, or what causality hides (last row at the last key).
        dropout: 0.   scaling: default D ** -0.5.   is_causal: default what the module says, or True.
        sliding_window: causal rows see this many keys, themselves included. None: no window. Ignored if not causal, as
            under sdpa: the mask alone says it then, and layers disagree about whether the row itself counts.
        softcap: None or 0: none.   s_aux: (Hq,) logits of attention sinks: a key without a value that takes its share.
        options: cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: sequences one after the other, as
            flash_attn_varlen_func has them. position_ids do not tell sequences apart: the mask does.

    Returns:
        (B, Sq, Hq, Dv), None. Rows of padding have finite values that mean nothing; rows that see no key are 0.

    Raises:
        ValueError, TypeError: what would otherwise be ignored: dropout, a bias, a paged cache, weights that are asked
        for (output_attentions), a mask of another kind, and what flash_attn_func refuses.
    """
    _refuse(dropout, attention_mask, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    width = value.shape[-1]
    q, k, v = _prepare(query, key, value)
    cap = float(softcap or 0.0)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None and not is_spans(attention_mask):
        _check(q, k, v)
        return attend_masked(q, k, v, attention_mask, scale, cap, s_aux)[..., :width], None
    spans = None if attention_mask is None else from_mask(attention_mask)
    if spans is not None and q.shape[1] > 1:  # the spans of one row hold whatever causality hides
        causal = spans.causal
    window = _window(spans, causal, sliding_window)
    shaping: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": window,
        "softcap": cap,
    }
    if spans is not None:
        out, lse = flash_attn_with_kvcache(
            q, k, v, cache_seqlens=spans.end, cache_leftpad=spans.begin, return_softmax_lse=True, **shaping
        )
    elif all(options.get(name) is not None for name in _PACKED):
        out, lse = _packed(q, k, v, options, shaping)
    else:
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **shaping)
    if s_aux is not None:
        out = _with_sinks(out, lse, s_aux)
    return out[..., :width], None


def _refuse(dropout: float, mask: object, options: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"dropout: got {dropout}, must be 0: lightvlm's attention is for inference; call model.eval(), or use sdpa"
        )
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: got {type(mask).__name__}, must be a tensor or None")
    if options.get("output_attentions"):
        raise ValueError(
            "output_attentions: lightvlm's attention has no weights to return; use eager attention for them"
        )
    for name, reason in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"{name}: {reason} by lightvlm's attention; use sdpa or eager")


def _prepare(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens before heads, one head_dim, and the dtype of autocast where that is on."""
    tensors = [x.transpose(1, 2) for x in (query, key, value)]
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        tensors = [x.to(torch.get_autocast_dtype(kind)) for x in tensors]
    width = max(x.shape[-1] for x in tensors)
    tensors = [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    return q, k, v


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    arguments.check_heads(query, key, value, ("query", "key", "value"), "dense")
    arguments.check_forward_only(query=query, key=key, value=value)


def _window(spans: RowSpans | None, causal: bool, sliding_window: int | None) -> tuple[int, int]:
    """flash-attn's window_size: the narrower of what the mask and, if causal, the layer say."""
    sides = [] if spans is None or spans.left < 0 else [spans.left]
    if sliding_window is not None and causal:
        sides.append(int(sliding_window) - 1)
    left = min(sides, default=-1)
    return left, 0 if causal else left


def _packed(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], shaping: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, D) and lse (B, Hq, Sq) of sequences that stand one after the other in all B rows."""
    batch = q.shape[0]
    cu_q, cu_k = (options[name].to(q.device, torch.int32) for name in _PACKED[:2])
    max_q, max_k = (int(options[name]) for name in _PACKED[2:])
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, return_attn_probs=True, **shaping)
    return out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention in which a further key of logit ``sinks`` (Hq,) and value 0 takes part.

    The weights sum to exp(lse) before and exp(lse) + exp(sink) with it; the share of the real keys is their quotient.
    """
    share = torch.sigmoid(lse - sinks.float()[:, None])
    return (out.float() * share.transpose(1, 2).unsqueeze(-1)).to(out.dtype)
