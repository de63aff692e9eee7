"""Compiled functions have no graph break at a call site, and give the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from lightvlm import flash_attn_interface as fa
from torch import Tensor

BACKENDS = ["aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def check(function: Callable[..., Any], args: list[Any], backend: str) -> None:
    """The function on copies of args, compiled and not: same results, and same tensors left behind."""

    def copies() -> list[Any]:
        return [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]

    plain, compiled = copies(), copies()
    wanted = function(*plain)
    found = torch.compile(function, fullgraph=True, backend=backend)(*compiled)
    for a, b in zip((*found, *compiled), (*wanted, *plain), strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (2, 1)}, {"softcap": 2.0}], ids=str)
def test_dense(backend: str, options: dict[str, Any]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse, _, scores = fa.flash_attn_func(
            q, k, v, **options, return_attn_probs=True, importance_window=2
        )
        return out * 2, lse, scores

    check(function, [torch.randn(2, 5, 4, 32), torch.randn(2, 9, 2, 32), torch.randn(2, 9, 2, 32)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_varlen(backend: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Any:
        options: dict[str, Any] = {"causal": True, "return_attn_probs": True, "importance_window": 2}
        out, lse, _, scores = fa.flash_attn_varlen_func(q, k, v, at, at, 6, 6, **options)
        return out * 2, lse, scores

    at = torch.tensor([0, 6, 9], dtype=torch.int32)
    check(function, [torch.randn(9, 4, 32), torch.randn(9, 2, 32), torch.randn(9, 2, 32), at], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("paged", [False, True])
def test_cache(backend: str, paged: bool) -> None:
    """The caches are written by the compiled function, too, and what follows sees it."""

    def function(
        q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, lens: Tensor,
        table: Tensor | None,
    ) -> Any:  # fmt: skip
        before = keys * 2
        out, lse, scores = fa.flash_attn_with_kvcache(
            q, keys, values, k, v, cos, sin, lens, block_table=table, causal=True,
            return_softmax_lse=True, importance_window=1,
        )  # fmt: skip
        return out, lse, scores, before, keys * 2

    angle = torch.rand(16, 8)
    table = torch.tensor([[1, 0], [3, 2]], dtype=torch.int32) if paged else None
    caches = [torch.randn((4, 8, 2, 32) if paged else (2, 16, 2, 32)) for _ in range(2)]
    new = [torch.randn(2, 3, heads, 32) for heads in (4, 2, 2)]
    lens = torch.tensor([5, 9], dtype=torch.int32)
    check(function, [new[0], *caches, *new[1:], angle.cos(), angle.sin(), lens, table], backend)


def test_lengths_are_checked() -> None:
    """In a compiled function, too, and before anything is written."""

    def function(q: Tensor, cache: Tensor, k: Tensor, lens: Tensor) -> Tensor:
        return fa.flash_attn_with_kvcache(q, cache, cache.clone(), k, k, cache_seqlens=lens)

    cache = torch.randn(2, 4, 2, 32)
    before = cache.clone()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"cache_seqlens: row 1 has 3, must be in \[0, 2\]"):
        compiled(
            torch.randn(2, 2, 4, 32), cache, torch.randn(2, 2, 2, 32), torch.tensor([1, 3], dtype=torch.int32)
        )
    assert torch.equal(cache, before)


def test_a_growing_prompt_is_compiled_once() -> None:
    """Lengths are dynamic: no new graph for each."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return fa.flash_attn_func(q, k, v, causal=True, importance_window=2)

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for length in (7, 12, 33):
        q, k, v = (torch.randn(2, length, heads, 32) for heads in (4, 2, 2))
        for a, b in zip(compiled(q, k, v), function(q, k, v), strict=True):
            assert torch.equal(a, b)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


@pytest.mark.parametrize("dynamic", [True, None])
def test_numbers_that_vary(dynamic: bool | None) -> None:
    """max_seqlen and cache_seqlens as ints of the graph."""

    def packed(q: Tensor, ends: Tensor, longest: int) -> Any:
        return fa.flash_attn_varlen_func(
            q, q, q, ends, ends, longest, longest, causal=True, importance_window=2
        )

    def cached(q: Tensor, cache: Tensor, length: int) -> Any:
        return fa.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=length, importance_window=2)

    q, cache = torch.randn(2, 1, 4, 32), torch.randn(2, 16, 2, 32)
    for function in (packed, cached):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (5, 9, 13):
            args: Any = (q, cache, n)
            if function is packed:
                args = torch.randn(n, 4, 32), torch.tensor([0, 2, n], dtype=torch.int32), n
            for a, b in zip(compiled(*args), function(*args), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [[-1, 1], torch.tensor([-1, 1]), torch.tensor([[-1, 1], [0, 2]])], ids=str)
def test_probe_rows(rows: Any) -> None:
    """Rows by number, too; a wrong one is found when the graph runs."""
    q, cache = torch.randn(2, 3, 4, 32), torch.randn(2, 16, 2, 32)

    def dense(rows: Any) -> Any:
        return fa.flash_attn_func(q, cache, cache, causal=True, importance_window=rows)

    def cached(rows: Any) -> Any:
        return fa.flash_attn_with_kvcache(
            q, cache, cache, cache_seqlens=9, causal=True, importance_window=rows
        )

    for function in (dense, cached):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(rows), function(rows), strict=True):
            assert torch.equal(a, b)
        with pytest.raises(ValueError, match=r"importance_window: has row 7, must be in \[-3, 3\)"):
            compiled(torch.tensor([7]))


@pytest.mark.parametrize("name", ["attend", "attend_cache", "importance"])
def test_opcheck(name: str) -> None:
    """Schema, fake kernel and what is written agree with what happens."""
    q, k = torch.randn(2, 3, 4, 32), torch.randn(2, 16, 2, 32)
    lens = torch.tensor([5, 9], dtype=torch.int32)
    shape = (0.2, -1, 0, 0.0, None)
    args: dict[str, tuple[Any, ...]] = {
        "attend": (q, k, k.clone(), 3, 16, *shape, None, None, None, True),
        "attend_cache": (
            q, k, k.clone(), k[:, :3].clone(), k[:, 3:6].clone(), torch.rand(16, 8), torch.rand(16, 8), True, False,
            True, True, lens, None, None, None, 0, 16, *shape,
        ),
        "importance": (q, k, torch.randn(2, 4, 3), 2, None, 3, 16, *shape, None, None, lens, None, None, None),
    }  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.lightvlm_attention, name).default, args[name])
