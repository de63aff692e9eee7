"""``select`` against topk, sort, kthvalue and argsort."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightvlm_ext import ops

from ._case import KEEP, Case, Sizes, require

TOKENS = (1000, 2000, 8192)
LAYERS_AND_HEADS = 112  # of Qwen2.5-VL-7B: rows of a cache whose layers and heads choose on their own
SMALL_KEEP = 0.03
MASS = 0.95


def cases(sizes: Sizes) -> Iterator[Case]:
    """The highest scores of one row (or a batch), and of every layer and head of a cache at once."""
    for tokens in sizes.tokens or TOKENS:
        for rows in sorted({*sizes.batches, LAYERS_AND_HEADS}):
            # Distinct, so that every way has the same answer.
            scores = (torch.rand(rows, tokens, device=sizes.device).argsort(dim=1) + 0.5) / tokens
            for share in (KEEP, SMALL_KEEP):
                yield _highest(f"{rows} x {tokens}, keep {share}", scores, max(1, int(share * tokens)))
            yield _mass(f"{rows} x {tokens}, mass {MASS}", (4 * scores).softmax(dim=1))


def _parameters(scores: Tensor) -> dict[str, int | float | str]:
    return {"rows": scores.shape[0], "tokens": scores.shape[1], "batch": scores.shape[0]}


def _numbered(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending index and inverse of a mask (R, N) with as many tokens in each row."""
    inverse = torch.where(kept, kept.cumsum(dim=1, dtype=torch.int32) - 1, -1)
    return kept.nonzero()[:, 1].view(kept.shape[0], -1).int(), inverse


def _highest(name: str, scores: Tensor, keep: int) -> Case:
    rows, tokens = scores.shape
    slots = torch.arange(keep, dtype=torch.int32, device=scores.device).expand(rows, keep)

    def scattered(chosen: Tensor) -> tuple[Tensor, Tensor]:
        index = chosen.sort(dim=1).values
        inverse = torch.full((rows, tokens), -1, dtype=torch.int32, device=scores.device)
        return index.int(), inverse.scatter_(1, index, slots)

    def from_mask(chosen: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.zeros(rows, tokens, dtype=torch.bool, device=scores.device)
        return _numbered(kept.scatter_(1, chosen, True))

    # The last two are right because no score equals the lowest that is kept.
    baselines: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "topk, sort, scatter": lambda: scattered(scores.topk(keep, dim=1, sorted=False).indices),
        "sorted topk, sort, scatter": lambda: scattered(scores.topk(keep, dim=1).indices),
        "argsort, sort, scatter": lambda: scattered(scores.argsort(dim=1, descending=True)[:, :keep]),
        "topk, mask, cumsum": lambda: from_mask(scores.topk(keep, dim=1, sorted=False).indices),
        "topk threshold, mask, cumsum": lambda: _numbered(
            scores >= scores.topk(keep, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        ),
        "kthvalue threshold, mask, cumsum": lambda: _numbered(
            scores >= scores.kthvalue(tokens - keep + 1, dim=1, keepdim=True).values
        ),
    }

    def op() -> ops.Selection:
        return ops.select(scores, keep=keep)

    def verify() -> None:
        found = op()
        for baseline, composed in baselines.items():
            index, inverse = composed()
            same = torch.equal(found.index, index) and torch.equal(found.inverse, inverse)
            require(same, f"select disagrees with {baseline}")

    moved = rows * (8 * tokens + 4 * keep)
    return Case(name, op, dict(baselines), verify, bytes=moved, parameters=_parameters(scores))


def _mass(name: str, scores: Tensor) -> Case:
    def composed() -> tuple[Tensor, Tensor]:
        ordered, token = scores.sort(dim=1, descending=True)
        reached = ordered.cumsum(dim=1)
        short = reached - ordered < MASS * reached[:, -1:]
        kept = torch.zeros_like(short).scatter_(1, token, short)
        inverse = torch.where(kept, kept.cumsum(dim=1, dtype=torch.int32) - 1, -1)
        # The rows differ in length: positions first, -1 behind them.
        position = torch.arange(scores.shape[1], device=scores.device).expand_as(inverse)
        index = position.masked_fill(~kept, scores.shape[1]).sort(dim=1).values
        return index.masked_fill(index == scores.shape[1], -1).int(), inverse

    def op() -> ops.Selection:
        return ops.select(scores, mass=MASS)

    def verify() -> None:
        # Sums in fp32 end a few tokens earlier or later.
        difference = (op().count - (composed()[1] >= 0).sum(dim=1)).abs().max()
        require(int(difference) <= 1 + scores.shape[1] // 1000, "select disagrees with sort and cumsum")

    baselines = {"sort, cumsum, sort": composed}
    return Case(name, op, dict(baselines), verify, bytes=12 * scores.numel(), parameters=_parameters(scores))
