"""``merge_tokens`` against matmul, argmax and index_add."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from lightvlm_ext import ops

from ._case import DTYPES, KEEP, Case, Sizes, dtype_name, require, require_close

TOKENS = (1000, 2000)


def cases(sizes: Sizes) -> Iterator[Case]:
    """One image, kept tokens at random, the hidden states as their own metric."""
    for count in sizes.tokens or TOKENS:
        for model, geometry in sizes.geometries().items():
            for dtype in DTYPES:
                width = geometry.width
                name = f"{count} x {width} {dtype_name(dtype)} ({model}), keep {KEEP}"
                yield _merge(name, count, width, dtype, sizes.device)


def _merge(name: str, count: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    # A few directions and noise: tokens of an image resemble each other.
    shared = torch.randn(count // 8 + 1, width, device=device)
    which = torch.randint(0, len(shared), (count,), device=device)
    x = (shared[which] + torch.randn(count, width, device=device)).to(dtype)[None]
    selection = ops.select(torch.rand(1, count, device=device), keep=int(KEEP * count))
    weight = torch.rand(1, count, device=device) + 0.1
    group = torch.zeros(1, count, dtype=torch.int32, device=device)
    kept = selection.index[0].long()
    dropped = (selection.inverse[0] < 0).nonzero().flatten()

    def composed(unit: Tensor) -> Tensor:
        nearest = (unit[dropped] @ unit[kept].T).argmax(dim=1)
        total = weight[0, kept].clone().index_add_(0, nearest, weight[0, dropped])
        summed = x[0, kept].float() * weight[0, kept, None]
        summed.index_add_(0, nearest, x[0, dropped].float() * weight[0, dropped, None])
        return (summed / total[:, None]).to(dtype)

    def op() -> Tensor:
        return ops.merge_tokens(x, selection, weight, group)

    def verify() -> None:
        # The choices of the op itself, since near-ties may go either way; then the sums.
        out, target = ops.merge_tokens(x, selection, weight, group, return_target=True)
        unit = functional.normalize(x[0].double(), dim=-1)
        cosine = unit[dropped] @ unit[kept].T
        chosen = cosine.gather(1, target[0, dropped].long()[:, None])[:, 0]
        require(
            bool((chosen >= cosine.amax(dim=1) - 1e-5).all()), "merge_tokens chose another than the nearest"
        )
        shares = functional.one_hot(target[0].long(), len(kept)).double() * weight[0, :, None]
        merged = (shares.T @ x[0].double()) / shares.sum(dim=0)[:, None]
        require_close(out[0], merged, 1e-5 if dtype == torch.float32 else 1e-2)

    baselines: dict[str, Callable[[], object]] = {
        "normalize, matmul, argmax, index_add": lambda: composed(functional.normalize(x[0], dim=-1)),
    }
    if dtype != torch.float32:
        baselines["the same, similarity in float32"] = lambda: composed(
            functional.normalize(x[0].float(), dim=-1)
        )
    return Case(name, op, baselines, verify)
