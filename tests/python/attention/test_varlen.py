"""flash_attn_varlen_func and its packed relatives, sequence by sequence against the formula."""

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


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def inputs(
    rows: list[int],
    keys: list[int],
    heads: int = 4,
    key_heads: int = 2,
    width: int = 32,
    dtype: Any = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((sum(rows), heads, width), (sum(keys), key_heads, width), (sum(keys), key_heads, width))
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    return q, k, v


def check(
    q: Tensor, k: Tensor, v: Tensor, rows: list[int], keys: list[int], shaping: Shaping, window: int = 2
) -> None:
    out, lse, _, scores = fa.flash_attn_varlen_func(
        q, k, v, offsets(rows), offsets(keys), max(rows), max(keys),
        **shaping.kwargs(), return_attn_probs=True, importance_window=window,
    )  # fmt: skip
    assert out.shape == q.shape
    assert lse.shape == (q.shape[1], q.shape[0])
    assert scores.shape == k.shape[:1]
    for b, (queries, of_rows, key, value, score) in enumerate(
        zip(
            q.split(rows),
            lse.split(rows, dim=1),
            k.split(keys),
            v.split(keys),
            scores.split(keys),
            strict=True,
        )
    ):
        found = out.split(rows)[b], of_rows
        oracle.check(found, queries, key, value, shaping, b)
        last = list(range(max(0, rows[b] - window), rows[b]))
        oracle.check_scores(score, oracle.importance(queries, key, shaping, last, b), q.dtype)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"causal": True, "softcap": 2.0},
    {
        "alibi_slopes": torch.tensor([[0.5, 0.25, 0.125, 1.0]] * 4) * torch.arange(1, 5)[:, None],
        "causal": True,
    },
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "full")
@pytest.mark.parametrize(
    "lengths",
    [([5, 1, 9, 3], [5, 1, 9, 3]), ([5, 0, 2, 3], [7, 4, 0, 3]), ([0, 6, 9, 0], [0, 11, 4, 3])],
    ids=["equal", "some-empty", "more-queries"],
)
def test_sequences(lengths: tuple[list[int], list[int]], options: dict[str, Any], dtype: torch.dtype) -> None:
    check(*inputs(*lengths, dtype=dtype), *lengths, Shaping(**options))


@given(data=st.data())
def test_random_sequences(data: st.DataObject) -> None:
    draw = data.draw
    batch = draw(st.integers(1, 4))
    lengths = st.lists(st.integers(0, 20), min_size=batch, max_size=batch)
    rows, keys = draw(lengths), draw(lengths)
    shaping = Shaping(
        causal=draw(st.booleans()),
        window_size=draw(st.tuples(st.integers(-1, 8), st.integers(-1, 8))),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    q, k, v = inputs(rows, keys, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])))
    if draw(st.booleans()):
        shaping.alibi_slopes = torch.rand(batch, 4)
    check(q, k, v, rows, keys, shaping, draw(st.integers(1, 25)))
    with use_backend("tiled"):
        check(q, k, v, rows, keys, shaping, draw(st.integers(1, 25)))


def test_packed_projections() -> None:
    lengths = [4, 0, 7]
    qkv = torch.randn(11, 3, 4, 32)
    at = offsets(lengths)
    options: dict[str, Any] = {"causal": True, "return_attn_probs": True, "importance_window": 3}
    wanted = fa.flash_attn_varlen_func(*qkv.unbind(1), at, at, 7, 7, **options)
    for found in (
        fa.flash_attn_varlen_qkvpacked_func(qkv, at, 7, **options),
        fa.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], at, at, 7, 7, **options),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True) if a is not None)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=lambda options: "-".join(options) or "full")
def test_tokens_outside_all_sequences(options: dict[str, Any]) -> None:
    """Room before the first and after the last sequence: nothing is computed there, and nothing read."""
    q, k, v = inputs([12], [12])
    for tensor in (k, v):
        tensor[:2], tensor[9:] = torch.nan, torch.nan
    at = torch.tensor([2, 5, 9], dtype=torch.int32)
    out, lse, _, scores = fa.flash_attn_varlen_func(
        q, k, v, at, at, 4, 4, **options, return_attn_probs=True, importance_window=2
    )
    inner = fa.flash_attn_varlen_func(
        q[2:9], k[2:9], v[2:9], at - 2, at - 2, 4, 4, **options, return_attn_probs=True, importance_window=2
    )
    assert torch.equal(out[2:9], inner[0])
    assert torch.equal(lse[:, 2:9], inner[1])
    assert torch.equal(scores[2:9], inner[3])
    outside = torch.ones(12, dtype=torch.bool)
    outside[2:9] = False
    assert not out[outside].any()
    assert (lse[:, outside] == -torch.inf).all()
    assert not scores[outside].any()


@pytest.mark.parametrize("options", OPTIONS[:4], ids=lambda options: "-".join(options) or "full")
@pytest.mark.parametrize("size", [1, 3, 16, 256])
def test_pages(size: int, options: dict[str, Any]) -> None:
    """Keys in pages, whatever their size: as the same keys one after the other; importance in a row for each."""
    rows, keys = [5, 0, 3], [33, 7, 0]
    q, k, v = inputs(rows, keys)
    blocks = [-(-length // size) for length in keys]
    table = torch.full((3, max(blocks)), 99, dtype=torch.int32)  # what is past the end is not looked at
    order = torch.randperm(sum(blocks) + 2)
    pages = [torch.full((sum(blocks) + 2, size, 2, 32), torch.nan) for _ in range(2)]
    taken = 0
    for b, count in enumerate(blocks):
        table[b, :count] = order[taken : taken + count]
        for store, tokens in zip(pages, (k, v), strict=True):
            for n, token in enumerate(tokens.split(keys)[b]):
                store[table[b, n // size], n % size] = token
        taken += count
    window = {**options, "return_attn_probs": True, "importance_window": 2}
    found = fa.flash_attn_varlen_func(
        q, *pages, offsets(rows), offsets(keys), 5, 33, **window, block_table=table
    )
    wanted = fa.flash_attn_varlen_func(q, k, v, offsets(rows), offsets(keys), 5, 33, **window)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert found[3].shape == (3, max(blocks) * size)
    for row, score, length in zip(found[3], wanted[3].split(keys), keys, strict=True):
        torch.testing.assert_close(row[:length], score, atol=1e-7, rtol=1e-5)
        assert not row[length:].any()


def test_chosen_rows() -> None:
    """A row that a sequence does not have is ignored there."""
    rows, keys = [5, 2], [5, 4]
    q, k, v = inputs(rows, keys)
    for options in ({"causal": True}, {}, {"window_size": (1, 0)}):
        _, scores = fa.flash_attn_varlen_func(
            q, k, v, offsets(rows), offsets(keys), 5, 5, **options, importance_window=[0, 3, -2]
        )
        for b, chosen in enumerate(([0, 3, 3], [0, 0])):
            wanted = oracle.importance(q.split(rows)[b], k.split(keys)[b], Shaping(**options), chosen)
            oracle.check_scores(scores.split(keys)[b], wanted, q.dtype)


def test_bad_lengths() -> None:
    q, k, v = inputs([6], [6])
    good = torch.tensor([0, 2, 6], dtype=torch.int32)

    def call(**changed: Any) -> Any:
        lengths = {"cu_seqlens_q": good, "cu_seqlens_k": good, "max_seqlen_q": 4, "max_seqlen_k": 4}
        return fa.flash_attn_varlen_func(q, k, v, **{**lengths, **changed})

    call()
    with pytest.raises(
        ValueError, match="max_seqlen_q: got 3, must be at least 4, the length of row 1 in cu_seqlens_q"
    ):
        call(max_seqlen_q=3)
    with pytest.raises(ValueError, match="max_seqlen_k: got 3, must be at least 4"):
        call(max_seqlen_k=3)
    with pytest.raises(TypeError, match="max_seqlen_q: got Tensor, must be an int"):
        call(max_seqlen_q=torch.tensor(4.0))
    with pytest.raises(TypeError, match="cu_seqlens_q: has dtype int64, must be int32"):
        call(cu_seqlens_q=good.long())
    with pytest.raises(ValueError, match=r"cu_seqlens_k: has shape \(2,\), must be \(3,\)"):
        call(cu_seqlens_k=good[:2])
    with pytest.raises(ValueError, match=r"cu_seqlens_k: row 1 is \[7, 6\), must ascend"):
        call(cu_seqlens_k=torch.tensor([0, 7, 6], dtype=torch.int32), max_seqlen_k=9)
    with pytest.raises(ValueError, match="cu_seqlens_q: ends at 7, must be at most 6, the tokens of q"):
        call(cu_seqlens_q=torch.tensor([0, 3, 7], dtype=torch.int32))
    pages = torch.zeros(2, 4, 2, 32)
    table = torch.tensor([[0], [2]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"block_table: row 1 has page 2, must be in \[0, 2\)"):
        fa.flash_attn_varlen_func(q, pages, pages, good, good, 4, 4, block_table=table)
    longer = torch.tensor([0, 5, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_k: row 0 has 5 keys, must be at most 4"):
        fa.flash_attn_varlen_func(q, pages, pages, good, longer, 4, 5, block_table=table)


def test_longest_lengths_as_tensors() -> None:
    """Call sites give flash-attn what max() of the lengths returns."""
    ends = offsets([3, 5])
    q, k, v = inputs([3, 5], [3, 5])
    longest = ends.diff().max()
    one = fa.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
    assert torch.equal(one, fa.flash_attn_varlen_func(q, k, v, ends, ends, 5, 5, causal=True))
