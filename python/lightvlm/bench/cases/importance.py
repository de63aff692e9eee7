"""``importance`` against matmul and softmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightvlm_ext import ops

from ._case import DTYPES, Case, Sizes, dtype_name, require_close

TOKENS = (1000, 2000)


def cases(sizes: Sizes) -> Iterator[Case]:
    """Attention from the last 32 rows to every key, mean over rows and heads."""
    window = 32
    for count in sizes.tokens or TOKENS:
        for model, geometry in sizes.geometries().items():
            for dtype in DTYPES:
                heads, kv_heads, width = geometry.heads, geometry.kv_heads, geometry.head_dim
                query = torch.randn(1, window, heads, width, device=sizes.device).to(dtype)
                key = torch.randn(1, count, kv_heads, width, device=sizes.device).to(dtype)
                shape = f"{heads}/{kv_heads} heads of {width}"
                name = f"{window} rows x {count} keys, {shape} {dtype_name(dtype)} ({model})"
                yield _importance(name, query, key)


def _importance(name: str, query: Tensor, key: Tensor) -> Case:
    _, window, heads, width = query.shape
    count, kv_heads = key.shape[1:3]
    hidden = torch.ones(window, count, dtype=torch.bool, device=query.device).triu(count - window + 1)
    sees = (~hidden).sum(dim=0)

    def composed(q: Tensor, k: Tensor) -> Tensor:
        logits = (q @ k.mT).float() * width**-0.5
        mass = logits.masked_fill(hidden.repeat(logits.shape[2] // window, 1), -torch.inf).softmax(dim=-1)
        return mass.sum(dim=(1, 2)) / (heads * sees)

    def repeated() -> Tensor:
        return composed(
            query.transpose(1, 2), key.repeat_interleave(heads // kv_heads, dim=2).transpose(1, 2)
        )

    def packed() -> Tensor:
        grouped = query.transpose(1, 2).reshape(1, kv_heads, -1, width)
        return composed(grouped, key.transpose(1, 2))

    def op() -> Tensor:
        return ops.importance(query, key)

    def verify() -> None:
        exact = composed(
            query.double().transpose(1, 2).reshape(1, kv_heads, -1, width), key.double().transpose(1, 2)
        )
        # Relative to what a key gets on average.
        require_close(op() * count, exact * count, 1e-3)

    return Case(
        name, op, {"repeat_kv, matmul, softmax": repeated, "packed group, matmul, softmax": packed}, verify
    )
