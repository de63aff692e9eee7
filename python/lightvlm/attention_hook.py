"""Attention of an attached decoder: the model's own where rows are whole, ours where they were shortened.

transformers finds an attention function by name. ``attach`` gives the text decoder's attention the name
``lightvlm_<the model's own>``, registered here together with the mask function of the original: without one,
transformers would make no mask at all and ignore padding without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightvlm_ext import ops
from lightvlm_ext._kv import PACKED_HEAD_DIMS
from lightvlm_ext.ops import KVSegment

if TYPE_CHECKING:
    from .cache_layer import CompactLayer

PREFIX = "lightvlm_"

_FEW = 8
"""So many new tokens are attended one by one over a packed cache; for more it is unpacked."""


def register(original: str) -> str:
    """Register our attention around the implementation
    ``original``; returns the name to set on the text config."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = PREFIX + original
    AttentionInterface.register(name, _attention)
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def check_implementation(name: str | None) -> None:
    """Raise a ValueError unless this attention of transformers is causal without a mask, which
    :func:`causal_rows` relies on."""
    if (name not in ("eager", "sdpa") and "flash" not in (name or "")) or (name or "").startswith("paged|"):
        raise ValueError(
            f"model uses the attention implementation {name!r}; lightvlm works with eager, sdpa and flash attention"
        )


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    run = getattr(module, "_lightvlm_run", None)
    if run is None:
        raise RuntimeError(f"{type(module).__name__} uses lightvlm's attention but no run is attached to it")
    result: tuple[Tensor, Tensor | None] = run.attend(module, query, key, value, attention_mask, **kwargs)
    return result


def original_function(module: nn.Module, original: str) -> Any:
    """The attention function that ``original`` names for this module, eager ones included."""
    import sys

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original == "eager":  # each modelling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[original]


def causal_rows(
    call: Any,
    eager: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: list[int],
    **kwargs: Any,
) -> Tensor:
    """Causal attention over rows that stand flush right behind ``starts`` padding tokens, without a mask.

    query, key, value (B, H, M, D) of one length. Rows that differ in length are attended one by one, exactly
    as they would be at batch 1; padding gets zeros. Returns (B, M, Hq, D).
    """
    # Gaps between the kept tokens' positions would look like packed sequences to FlashAttention's wrapper.
    kwargs["position_ids"] = None
    if not any(starts):
        whole: Tensor = call(module, query, key, value, _eager_mask(query) if eager else None, **kwargs)[0]
        return whole
    batch, heads, length, _ = query.shape
    out = value.new_zeros(batch, length, heads, value.shape[-1])
    for row, start in enumerate(starts):
        part = [x[row : row + 1, :, start:] for x in (query, key, value)]
        out[row, start:] = call(module, *part, _eager_mask(part[0]) if eager else None, **kwargs)[0][0]
    return out


def _eager_mask(query: Tensor) -> Tensor:
    """Eager attention knows causality only from a mask: (1, 1, M, M), additive."""
    length = query.shape[2]
    blocked = torch.full(
        (length, length), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device
    )
    return blocked.triu(1)[None, None]


def decode_rows(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor] | None, scale: float | None
) -> Tensor:
    """Attention of the last S tokens over a cache whose valid keys are [start, end) in each row.

    query (B, Hq, S, D): the tokens that end each row; key, value (B, Hkv, N, D); bounds: starts and ends (B,) int32,
    or None where every row is [0, N). Returns (B, S, Hq, D).
    """
    batch, heads, new, width = query.shape
    kv_heads, stored = key.shape[1], key.shape[2]
    if new == 1 and width in PACKED_HEAD_DIMS and query.dtype == key.dtype and value.shape[-1] == width:
        starts, ends = bounds if bounds is not None else (None, None)
        cached = KVSegment(key.transpose(1, 2), value.transpose(1, 2), lens=ends, leftpad=starts)
        return ops.decode_attention(query.transpose(1, 2), [cached], scale=scale)[0]
    mask = None
    if bounds is not None:
        starts, ends = bounds
        at = torch.arange(stored, device=key.device)
        last = ends[:, None] - new + torch.arange(new, device=key.device)
        mask = ((at >= starts[:, None, None]) & (at <= last[:, :, None]))[:, None]
    elif new > 1:
        mask = torch.ones(new, stored, dtype=torch.bool, device=key.device).tril(stored - new)
    if new == 1:
        # One query: the heads of a group become query rows, so that each key is read once and not once per
        # head.
        packed = query.reshape(batch, kv_heads, heads // kv_heads, width)
        return F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scale).reshape(
            batch, 1, heads, value.shape[-1]
        )
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads
    )
    return out.transpose(1, 2)


def packed_rows(query: Tensor, layer: CompactLayer, scale: float | None) -> Tensor:
    """Attention of the last S tokens over a layer that is packed, but for its buffer, at whose end they stand.

    query (B, Hq, S, D).   Returns (B, S, Hq, D).
    """
    assert layer.packed is not None
    new = query.shape[2]
    if new > _FEW:
        return _unpacked_rows(query, layer, scale)
    starts, ends = layer.bounds()
    used = max(layer.ends)
    key, value = layer.key_storage[:, :used], layer.value_storage[:, :used]
    out = []
    for at in range(new):  # each sees one more of the new tokens
        buffer = KVSegment(key, value, lens=ends - (new - 1 - at), leftpad=starts)
        one = query[:, :, at : at + 1].transpose(1, 2)
        out.append(ops.decode_attention(one, [*layer.packed.segments(), buffer], scale=scale)[0])
    return torch.cat(out, dim=1)


def _unpacked_rows(query: Tensor, layer: CompactLayer, scale: float | None) -> Tensor:
    """For many new tokens: keys and values once more in 16 bits, for as long as this layer takes."""
    assert layer.packed is not None
    keys, values, valid = [], [], []
    for segment in layer.packed.segments():
        pair = (
            (segment.key, segment.value)
            if isinstance(segment, KVSegment)
            else ops.dequantize_kv(segment, query.dtype)
        )
        keys.append(pair[0])
        values.append(pair[1])
        at = torch.arange(pair[0].shape[1], device=query.device)
        valid.append(
            at < segment.lens[:, None] if segment.lens is not None else (at >= 0).expand(len(query), -1)
        )
    starts, ends = layer.bounds()
    used, new = max(layer.ends), query.shape[2]
    at = torch.arange(used, device=query.device)
    last = ends[:, None] - new + torch.arange(new, device=query.device)
    own = (at >= starts[:, None, None]) & (at <= last[:, :, None])
    packed = torch.cat(valid, dim=1)[:, None].expand(-1, new, -1)
    key = torch.cat([*keys, layer.key_storage[:, :used]], dim=1).transpose(1, 2)
    value = torch.cat([*values, layer.value_storage[:, :used]], dim=1).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=torch.cat([packed, own], dim=2)[:, None],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)
