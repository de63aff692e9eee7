"""Every op on a GPU against its float64 reference. Small on purpose: compute-sanitizer runs these same tests."""

from __future__ import annotations

import pytest
import torch

import lightvlm_ext
from lightvlm_ext import ops, reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def cuda(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.cuda() for tensor in tensors]


@pytest.fixture(autouse=True)
def _no_device_errors():
    lightvlm_ext.device_errors()
    yield
    torch.cuda.synchronize()
    assert not lightvlm_ext.device_errors()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "window"), [(1, 1), (33, 4), (257, 16)])
def test_sanitizer_importance(dtype: torch.dtype, tokens: int, window: int) -> None:
    query = torch.randn(2, window, 6, 32, dtype=dtype)
    key = torch.randn(2, tokens, 2, 32, dtype=dtype)
    pad = torch.tensor([0, tokens // 3], dtype=torch.int32)
    expected, seen = reference.importance(query.double(), key.double(), leftpad=pad, return_visible=True)
    plain = reference.importance(query, key, leftpad=pad)
    q, k, p = cuda(query, key, pad)
    score, visible = ops.importance(q, k, leftpad=p, return_visible=True)
    assert torch.equal(visible.cpu(), seen)
    noise = (plain.double() - expected).abs().max()
    assert (score.cpu().double() - expected).abs().max() <= 2 * noise + 1e-6


@pytest.mark.parametrize("tokens", [1, 31, 1025])
def test_sanitizer_select(tokens: int) -> None:
    scores = torch.randint(0, 50, (3, tokens)).float()  # ties
    forced = torch.rand(3, tokens) < 0.1
    for options in ({"keep": tokens // 3}, {"mass": 0.9}):
        expected = reference.select(scores, forced=forced, **options)
        found = ops.select(scores.cuda(), forced=forced.cuda(), **options)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sanitizer_select_diverse(dtype: torch.dtype) -> None:
    scores = torch.rand(2, 65)
    features = torch.randn(2, 65, 33).to(dtype)
    expected = reference.select_diverse(scores, features, keep=17)
    found = ops.select_diverse(scores.cuda(), features.cuda(), keep=17)
    assert torch.equal(found.count.cpu(), expected.count)
    assert (found.index.cpu() == expected.index).float().mean() > 0.9  # a near-tie may fall either way


@pytest.mark.parametrize("align", ["left", "right"])
def test_sanitizer_gather_tokens(align: str) -> None:
    tensors = [torch.randn(2, 65, 33), torch.randint(0, 9, (2, 65)), torch.randn(2, 65, 3, 8).bfloat16()]
    chosen = reference.select(torch.rand(2, 65), keep=torch.tensor([20, 65], dtype=torch.int32))
    expected = reference.gather_tokens(tensors, chosen.index, chosen.count, align=align)
    found = ops.gather_tokens(cuda(*tensors), chosen.index.cuda(), chosen.count.cuda(), align=align)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sanitizer_merge_tokens(dtype: torch.dtype) -> None:
    x = torch.randn(2, 65, 33).to(dtype)
    chosen = reference.select(torch.rand(2, 65), keep=20)
    weight, group = torch.rand(2, 65), torch.randint(-1, 2, (2, 65), dtype=torch.int32)
    expected = reference.merge_tokens(x.double(), chosen, weight.double(), group)
    plain = reference.merge_tokens(x, chosen, weight, group)
    found = ops.merge_tokens(
        x.cuda(), type(chosen)(*cuda(chosen.index, chosen.count, chosen.inverse)), weight.cuda(), group.cuda()
    )
    noise = (plain.double() - expected).abs().max()
    assert (found.cpu().double() - expected).abs().max() <= 2 * noise + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_head", [False, True])
def test_sanitizer_compact_kv(dtype: torch.dtype, per_head: bool) -> None:
    keys = [torch.randn(2, tokens, 2, 32).to(dtype) for tokens in (65, 130)]
    values = [torch.randn_like(key) for key in keys]
    index, count = [], []
    for key in keys:
        rows = 4 if per_head else 2
        chosen = reference.select(torch.rand(rows, key.shape[1]), keep=key.shape[1] // 3)
        index.append(chosen.index.view(2, 2, -1) if per_head else chosen.index)
        count.append(chosen.count.view(2, 2) if per_head else chosen.count)
    on_gpu = [cuda(*tensors) for tensors in (keys, values, index, count)]
    reference.compact_kv_(keys, values, index, count)
    ops.compact_kv_(*on_gpu)
    kept = keys[0].shape[1] // 3
    for found, expected in zip(on_gpu[0] + on_gpu[1], keys + values, strict=True):
        assert torch.equal(found.cpu()[:, :kept], expected[:, :kept])
