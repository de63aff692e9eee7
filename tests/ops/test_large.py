"""Offsets beyond 2**31 elements: rows of a batch that far apart, in memory that is reserved but hardly touched.

Products of sizes and strides that are computed in 32 bits would reach outside the tensor, or into another row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.backends import NATIVE, Backend

FAR = 2**31 + 64
"""Elements from one row of a batch to the next."""


def far_apart(x: Tensor) -> Tensor:
    """``x`` (2, ...) again, its two rows FAR elements apart."""
    memory = torch.empty(FAR + x[0].numel(), dtype=x.dtype)  # pages that nothing touches cost nothing
    found = memory.as_strided(x.shape, (FAR, *x[0].contiguous().stride()))
    found.copy_(x)
    return found


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def selection(backend: Backend, tokens: int, keep: int) -> Any:
    return backend.select(rows(tokens, seed=9), keep=keep)


def same(found: Any, expected: Any) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(found, Sequence) else [(found, expected)]
    for a, b in pairs:
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", NATIVE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_importance(backend: Backend, dtype: torch.dtype) -> None:
    query, key = rows(3, 4, 32, dtype=dtype), rows(70, 2, 32, dtype=dtype, seed=1)
    lse = torch.full((2, 4, 3), 5.0)
    for options in ({}, {"lse": lse}, {"axis": "query"}):
        expected = backend.importance(query, key, **options)
        same(backend.importance(far_apart(query), far_apart(key), **options), expected)


@pytest.mark.parametrize("backend", NATIVE, ids=str)
def test_select(backend: Backend) -> None:
    scores = rows(100)
    same(backend.select(far_apart(scores), keep=7), backend.select(scores, keep=7))
    same(backend.select(far_apart(scores), mass=0.5), backend.select(scores, mass=0.5))


@pytest.mark.parametrize("backend", NATIVE, ids=str)
def test_select_diverse(backend: Backend) -> None:
    scores, features = rows(40), rows(40, 16, seed=1)
    same(
        backend.select_diverse(far_apart(scores), far_apart(features), keep=7),
        backend.select_diverse(scores, features, keep=7),
    )


@pytest.mark.parametrize("backend", NATIVE, ids=str)
def test_gather_tokens(backend: Backend) -> None:
    chosen = selection(backend, 50, 11)
    x = [rows(50, 24, dtype=torch.bfloat16), rows(50, 3).long()]
    found = backend.gather_tokens([far_apart(one) for one in x], chosen.index, chosen.count)
    same(found, backend.gather_tokens(x, chosen.index, chosen.count))


@pytest.mark.parametrize("backend", NATIVE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_tokens(backend: Backend, dtype: torch.dtype) -> None:
    chosen = selection(backend, 50, 11)
    x, weight, group = rows(50, 24, dtype=dtype), rows(50).abs(), torch.zeros(2, 50, dtype=torch.int32)
    expected = backend.merge_tokens(x, chosen, weight, group)
    same(backend.merge_tokens(far_apart(x), chosen, weight, group), expected)
    same(backend.merge_tokens(x, chosen, weight, group, metric=far_apart(x)), expected)


@pytest.mark.parametrize("backend", NATIVE, ids=str)
@pytest.mark.parametrize("heads_first", [False, True])
def test_compact_kv(backend: Backend, heads_first: bool) -> None:
    chosen = selection(backend, 50, 11)
    shape = (2, 50, 16) if heads_first else (50, 2, 16)
    caches = [rows(*shape, dtype=torch.bfloat16, seed=seed) for seed in (0, 1)]
    far = [far_apart(cache) for cache in caches]
    for pair in (caches, far):
        views = [cache.transpose(1, 2) if heads_first else cache for cache in pair]
        backend.compact_kv_(*views, chosen.index, chosen.count)
    same(far, caches)
