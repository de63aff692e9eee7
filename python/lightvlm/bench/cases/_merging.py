"""Tokens that resemble those of an image, and the ways that torch has to merge some of them into others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Find = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Add = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def image_tokens(batch: int, count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(batch, count, width): a few directions and noise, as tokens of an image resemble each other."""
    shared = torch.randn(count // 8 + 1, width, device=device)
    which = torch.randint(0, len(shared), (batch, count), device=device)
    return (shared[which] + torch.randn(batch, count, width, device=device)).to(dtype)


def _of_unit_vectors(dtype: torch.dtype | None) -> Find:
    def find(givers: Tensor, takers: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (functional.normalize(x if dtype is None else x.to(dtype), dim=-1) for x in (givers, takers))
        return (a @ b.T).max(dim=1)

    return find


def _takers_normalized(givers: Tensor, takers: Tensor) -> tuple[Tensor, Tensor]:
    # The giver's own length changes no argmax; whoever compares givers multiplies it in afterwards.
    best, at = (givers @ functional.normalize(takers, dim=-1).T).max(dim=1)
    return best.float() / givers.float().norm(dim=-1), at


def _scaled_afterwards(givers: Tensor, takers: Tensor) -> tuple[Tensor, Tensor]:
    product = (givers @ takers.T).float() / takers.float().norm(dim=-1)
    best, at = product.max(dim=1)
    return best / givers.float().norm(dim=-1), at


def finders(dtype: torch.dtype) -> dict[str, Find]:
    """Of each giver the highest cosine to a taker, and whose it is."""
    found: dict[str, Find] = {
        "normalize": _of_unit_vectors(None),
        "normalize takers": _takers_normalized,
        "scale after": _scaled_afterwards,
    }
    if dtype != torch.float32:
        found["normalize in float32"] = _of_unit_vectors(torch.float32)
    return found


def _segments(owner: Tensor, owners: int) -> tuple[Tensor, Tensor]:
    """Tokens by owner, and where each owner's begin."""
    lengths = torch.bincount(owner, minlength=owners)
    return owner.argsort(stable=True), lengths.cumsum(0) - lengths


def _index_add(x: Tensor, owner: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    total = torch.zeros(len(kept), device=x.device).index_add_(0, owner, weight)
    summed = torch.zeros(len(kept), x.shape[1], device=x.device)
    return (summed.index_add_(0, owner, x.float() * weight[:, None]) / total[:, None]).to(x.dtype)


def _index_add_own_dtype(x: Tensor, owner: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    total = torch.zeros(len(kept), device=x.device).index_add_(0, owner, weight)
    share = (weight / total[owner]).to(x.dtype)[:, None]
    return torch.zeros(len(kept), x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, owner, x * share)


def _scatter_add(x: Tensor, owner: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    total = torch.zeros(len(kept), device=x.device).scatter_add_(0, owner, weight)
    summed = torch.zeros(len(kept), x.shape[1], device=x.device)
    summed.scatter_add_(0, owner[:, None].expand(-1, x.shape[1]), x.float() * weight[:, None])
    return (summed / total[:, None]).to(x.dtype)


def _one_hot(x: Tensor, owner: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    shares = torch.zeros(len(kept), len(x), device=x.device)
    shares[owner, torch.arange(len(x), device=x.device)] = weight
    return (shares / shares.sum(dim=1, keepdim=True)).to(x.dtype) @ x


def _embedding_bag(x: Tensor, owner: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    order, begin = _segments(owner, len(kept))
    total = torch.zeros(len(kept), device=x.device).index_add_(0, owner, weight)
    share = (weight / total[owner])[order].to(x.dtype)
    return functional.embedding_bag(order, x, begin, mode="sum", per_sample_weights=share)


ADDERS: dict[str, Add] = {
    "index_add": _index_add,
    "index_add in x's dtype": _index_add_own_dtype,
    "scatter_add": _scatter_add,
    "one-hot matmul": _one_hot,
    "embedding_bag": _embedding_bag,
}
