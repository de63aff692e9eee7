"""Buffers of keys and values, (B, room, H, D): FlashAttention's layout, a token one row."""

from __future__ import annotations

import torch
from torch import Tensor


def token_major(states: Tensor, room: int, copy: int = 0) -> Tensor:
    """A buffer (B, room, H, D) for states (B, H, S, D), with their first ``copy`` tokens in it."""
    batch, heads, _, width = states.shape
    buffer = zeros(states, batch, room, heads, width)
    buffer[:, :copy] = states[:, :, :copy].detach().transpose(1, 2)
    return buffer


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros: a masked key still meets a weight of 0, which what lies about in fresh memory need not survive."""
    with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


def fits(buffer: Tensor, states: Tensor, room: int) -> bool:
    """Whether a buffer of an earlier use is what :func:`token_major` would make."""
    batch, heads, _, width = states.shape
    same = buffer.dtype == states.dtype and buffer.device == states.device
    return same and buffer.shape == (batch, room, heads, width)


def check_rows(indices: Tensor, batch: int) -> None:
    """Raise a ValueError unless indices (B',) are rows of a batch, as far as the host knows."""
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices must be a vector of integers, got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if not len(indices):
        raise ValueError("indices must name at least one row, got none")
    if indices.device.type == "cpu" and batch >= 0:
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= batch:
            raise ValueError(f"indices must be rows of the cache, 0 to {batch - 1}, got {low} to {high}")
