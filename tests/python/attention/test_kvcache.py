"""flash_attn_with_kvcache: what it writes, and what it attends to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightvlm import flash_attn_interface as fa
from lightvlm.attention import use_backend
from lightvlm.attention.append import append_
from torch import Tensor

from lightvlm_ext._observe import OpCall, observe

from . import oracle
from .oracle import Shaping

CAPACITY, HEADS, KEY_HEADS, WIDTH = 32, 4, 2, 32


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def caches(rows: int, capacity: int = CAPACITY, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(rows, capacity, KEY_HEADS, WIDTH).to(dtype) for _ in range(2)]


def turned(x: Tensor, cos: Tensor, sin: Tensor, positions: list[int], interleaved: bool) -> Tensor:
    """x (S, H, D) in float64, each pair of channels turned by its angle, one pair at a time."""
    out = x.double().clone()
    half = cos.shape[1]
    for i, at in enumerate(positions):
        for pair in range(half):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
            c, s = cos[at, pair].double(), sin[at, pair].double()
            first, second = x[i, :, a].double(), x[i, :, b].double()
            out[i, :, a], out[i, :, b] = first * c - second * s, first * s + second * c
    return out


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": (3, 0)},
    {"causal": True, "softcap": 2.0},
    {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "full")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("new", [None, 1, 3])
def test_ragged_rows(new: int | None, rows: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Rows of different length with padding before, by index into the cache, appended to or not."""
    stored = caches(4, dtype=dtype)
    wanted = [cache.clone() for cache in stored]
    lens, pads, index = [20, 4, 0], [5, 0, 0], [2, 0, 3]
    q = torch.randn(3, rows, HEADS, WIDTH).to(dtype)
    added = [None if new is None else torch.randn(3, new, KEY_HEADS, WIDTH).to(dtype) for _ in range(2)]
    out, lse, scores = fa.flash_attn_with_kvcache(
        q, *stored, *added, cache_seqlens=ints(*lens), cache_leftpad=ints(*pads), cache_batch_idx=ints(*index),
        **options, return_softmax_lse=True, importance_window=2,
    )  # fmt: skip
    shaping = Shaping(**options)
    for b in range(3):
        end = lens[b] + (new or 0)
        for cache, extra in zip(wanted, added, strict=True):
            if extra is not None:
                cache[index[b], lens[b] : end] = extra[b]
        key, value = (cache[index[b], pads[b] : end] for cache in wanted)
        oracle.check((out[b], lse[b]), q[b], key, value, shaping, b)
        last = list(range(max(0, rows - 2), rows))
        oracle.check_scores(scores[b, pads[b] : end], oracle.importance(q[b], key, shaping, last, b), dtype)
        assert not scores[b, : pads[b]].any()
        assert not scores[b, end:].any()
    assert all(torch.equal(a, b) for a, b in zip(stored, wanted, strict=True))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=lambda options: "-".join(options) or "full")
def test_rotary(options: dict[str, Any], width: int, interleaved: bool) -> None:
    """Keys turn at their places; queries too, but all at the first new place without a mask."""
    stored = caches(2)
    lens, new, rows = [7, 12], 2, 3
    angle = torch.rand(CAPACITY, width // 2) * 6.28
    cos, sin = angle.cos(), angle.sin()
    q = torch.randn(2, rows, HEADS, WIDTH)
    k, v = (torch.randn(2, new, KEY_HEADS, WIDTH) for _ in range(2))
    before = [cache.clone() for cache in stored]
    out, lse, scores = fa.flash_attn_with_kvcache(
        q, *stored, k, v, cos, sin, ints(*lens), rotary_interleaved=interleaved,
        **options, return_softmax_lse=True, importance_window=2,
    )  # fmt: skip
    for b, length in enumerate(lens):
        key = turned(k[b], cos, sin, [length, length + 1], interleaved)
        torch.testing.assert_close(stored[0][b, length : length + new].double(), key, atol=1e-6, rtol=1e-5)
        assert torch.equal(stored[1][b, length : length + new], v[b])
        positions = [length + i for i in range(rows)] if options else [length] * rows
        query = turned(q[b], cos, sin, positions, interleaved).float()
        held = stored[0][b, : length + new], stored[1][b, : length + new]
        oracle.check((out[b], lse[b]), query, *held, Shaping(**options))
        wanted = oracle.importance(query, held[0], Shaping(**options), [1, 2])
        oracle.check_scores(scores[b, : length + new], wanted, torch.float32)
        for cache, old in zip(stored, before, strict=True):
            assert torch.equal(cache[b, :length], old[b, :length])
            assert torch.equal(cache[b, length + new :], old[b, length + new :])


@pytest.mark.parametrize("options", OPTIONS[:4], ids=lambda options: "-".join(options) or "full")
@pytest.mark.parametrize("size", [4, 16, 256])
@pytest.mark.parametrize("rows", [1, 2])
def test_pages(rows: int, size: int, options: dict[str, Any]) -> None:
    """Append and attend to pages of any size: as to rows; pages and entries beyond are not touched."""
    lens, new, blocks = ints(18, 3), 2, -(-CAPACITY // size)
    q = torch.randn(2, rows, HEADS, WIDTH)
    k, v = (torch.randn(2, new, KEY_HEADS, WIDTH) for _ in range(2))
    dense = caches(2, blocks * size)
    table = torch.randperm(2 * blocks + 3)[: 2 * blocks].view(2, blocks).int()
    pages = [torch.full((2 * blocks + 3, size, KEY_HEADS, WIDTH), torch.nan) for _ in range(2)]
    for store, cache in zip(pages, dense, strict=True):
        store[table.flatten().long()] = cache.reshape(-1, size, KEY_HEADS, WIDTH)
    wanted = fa.flash_attn_with_kvcache(
        q, *dense, k, v, cache_seqlens=lens, **options, return_softmax_lse=True, importance_window=1
    )
    unused = torch.full((2, 1), -7, dtype=torch.int32)
    found = fa.flash_attn_with_kvcache(
        q, *pages, k, v, cache_seqlens=lens, block_table=torch.cat([table, unused], 1), **options,
        return_softmax_lse=True, importance_window=1,
    )  # fmt: skip
    for a, b in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found[2][:, : blocks * size], wanted[2], atol=1e-6, rtol=1e-5)
    for store, cache in zip(pages, dense, strict=True):
        assert torch.equal(store[table.flatten().long()].view(2, -1, KEY_HEADS, WIDTH), cache)


def test_a_block_table_of_any_strides() -> None:
    """As flash-attn, which copies it."""
    pages = [torch.randn(6, 16, KEY_HEADS, WIDTH) for _ in range(2)]
    q, table = torch.randn(2, 1, HEADS, WIDTH), ints(3, 0, 5, 2).view(2, 2)
    strided = table.T.contiguous().T
    one = fa.flash_attn_with_kvcache(q, *pages, cache_seqlens=20, block_table=strided)
    assert torch.equal(one, fa.flash_attn_with_kvcache(q, *pages, cache_seqlens=20, block_table=table))


def test_lengths_as_numbers() -> None:
    """An int for all rows, and none for a full cache."""
    q = torch.randn(2, 2, HEADS, WIDTH)
    stored = caches(2)
    for options in OPTIONS[:3]:
        one = fa.flash_attn_with_kvcache(q, *stored, cache_seqlens=9, **options)
        assert torch.equal(one, fa.flash_attn_with_kvcache(q, *stored, cache_seqlens=ints(9, 9), **options))
        torch.testing.assert_close(one, fa.flash_attn_func(q, *(x[:, :9] for x in stored), **options))
        full = fa.flash_attn_with_kvcache(q, *stored, **options)
        torch.testing.assert_close(full, fa.flash_attn_func(q, *stored, **options))


def test_tokens_outside_a_row_are_not_looked_at() -> None:
    stored = caches(2)
    q = torch.randn(2, 2, HEADS, WIDTH)
    lens, pads = ints(9, 0), ints(3, 0)
    for options in OPTIONS:
        for rows in (1, 2):
            args: dict[str, Any] = {
                "cache_seqlens": lens, "cache_leftpad": pads, **options, "return_softmax_lse": True,
                "importance_window": 1,
            }  # fmt: skip
            wanted = fa.flash_attn_with_kvcache(q[:, :rows], *stored, **args)
            spoiled = [cache.clone() for cache in stored]
            for cache in spoiled:
                cache[0, :3], cache[0, 9:], cache[1] = torch.nan, torch.nan, torch.nan
            found = fa.flash_attn_with_kvcache(q[:, :rows], *spoiled, **args)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert not found[0][1].any()
            assert (found[1][1] == -torch.inf).all()


@pytest.mark.parametrize("given_as", ["int", "tensor", "pages"])
def test_no_room(given_as: str) -> None:
    """Nothing is written when one row has no room."""
    stored = caches(2, 4)
    before = [cache.clone() for cache in stored]
    q, k, v = (torch.randn(2, 2, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    lens: Any = 3 if given_as == "int" else ints(1, 3)
    table = ints(0, 1)[:, None] if given_as == "pages" else None
    with pytest.raises(
        ValueError, match=r"cache_seqlens: .*3, must be in \[0, 2\]: 2 new tokens and a capacity of 4"
    ):
        fa.flash_attn_with_kvcache(q, *stored, k, v, cache_seqlens=lens, block_table=table)
    assert all(torch.equal(a, b) for a, b in zip(stored, before, strict=True))


def test_a_call_that_no_backend_takes_writes_nothing() -> None:
    stored = caches(2)
    before = [cache.clone() for cache in stored]
    q, k, v = (torch.randn(2, 2, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    with use_backend("decode"), pytest.raises(ValueError, match="takes one query token a row"):
        fa.flash_attn_with_kvcache(q, *stored, k, v, cache_seqlens=3)
    assert all(torch.equal(a, b) for a, b in zip(stored, before, strict=True))


def test_append_to_full_rows_on_a_device() -> None:
    """Where lengths cannot be looked at: tokens beyond the capacity are left out, all others are written."""
    for table in (None, torch.tensor([[3, 0], [1, 2], [5, 4], [6, 7]], dtype=torch.int32)):
        shape = (4, 6, 2, 8) if table is None else (8, 3, 2, 8)
        cache = torch.randn(shape)
        lens, new = ints(0, 4, 6, 9), torch.randn(4, 3, 2, 8)
        rows = cache.clone() if table is None else cache[table.long()].flatten(1, 2)
        for b, length in enumerate(lens.tolist()):
            for t in range(3):
                if length + t < 6:
                    rows[b, length + t] = new[b, t]
        append_([cache], [new], lens, None, table, clip=True)
        assert torch.equal(cache if table is None else cache[table.long()].flatten(1, 2), rows)


def test_bad_calls() -> None:
    stored = caches(2)
    q, k, v = (torch.randn(2, 1, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    cos = torch.randn(CAPACITY, 8)

    def refused(message: str, *new: Any, error: type[Exception] = ValueError, **options: Any) -> None:
        before = [cache.clone() for cache in stored]
        with pytest.raises(error, match=message):
            fa.flash_attn_with_kvcache(q, *stored, *new, **options)
        assert all(torch.equal(a, b) for a, b in zip(stored, before, strict=True))

    refused("v: is None, must be given where", k, cache_seqlens=1)
    refused("k: got ndarray, must be a torch.Tensor", k.numpy(), v, error=TypeError, cache_seqlens=1)
    refused("v: got ndarray, must be a torch.Tensor", k, v.numpy(), error=TypeError, cache_seqlens=1)
    refused("cache_seqlens: is None, must say where k and v", k, v)
    refused("cache_seqlens: has dtype int64, must be int32", error=TypeError, cache_seqlens=ints(1, 1).long())
    refused(r"cache_seqlens: has shape \(3,\), must be \(2,\)", cache_seqlens=ints(1, 1, 1))
    refused(r"cache_seqlens: row 1 has 33, must be in \[0, 32\]", cache_seqlens=ints(1, 33))
    refused(r"cache_leftpad: row 0 has 5, must be in \[0, 4\]", cache_seqlens=4, cache_leftpad=ints(5, 0))
    refused(r"cache_batch_idx: row 1 has 2, must be in \[0, 2\)", cache_seqlens=4, cache_batch_idx=ints(0, 2))
    refused(
        "cache_batch_idx: must be None with block_table",
        cache_batch_idx=ints(0, 1),
        block_table=ints(0, 1)[:, None],
    )
    refused("rotary_sin: is None", k, v, cache_seqlens=1, rotary_cos=cos)
    refused("rotary_cos: must be None without k and v", cache_seqlens=1, rotary_cos=cos, rotary_sin=cos)
    refused("rotary_cos: has 8 positions, must have at least 32", k, v, cos[:8], cos[:8], 1)
    refused("rotary_cos: rotates 14 channels, must be a multiple of 16", k, v, cos[:, :7], cos[:, :7], 1)
    refused("num_splits: got -1, must be >= 0", num_splits=-1)


@given(data=st.data())
def test_random_caches(data: st.DataObject) -> None:
    """Lengths, paddings, rows, windows and backends in any combination."""
    draw = data.draw
    batch = draw(st.integers(1, 3))
    rows, new = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    lens = draw(st.lists(st.integers(0, CAPACITY - 3), min_size=batch, max_size=batch))
    pads = [draw(st.integers(0, length)) for length in lens]
    index = draw(st.permutations(range(3)))[:batch]
    shaping = Shaping(
        causal=draw(st.booleans()),
        window_size=draw(st.tuples(st.integers(-1, 9), st.integers(-1, 9))),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0])),
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    stored = caches(3, dtype=dtype)
    q = torch.randn(batch, rows, HEADS, WIDTH).to(dtype)
    added = [torch.randn(batch, new, KEY_HEADS, WIDTH).to(dtype) for _ in range(2)]
    results = []
    for backend in (None, "tiled"):
        held = [cache.clone() for cache in stored]
        args: dict[str, Any] = {
            "cache_seqlens": ints(*lens), "cache_leftpad": ints(*pads), "cache_batch_idx": ints(*index),
            **shaping.kwargs(), "return_softmax_lse": True, "importance_window": draw(st.integers(1, 5)),
        }  # fmt: skip
        if backend is None:
            found = fa.flash_attn_with_kvcache(q, *held, *added, **args)
        else:
            with use_backend(backend):
                found = fa.flash_attn_with_kvcache(q, *held, *added, **args)
        for b in range(batch):
            key, value = (cache[index[b], pads[b] : lens[b] + new] for cache in held)
            oracle.check((found[0][b], found[1][b]), q[b], key, value, shaping, b)
            last = list(range(max(0, rows - args["importance_window"]), rows))
            wanted = oracle.importance(q[b], key, shaping, last, b)
            oracle.check_scores(found[2][b, pads[b] : lens[b] + new], wanted, dtype)
        results.append(held)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_decoding_step_calls_the_op_once_whatever_the_strides_of_lengths() -> None:
    """Reports count append_attend_; lengths and left pads may be columns of a wider tensor."""
    key, value = caches(3)
    query = torch.randn(3, 1, HEADS, WIDTH)
    table = ints(9, 2, 20, 0, 32, 31).view(3, 2)
    lens, leftpad = table[:, 0], table[:, 1]
    assert not lens.is_contiguous()
    wanted = fa.flash_attn_with_kvcache(
        query, key, value, cache_seqlens=lens.contiguous(), cache_leftpad=leftpad.contiguous()
    )
    calls: list[OpCall] = []
    with observe(calls.append), use_backend("decode"):
        found = fa.flash_attn_with_kvcache(query, key, value, cache_seqlens=lens, cache_leftpad=leftpad)
    assert [call.name for call in calls] == ["append_attend_"]
    assert torch.equal(found, wanted)


def test_a_cache_whose_rows_share_memory_is_not_written() -> None:
    key, value = caches(1)
    query, new = torch.randn(2, 1, HEADS, WIDTH), torch.randn(2, 1, KEY_HEADS, WIDTH)
    for stored, name in (
        ((key.expand(2, -1, -1, -1), value.repeat(2, 1, 1, 1)), "k_cache"),
        ((key.repeat(2, 1, 1, 1), value.expand(2, -1, -1, -1)), "v_cache"),
    ):
        with pytest.raises(ValueError, match=f"{name}: shares memory with itself"):
            fa.flash_attn_with_kvcache(query, *stored, new, new, cache_seqlens=5)
        fa.flash_attn_with_kvcache(query, *stored, cache_seqlens=5)


def test_no_new_token_of_any_strides() -> None:
    key, value = caches(1)
    query, none = torch.randn(1, 1, HEADS, WIDTH), torch.randn(1, 0, KEY_HEADS, 2 * WIDTH)[..., ::2]
    found = fa.flash_attn_with_kvcache(query, key, value, none, none, cache_seqlens=5)
    assert torch.equal(found, fa.flash_attn_with_kvcache(query, key, value, cache_seqlens=5))
