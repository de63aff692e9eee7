"""``select`` against topk, sort and scatter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightvlm_ext import ops

from ._case import KEEP, Case, Sizes, require

TOKENS = (1000, 2000)


def cases(sizes: Sizes) -> Iterator[Case]:
    """The highest scores of one row, and of every layer and head of a cache at once."""
    for rows, count in [(1, count) for count in sizes.tokens or TOKENS] + [(112, 8192)]:
        scores = torch.rand(rows, count, device=sizes.device)
        keep = int(KEEP * count)

        def op(scores: Tensor = scores, keep: int = keep) -> Tensor:
            return ops.select(scores, keep=keep).index

        def composed(scores: Tensor = scores, keep: int = keep) -> Tensor:
            index = scores.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values
            inverse = torch.full(scores.shape, -1, device=scores.device)
            inverse.scatter_(1, index, torch.arange(keep, device=scores.device).expand_as(index))
            return index

        def verify(op: Callable[[], Tensor] = op, composed: Callable[[], Tensor] = composed) -> None:
            require(torch.equal(op().long(), composed()), "select disagrees with topk")

        yield Case(f"{rows} x {count}, keep {KEEP}", op, {"topk, sort, scatter": composed}, verify)
