"""What cache methods share: attention that tokens of a prompt received, and the choice of the highest scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightvlm_ext import ops

from ..host import upload
from .base import PromptChoice, PromptInput, check_keep, keep_count


def check_share(keep: float | None) -> None:
    """Raise unless keep is None or a number in (0, 1]."""
    if keep is not None:
        check_keep(keep)


def received(prompt: PromptInput, rows: int | None = None) -> Tensor:
    """Attention (B, Hkv, M) fp32 that tokens receive from the last ``rows`` tokens, None: from all; summed over these,
    mean over the query heads of a key head (which orders tokens as their sum does)."""
    query = prompt.query if rows is None else prompt.query[:, -rows:]
    return ops.importance(
        query,
        prompt.key,
        scale=prompt.scale,
        leftpad=upload(prompt.layer.starts, query.device),
        rows="sum",
        heads="none",
    )


LEAST = 64
"""Tokens that a row keeps at least where a share is asked for: less is not worth its price."""


def budget(tokens: int, keep: float | None, capacity: int, least: int) -> int:
    """Tokens that stay of so many: a share, but at least ``least``, or, where keep is None, a number."""
    return capacity if keep is None else max(least, keep_count(tokens, keep))


def keep_highest(
    scores: Tensor,
    starts: list[int],
    ends: list[int],
    may_stay: list[int],
    recent: list[int],
    per_head: bool,
) -> PromptChoice | None:
    """The last tokens of each row, and those before them that score highest; None where each row keeps all.

    Args:
        scores (B, Hkv, N) fp32.   starts, ends: where each row's tokens stand.
        may_stay: tokens of each row.   recent: so many of them are its last ones.
        per_head: whether each head chooses for itself; otherwise their mean does.
    """
    tokens = [end - start for start, end in zip(starts, ends, strict=True)]
    kept = [min(*pair) for pair in zip(tokens, may_stay, strict=True)]
    if kept == tokens:
        return None
    last = [min(*pair) for pair in zip(kept, recent, strict=True)]
    start, end, tail = upload([starts, ends, last], scores.device)
    at = torch.arange(scores.shape[2], device=scores.device)
    inside = (at >= start[:, None]) & (at < end[:, None])
    forced = inside & (at >= (end - tail)[:, None])
    free = [count - own for count, own in zip(kept, last, strict=True)]
    index = choose_places(scores, free, forced, inside, max(kept), per_head)
    return PromptChoice(index, kept, min(last))


def choose_places(
    scores: Tensor, free: list[int], forced: Tensor, candidates: Tensor, capacity: int, per_head: bool
) -> Tensor:
    """Places (B, capacity) or (B, Hkv, capacity) int32, ascending, -1 past the last: forced ones, and of the candidates
    the ``free`` highest.

    scores (B, Hkv, N) fp32; forced, candidates (B, N) bool; free: of each row.
    """
    batch, heads, tokens = scores.shape
    keep = upload(free, scores.device)
    if not per_head:
        chosen = ops.select(
            scores.mean(dim=1), keep=keep, forced=forced, candidates=candidates, capacity=capacity
        )
        return chosen.index
    every = ops.select(
        scores.reshape(batch * heads, tokens),
        keep=keep.repeat_interleave(heads),
        forced=forced.repeat_interleave(heads, dim=0),
        candidates=candidates.repeat_interleave(heads, dim=0),
        capacity=capacity,
    )
    return every.index.view(batch, heads, capacity)


def share_of(tokens: int, share: float) -> int:
    """A share of so many tokens, rounded; 0 is possible."""
    return math.floor(share * tokens + 0.5)
