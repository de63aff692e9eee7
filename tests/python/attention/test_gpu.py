"""Each backend that is there, on a GPU: against the formula, without waiting for the device, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightvlm import flash_attn_interface as fa
from lightvlm.attention import backends, use_backend
from torch import Tensor

from . import oracle
from .oracle import Shaping
from .test_gpu_backends import BY_BACKEND, EVERY, label

pytestmark = pytest.mark.gpu

CASES = [
    (name, options)
    for name, every in {**BY_BACKEND, "flex": EVERY, "decode": EVERY[:3], "tiled": EVERY}.items()
    for options in every
]


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """What synchronises raises, inside `running`."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def running(backend: str, function: Any, *args: Any, **options: Any) -> Any:
    """The call's result, after a first one that may compile and load; no call may wait for the device."""
    missing = {one.name: one.missing for one in backends()}[backend]
    if missing is not None:
        pytest.skip(f"{backend} {missing}")
    with use_backend(backend):
        try:
            function(*args, **options)
        except ValueError as error:
            (reason,) = (line for line in str(error).splitlines() if line.startswith(f"  {backend}: "))
            pytest.skip(reason.strip())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        found = function(*args, **options)
        torch.cuda.set_sync_debug_mode("default")
    return tuple(x.cpu() if isinstance(x, Tensor) else x for x in found)


def cuda(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}


@pytest.mark.parametrize(("backend", "options"), CASES, ids=label)
@pytest.mark.parametrize("lengths", [(40, 40), (33, 300), (60, 50), (1, 70)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dense(backend: str, options: dict[str, Any], lengths: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = (
        torch.randn(2, n, h, 64).to(dtype) for n, h in zip((*lengths, lengths[1]), (4, 2, 2), strict=True)
    )
    args = (x.cuda() for x in (q, k, v))
    options = {**options, "return_attn_probs": True, "importance_window": 3}
    out, lse, _, scores = running(backend, fa.flash_attn_func, *args, **cuda(options))
    shaping = Shaping(**{name: x for name, x in options.items() if name in vars(Shaping())})
    last = list(range(max(0, lengths[0] - 3), lengths[0]))
    for b in range(2):
        oracle.check((out[b], lse[b]), q[b], k[b], v[b], shaping, b)
        oracle.check_scores(scores[b], oracle.importance(q[b], k[b], shaping, last, b), dtype)


@pytest.mark.parametrize(
    ("backend", "options"),
    [case for case in CASES if case[0] in ("flash_attn_2", "flash_attn_3", "flash_attn_4", "torch_flash")],
    ids=label,
)
def test_varlen(backend: str, options: dict[str, Any]) -> None:
    rows, keys = [50, 0, 3, 70], [70, 40, 0, 30]
    q, k, v = (torch.randn(sum(n), h, 64).half() for n, h in ((rows, 4), (keys, 2), (keys, 2)))
    offsets = [torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32).cuda() for n in (rows, keys)]
    args = (*(x.cuda() for x in (q, k, v)), *offsets, 70, 70)
    asked = {**options, "return_attn_probs": True, "importance_window": 3}
    out, lse, _, scores = running(backend, fa.flash_attn_varlen_func, *args, **cuda(asked))
    shaping = Shaping(**options)
    parts = zip(out.split(rows), lse.split(rows, 1), q.split(rows), k.split(keys), v.split(keys), strict=True)
    for b, (one, of_rows, query, key, value) in enumerate(parts):
        oracle.check((one, of_rows), query, key, value, shaping, b)
        last = list(range(max(0, rows[b] - 3), rows[b]))
        wanted = oracle.importance(query, key, shaping, last, b)
        oracle.check_scores(scores.split(keys)[b], wanted, torch.float16)


@pytest.mark.parametrize("backend", ["flash_attn_2", "flash_attn_3", "torch_flash", "decode", "tiled"])
@pytest.mark.parametrize("rows", [1, 3])
def test_cache_in_a_graph(backend: str, rows: int) -> None:
    """Captured once and replayed on other lengths and tokens: as on a CPU."""
    lens = torch.tensor([100, 7], dtype=torch.int32)
    caches = [torch.randn(2, 256, 2, 64).half() for _ in range(2)]
    angle = torch.rand(256, 16)
    tables = [angle.cos().half(), angle.sin().half()]
    new = [torch.randn(2, rows, heads, 64).half() for heads in (4, 2, 2)]
    on_gpu = [x.cuda() for x in (new[0], *caches, *new[1:], *tables, lens)]
    options: dict[str, Any] = {"causal": True, "return_softmax_lse": True, "importance_window": 1}
    running(backend, fa.flash_attn_with_kvcache, *on_gpu, **options)
    graph = torch.cuda.CUDAGraph()
    with use_backend(backend), torch.cuda.graph(graph):
        found = fa.flash_attn_with_kvcache(*on_gpu, **options)
    for step in range(2):
        new = [torch.randn_like(x) for x in new]
        for target, source in zip(
            (on_gpu[0], *on_gpu[1:3], *on_gpu[3:5]), (new[0], *caches, *new[1:]), strict=True
        ):
            target.copy_(source)
        on_gpu[7].copy_(lens + step)
        graph.replay()
        held = [cache.clone() for cache in caches]
        with use_backend("tiled"):
            wanted = fa.flash_attn_with_kvcache(new[0], *held, *new[1:], *tables, lens + step, **options)
        for a, b in zip((*found, *on_gpu[1:3]), (*wanted, *held), strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=4e-3, rtol=4e-3)  # fp16, summed in another order
