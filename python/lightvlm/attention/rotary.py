"""Rotary position embedding, as flash-attn applies it: to new queries and keys of a cache, and in its layers."""

from __future__ import annotations

import torch
from torch import Tensor

from lightvlm_ext import _checks

from .arguments import check_cu_seqlens, check_flags, check_forward_only
from .values import check_offsets


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (..., H, D) with its first R channels rotated; a new tensor, computed in fp32 (RoFormer, arXiv 2104.09864).

    cos, sin: (positions there are, R / 2).   positions: x's without H and D, or what broadcasts to that; those outside
    of the tables get the nearest.
    interleaved: channels 2i and 2i + 1 are a pair, otherwise channels i and i + R / 2 (as GPT-NeoX has them).
    """
    half = cos.shape[1]
    at = positions.long().clamp(0, cos.shape[0] - 1)
    c, s = (table[at].float().unsqueeze(-2) for table in (cos, sin))
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pairs = first * c - second * s, first * s + second * c
    joined = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([joined.to(x.dtype), rest], dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with its first R channels rotated, with the arguments of flash_attn.layers.rotary.apply_rotary_emb.

    Args:
        x: (B, S, H, D); with cu_seqlens (total, H, D).
        cos, sin: (positions, R / 2), R at most D.
        interleaved: channels 2i and 2i + 1 are a pair, otherwise i and i + R / 2.   inplace: write it into x.
        seqlen_offsets: position of each sequence's first token, an int or (B,).
        cu_seqlens: (B + 1,) int32, where packed sequences begin and end; tokens outside all of them stay as they are.
        max_seqlen: needed with cu_seqlens, the longest sequence.

    Raises:
        TypeError, ValueError: an argument does not fit, x requires grad (there is no backward pass), or the tables
            end before a sequence. On a GPU, where offsets are not looked at, tokens past the tables stay as they are.
    """
    packed = cu_seqlens is not None
    _checks.shape(_checks.tensor(x, "x"), "x", ("total", "H", "D") if packed else ("B", "S", "H", "D"))
    check_forward_only(x=x)
    check_flags(interleaved=interleaved, inplace=inplace)
    _checks.shape(_checks.tensor(cos, "cos"), "cos", ("positions", "R / 2"))
    _checks.shape(_checks.tensor(sin, "sin"), "sin", tuple(cos.shape))
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(f"cos: rotates {2 * cos.shape[1]} channels, must be at most {x.shape[-1]}")
    for table, name in ((cos, "cos"), (sin, "sin")):
        _checks.same_device(table, name, x, "x")
    if (max_seqlen is None) == packed:
        raise ValueError("max_seqlen: must be given with cu_seqlens, and only with it")
    longest = x.shape[1] if max_seqlen is None else _checks.integer(max_seqlen, "max_seqlen", 0)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "cu_seqlens", x)
        if x.is_cpu:
            check_offsets(cu_seqlens, "cu_seqlens", x.shape[0], "x", longest, "max_seqlen")
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    first = 0
    if isinstance(seqlen_offsets, Tensor):
        _checks.shape(seqlen_offsets, "seqlen_offsets", (batch,))
        _checks.same_device(seqlen_offsets, "seqlen_offsets", x, "x")
        _checks.dtype(seqlen_offsets, "seqlen_offsets", torch.int32, torch.int64)
        offsets = seqlen_offsets
        if x.is_cpu and batch:
            low, first = (int(end) for end in offsets.aminmax())
            if low < 0:
                raise ValueError(f"seqlen_offsets: has {low}, must be at least 0")
    else:
        first = _checks.integer(seqlen_offsets, "seqlen_offsets", 0)
        offsets = torch.full((batch,), first, device=x.device)
    if first + longest > cos.shape[0]:
        raise ValueError(f"cos: has {cos.shape[0]} positions, must have at least {first + longest}")
    if cu_seqlens is None:
        position = offsets[:, None] + torch.arange(longest, device=x.device)
    else:
        position = _packed_positions(x.shape[0], cu_seqlens, offsets)
    turned = rotate(x, cos, sin, position, bool(interleaved))
    out = torch.where(((position >= 0) & (position < cos.shape[0]))[..., None, None], turned, x)
    return x.copy_(out) if inplace else out


def _packed_positions(tokens: int, cu_seqlens: Tensor, offsets: Tensor) -> Tensor:
    """(tokens,) position of each packed token, -1 outside of all sequences. Nothing is read from the device."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    batch = offsets.shape[0]
    if batch == 0:
        return torch.full_like(token, -1)
    row = torch.searchsorted(cu_seqlens, token, right=True) - 1  # -1 and batch: outside of all
    within = (row >= 0) & (row < batch)
    row = row.clamp(0, batch - 1)
    return torch.where(within, token - cu_seqlens[row] + offsets[row], -1)
