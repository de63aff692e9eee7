"""flash_attn_func and its packed relatives, against float64 attention from the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightvlm import flash_attn_interface as fa
from lightvlm.attention import use_backend
from torch import Tensor

from . import oracle
from .oracle import Shaping

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(
    rows: int,
    keys: int,
    heads: int = 4,
    key_heads: int = 2,
    width: int = 32,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, rows, heads, width), (batch, keys, key_heads, width), (batch, keys, key_heads, width))
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, shaping: Shaping, window: int = 2) -> None:
    out, lse, dropped, scores = fa.flash_attn_func(
        q, k, v, **shaping.kwargs(), return_attn_probs=True, importance_window=window
    )
    assert dropped is None
    assert out.shape == q.shape
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert scores.shape == k.shape[:2]
    for row in range(q.shape[0]):
        oracle.check((out[row], lse[row]), q[row], k[row], v[row], shaping, row)
        last = list(range(max(0, q.shape[1] - window), q.shape[1]))
        wanted = oracle.importance(q[row], k[row], shaping, last, row)
        oracle.check_scores(scores[row], wanted, q.dtype)


LENGTHS = [(5, 5), (1, 9), (3, 9), (9, 3), (17, 16), (1, 1)]
SHAPINGS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"window_size": (0, 0)},
    {"window_size": (3, -1)},
    {"window_size": (-1, 2)},
    {"window_size": (2, 4), "causal": True},
    {"softcap": 1.5},
    {"softcap": 3.0, "causal": True, "window_size": (4, -1)},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
    {"alibi_slopes": torch.rand(2, 4, generator=torch.Generator().manual_seed(3)), "causal": True},
    {"softmax_scale": 0.3, "causal": True},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("options", SHAPINGS, ids=lambda options: "-".join(options) or "full")
def test_masks_and_biases(lengths: tuple[int, int], options: dict[str, Any], dtype: torch.dtype) -> None:
    check(*inputs(*lengths, dtype=dtype), Shaping(**options))


@pytest.mark.parametrize("width", [32, 40, 64, 72, 96, 104, 128, 160, 192, 224, 248, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(width: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(7, 11, width=width, dtype=dtype)
    for options in ({"causal": True}, {"window_size": (3, 0)}):
        check(q, k, v, Shaping(**options))
    check(q[:, :1], k, v, Shaping())


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 1), (6, 2), (14, 2)], ids=str)
def test_groups_of_heads(heads: tuple[int, int]) -> None:
    for rows in (1, 6):
        q, k, v = inputs(rows, 10, *heads)
        for options in ({}, {"causal": True}, {"window_size": (2, 2)}):
            check(q, k, v, Shaping(**options))


def test_rows_that_see_nothing() -> None:
    """Above the triangle, and beyond the reach of a window: output 0 and log-sum-exp -inf, whatever values hold."""
    q, k, v = inputs(9, 3)
    for options in ({"causal": True}, {"causal": True, "softcap": 2.0}, {"window_size": (1, 1)}):
        out, lse, _, scores = fa.flash_attn_func(
            q, k, v, **options, return_attn_probs=True, importance_window=9
        )
        blind = ~oracle.visible(9, 3, Shaping(**options)).any(1)
        assert blind.any()
        assert torch.equal(out[:, blind], torch.zeros_like(out[:, blind]))
        assert torch.equal(lse[:, :, blind], torch.full_like(lse[:, :, blind], -torch.inf))
        assert out.isfinite().all()
        assert scores.isfinite().all()


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("keys", [0, 4])
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_there(batch: int, rows: int, keys: int) -> None:
    q, k, v = inputs(rows, keys, batch=batch)
    out, lse, _, scores = fa.flash_attn_func(
        q, k, v, causal=True, return_attn_probs=True, importance_window=1
    )
    assert out.shape == q.shape
    assert lse.shape == (batch, 4, rows)
    assert scores.shape == (batch, keys)
    if not keys:
        assert not out.any()
        assert (lse == -torch.inf).all()
    if not rows:
        assert not scores.any()


def test_strided_inputs() -> None:
    """Head-first storage, slices, and channels that are not contiguous: as contiguous copies."""
    stored = [torch.randn(2, 4, 9, 32), torch.randn(2, 2, 9, 64), torch.randn(32, 2, 9, 2)]
    q, k, v = stored[0].transpose(1, 2), stored[1].transpose(1, 2)[..., ::2], stored[2].permute(1, 2, 3, 0)
    for options in ({}, {"causal": True}, {"window_size": (2, 0)}, {"softcap": 1.0}):
        check(q, k, v, Shaping(**options))
        check(q[:, -1:], k, v, Shaping(**options))


def test_packed_projections() -> None:
    """kv and qkv in one tensor are the same call."""
    qkv = torch.randn(2, 7, 3, 4, 32)
    options: dict[str, Any] = {"causal": True, "return_attn_probs": True, "importance_window": 3}
    wanted = fa.flash_attn_func(*qkv.unbind(2), **options)
    for found in (
        fa.flash_attn_qkvpacked_func(qkv, **options),
        fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True) if a is not None)


def test_what_is_returned() -> None:
    q, k, v = inputs(5, 5)
    out = fa.flash_attn_func(q, k, v)
    assert isinstance(out, Tensor)
    with_lse = fa.flash_attn_func(q, k, v, return_attn_probs=True)
    assert len(with_lse) == 3
    with_scores = fa.flash_attn_func(q, k, v, importance_window=1)
    assert len(with_scores) == 2
    assert torch.equal(with_lse[0], out)
    assert torch.equal(with_scores[0], out)


@pytest.mark.parametrize(
    "options", [{"causal": True}, {}, {"window_size": (3, 1)}, {"softcap": 2.0}], ids=str
)
def test_chosen_rows(options: dict[str, Any]) -> None:
    """Rows by number, from either end, the same for all or for each batch row."""
    q, k, v = inputs(6, 8)
    shaping = Shaping(**options)

    def scores(rows: Any) -> Tensor:
        return fa.flash_attn_func(q, k, v, **options, importance_window=rows)[1]

    for rows in ([0, 3, 5], [4], [-1, 2], list(range(6))):
        found = scores(rows)
        assert torch.equal(found, scores(torch.tensor(rows)))
        assert torch.equal(found, scores(torch.tensor([rows, rows], dtype=torch.int32)))
        for row in range(2):
            wanted = oracle.importance(q[row], k[row], shaping, rows, row)
            oracle.check_scores(found[row], wanted, q.dtype)
    each = scores(torch.tensor([[0, 1], [5, 2]]))
    for row, rows in enumerate(([0, 1], [5, 2])):
        wanted = oracle.importance(q[row], k[row], shaping, rows, row)
        oracle.check_scores(each[row], wanted, q.dtype)


def test_a_batch_is_the_same_as_one_by_one() -> None:
    q, k, v = inputs(33, 40, batch=3)
    for options in ({"causal": True}, {"window_size": (5, 3)}, {"causal": True, "softcap": 2.0}):
        whole = fa.flash_attn_func(q, k, v, **options, return_attn_probs=True, importance_window=4)
        for row in range(3):
            one = slice(row, row + 1)
            alone = fa.flash_attn_func(
                q[one], k[one], v[one], **options, return_attn_probs=True, importance_window=4
            )
            assert all(torch.equal(a[one], b) for a, b in zip(whole, alone, strict=True) if a is not None)


@given(data=st.data())
def test_random_calls(data: st.DataObject) -> None:
    """Shapes, masks and precisions in any combination; and every backend that can run the call agrees."""
    draw = data.draw
    key_heads = draw(st.integers(1, 3))
    heads = key_heads * draw(st.integers(1, 4))
    shaping = Shaping(
        causal=draw(st.booleans()),
        window_size=draw(st.tuples(st.integers(-1, 12), st.integers(-1, 12))),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.0, 20.0])),
        softmax_scale=draw(st.sampled_from([None, 0.05, 0.5])),
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    batch = draw(st.integers(1, 2))
    if draw(st.booleans()):
        shaping.alibi_slopes = torch.rand(heads) if draw(st.booleans()) else torch.rand(batch, heads)
    rows, keys = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    width = draw(st.sampled_from([8, 32, 40, 64]))
    q, k, v = inputs(rows, keys, heads, key_heads, width, batch, draw(st.sampled_from(DTYPES)))
    check(q, k, v, shaping, window=draw(st.integers(1, 45)))
    with use_backend("tiled"):
        check(q, k, v, shaping, window=draw(st.integers(1, 45)))


def test_long_rows_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and probe rows that do not fit one tile."""
    from lightvlm.attention import probing, tiled

    q, k, v = inputs(50, 70)
    wanted = fa.flash_attn_func(
        q, k, v, softcap=2.0, window_size=(9, 4), return_attn_probs=True, importance_window=50
    )
    for module in (tiled, probing):
        monkeypatch.setattr(module, "_TILE_NUMBERS", 7 * 4 * 70)
    found = fa.flash_attn_func(
        q, k, v, softcap=2.0, window_size=(9, 4), return_attn_probs=True, importance_window=50
    )
    for a, b in zip(found, wanted, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
