"""Rotary position embedding, as flash-attn applies it to new queries and keys of a cache."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (B, S, H, D) with its first R channels rotated; a new tensor, computed in fp32 (RoFormer, arXiv 2104.09864).

    cos, sin: (positions there are, R / 2).   positions: (B, S), or (B, 1) where all rows stand at one.
    interleaved: channels 2i and 2i + 1 are a pair, otherwise channels i and i + R / 2 (as GPT-NeoX has them).
    """
    half = cos.shape[1]
    at = positions.long().clamp(0, cos.shape[0] - 1)
    c, s = (table[at].float().unsqueeze(2) for table in (cos, sin))
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pairs = first * c - second * s, first * s + second * c
    joined = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([joined.to(x.dtype), rest], dim=-1)
