"""Attention of new tokens over what a layer of a CompactCache stores: segments of 16, 8, 4 and 2 bits, and a buffer.

A few new tokens are attended one by one, straight from the segments (``decode_attention``); for more of them, and for
heads of a width that the op does not take, keys and values are laid out in 16 bits for as long as the layer takes.
Where the layer wants it, the attention that each stored token receives is added up in the same pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext._kv import PACKED_HEAD_DIMS
from lightvlm_ext.ops import KVSegment
from lightvlm_ext.ops.append_attend import append_attend_checked
from lightvlm_ext.ops.decode_attention import decode_attention_checked

if TYPE_CHECKING:
    from .cache_layer import CompactLayer

FEW = 8
"""So many new tokens are attended one by one."""


def attend_new(query: Tensor, layer: CompactLayer, scale: float | None) -> Tensor:
    """Write the token that waits, and let it attend to all that the buffer holds, itself included.

    query (B, Hq, 1, D), which :func:`fits`.   Returns (B, 1, Hq, D).
    """
    waiting, layer.waiting = layer.waiting, None
    assert waiting is not None
    segment, masses = layer.segments()[0], layer.masses()
    assert isinstance(segment, KVSegment)
    new_key, new_value, one = (x.transpose(1, 2) for x in (waiting.key, waiting.value, query))
    return append_attend_checked(
        _last_contiguous(one),
        segment.key,
        segment.value,
        _last_contiguous(new_key),
        _last_contiguous(new_value),
        waiting.before,
        waiting.starts,
        segment.block_table,
        query.shape[3] ** -0.5 if scale is None else scale,
        None if masses is None else masses[0],
    )[0]


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attend_stored(query: Tensor, layer: CompactLayer, scale: float | None) -> Tensor:
    """Attention of the last S tokens, which end each row of the layer's buffer.

    query (B, Hq, S, D).   Returns (B, S, Hq, D).
    """
    new, dense = query.shape[2], layer.packed is None
    taken = fits(query, layer)
    if taken and (new == 1 or (new <= FEW and not (dense and layer.mass is None))):
        return _one_by_one(query, layer, scale)
    out = _laid_out(query, layer, scale)
    if layer.mass is not None:
        if taken:  # the last tokens of a question speak for it
            _one_by_one(query[:, :, -FEW:], layer, scale)
        else:
            _add_mass(query, layer, scale)
    return out


def reads_quickly(query: Tensor, layer: CompactLayer) -> bool:
    """Whether one new token is attended straight from the segments. transformers' attention without a mask reads each
    key once for every head of its group."""
    return query.shape[2] == 1 and fits(query, layer)


def fits(query: Tensor, layer: CompactLayer) -> bool:
    """Whether decode_attention takes such heads; a layer is packed only where it does."""
    width, stored = query.shape[3], layer.value_storage
    same = stored.shape[-1] == width and query.dtype == layer.key_storage.dtype == stored.dtype
    return layer.packed is not None or (same and width in PACKED_HEAD_DIMS)


def _one_by_one(query: Tensor, layer: CompactLayer, scale: float | None) -> Tensor:
    new = query.shape[2]
    masses = layer.masses()
    if scale is None:
        scale = query.shape[3] ** -0.5
    out = []
    for at in range(new):  # each sees one more of the new tokens
        one = query[:, :, at : at + 1].transpose(1, 2)
        segments = layer.segments(behind=new - 1 - at)
        out.append(decode_attention_checked(_last_contiguous(one), segments, scale, masses)[0])
    return out[0] if new == 1 else torch.cat(out, dim=1)


def _add_mass(query: Tensor, layer: CompactLayer, scale: float | None) -> None:
    """What :func:`_one_by_one` adds, for a buffer of any width of heads; each row speaks for itself."""
    assert layer.mass is not None
    starts, ends = layer.bounds()
    key = layer.buffer()[0]
    layer.mass[:, :, : key.shape[1]] += ops.importance(
        query[:, :, -FEW:].transpose(1, 2),
        key,
        scale=scale,
        lens=ends,
        leftpad=starts,
        rows="sum",
        heads="none",
    )


def _laid_out(query: Tensor, layer: CompactLayer, scale: float | None) -> Tensor:
    """SDPA over keys and values in the query's dtype, one stretch after the other."""
    new, heads = query.shape[2], query.shape[1]
    keys, values, seen = [], [], []
    for segment in layer.packed.segments() if layer.packed is not None else []:
        key, value = (
            (segment.key, segment.value)
            if isinstance(segment, KVSegment)
            else ops.dequantize_kv(segment, query.dtype)
        )
        keys.append(key)
        values.append(value)
        at = torch.arange(key.shape[1], device=query.device)
        valid = at < segment.lens[:, None] if segment.lens is not None else (at >= 0).expand(len(query), -1)
        seen.append(valid[:, None].expand(-1, new, -1))
    key, value = layer.buffer()
    mask = None
    if seen or not layer.filled:
        starts, ends = layer.bounds()
        at = torch.arange(key.shape[1], device=query.device)
        last = ends[:, None] - new + torch.arange(new, device=query.device)
        seen.append((at >= starts[:, None, None]) & (at <= last[:, :, None]))
        mask = torch.cat(seen, dim=2)  # (B, S, N)
    elif new > 1:
        stored = key.shape[1]
        mask = torch.ones(1, new, stored, dtype=torch.bool, device=query.device).tril(stored - new)
    if keys:
        key, value = torch.cat([*keys, key], dim=1), torch.cat([*values, value], dim=1)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    kv_heads = key.shape[1]
    # The heads of a group become query rows, so that each key is read once and not once per head; with a mask and heads
    # of unequal number a GPU would form all logits besides.
    group = heads // kv_heads
    rows = query.reshape(len(query), kv_heads, group * new, query.shape[-1])
    if mask is not None:
        mask = mask[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(len(query), heads, new, value.shape[-1]).transpose(1, 2)
