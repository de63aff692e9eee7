"""Attention under an explicit mask, which no FlashAttention kernel takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .call import Call
from .logits import row_logits

_TILE_NUMBERS = 1 << 21
"""Logits of a tile, 8 MiB of them."""


def attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with softmax_j(softcapped(scale * <q, k_j>) + mask_j), in which a sink takes its share of the weights.

    Args:
        query: (B, Sq, Hq, D).   key, value: (B, Sk, Hkv, D), Hq a multiple of Hkv.
        mask: (B or 1, Hq or 1, Sq, Sk), bool (True: seen) or floating, added to the logits.
        softcap: 0: none.   sinks: (Hq,) logits of a key without a value (arXiv 2309.17453, gpt-oss), or None.

    Returns:
        (B, Sq, Hq, D) in query's dtype; 0 in rows that see nothing.

    Raises:
        ValueError: the mask's shape does not fit.   TypeError: nor its dtype.
    """
    batch, rows, heads, _ = query.shape
    keys = key.shape[1]
    if mask.dim() != 4 or any(
        size not in allowed
        for size, allowed in zip(mask.shape, ((batch, 1), (heads, 1), (rows,), (keys,)), strict=True)
    ):
        raise ValueError(
            f"attention_mask: has shape {tuple(mask.shape)}, must be ({batch} or 1, {heads} or 1, {rows}, {keys})"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention_mask: has dtype {mask.dtype}, must be bool or floating")
    if softcap > 0 or sinks is not None:
        return _tiled(query, key, value, mask, scale, softcap, sinks)
    return _sdpa(query, key, value, mask, scale)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    batch, rows, heads, width = query.shape
    group = heads // key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if group > 1 and rows == 1 and mask.shape[1] == 1:
        query = query.reshape(
            batch, heads // group, group, width
        )  # as rows of one head they read its keys once
    elif group > 1:
        # Not enable_gqa: with a mask that takes the kernel on CUDA which makes all logits.
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, rows, -1).transpose(1, 2)


def _tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Row by row of the batch, so that a batch is the same as one by one; fp32."""
    batch, rows, heads, _ = query.shape
    keys = key.shape[1]
    call = Call(query, key, value, rows, keys, scale, softcap=softcap)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    columns = torch.arange(keys, device=query.device)
    tile = max(1, _TILE_NUMBERS // max(1, heads * keys))
    for row in range(batch):
        of_row = mask[row if mask.shape[0] > 1 else 0]
        k, v = (x[row].float().transpose(0, 1) for x in (key, value))
        for start in range(0, rows, tile):
            some = slice(start, start + tile)
            positions = torch.arange(rows, device=query.device)[some]
            logits = row_logits(query[row, some], k, positions, columns, 0, keys, None, call)
            seen = of_row[:, some]
            if mask.dtype == torch.bool:
                logits = logits.masked_fill(~seen, float("-inf"))
            else:
                logits = logits + seen.float()
            if sinks is not None:
                sink = sinks.float()[:, None, None].expand(-1, logits.shape[1], 1)
                logits = torch.cat((logits, sink), dim=-1)
            weights = torch.softmax(logits, dim=-1)[..., :keys].nan_to_num(0.0)
            grouped = weights.unflatten(0, (k.shape[0], -1)).flatten(1, 2)
            out[row, some] = torch.matmul(grouped, v).view(heads, -1, v.shape[-1]).transpose(0, 1)
    return out
