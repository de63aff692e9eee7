"""merge_pairs: pairs against float64 cosines, sums bit by bit, ToMe and LightKV by hand, windows, special values."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightvlm_ext import ops
from lightvlm_ext.ops import MergedPairs
from tests.emulation.build import Control
from tests.ops.backends import (
    BACKENDS,
    CPU,
    EMULATED,
    NATIVE,
    REFERENCE,
    Backend,
    emulation_library,
    load_emulation,
)

ROOT = Path(__file__).resolve().parents[2]
INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def int32(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


def cosines(metric: torch.Tensor) -> torch.Tensor:
    """Of all tokens of a row with each other."""
    vectors = torch.where(metric.isfinite().all(dim=-1, keepdim=True), metric.double(), 0)
    length = vectors.norm(dim=-1, keepdim=True)
    unit = torch.where(length > 0, vectors / length, 0)
    return unit @ unit.T


def roles(window: torch.Tensor, source: torch.Tensor | None, protected: torch.Tensor | None) -> list[str]:
    """Of each token of a row: s, d, or - where it takes no part."""
    found, seen = [], {}
    for t, i in enumerate(window.tolist()):
        position = seen[i] = seen.get(i, -1) + 1
        gives = position % 2 == 0 if source is None else bool(source[t])
        out = i < 0 or (protected is not None and bool(protected[t]))
        found.append("-" if out else "s" if gives else "d")
    return found


def check_pairs(
    result: MergedPairs,
    metric: torch.Tensor,
    window: torch.Tensor,
    merge: Any,
    source: torch.Tensor | None = None,
    protected: torch.Tensor | None = None,
) -> None:
    """Who is left, and that no other pairs are closer than fp32 sums can tell. merge: as pairs(row, id, members)."""
    index, count, inverse = result.selection
    bound = 4 * (metric.shape[-1] + 4) * 2.0**-24
    for row in range(window.shape[0]):
        ids = window[row].tolist()
        kept = index[row, : int(count[row])].tolist()
        assert kept == sorted(set(kept))
        assert (index[row, int(count[row]) :] == -1).all()
        assert inverse[row].tolist() == [kept.index(t) if t in kept else -1 for t in range(len(ids))]
        into = [-1 if e < 0 else kept[e] for e in result.target[row].tolist()]
        assert [t for t, i in enumerate(into) if i < 0] == [t for t, i in enumerate(ids) if i < -1]
        assert [t for t, i in enumerate(into) if i == t] == kept
        part = roles(window[row], *(None if m is None else m[row] for m in (source, protected)))
        cosine = cosines(metric[row])
        for window_id in {i for i in ids if i >= 0}:
            members = [t for t, i in enumerate(ids) if i == window_id and part[t] != "-"]
            gives = [t for t in members if part[t] == "s"]
            takes = [t for t in members if part[t] == "d"]
            pairs = merge(row, window_id, len(members))
            pairs = min(pairs, len(members) // 2) if source is None else pairs
            merged = [t for t in gives if into[t] != t]
            assert len(merged) == (min(pairs, len(gives)) if takes else 0)
            assert all(into[t] == t for t in takes)
            best = {t: float(cosine[t, takes].max()) for t in gives} if takes else {}
            for t in merged:
                assert into[t] in takes
                assert cosine[t, into[t]] >= best[t] - bound
            behind = max((best[t] for t in set(best) - set(merged)), default=-INF)
            assert all(best[t] >= behind - bound for t in merged)


def exact(
    result: MergedPairs,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float = 0.0,
    right: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and weight that belong to these choices: every product and sum rounded to fp32, tokens in order."""
    rows, slots = result.selection.index.shape
    weight = torch.ones(x.shape[:2]) if weight is None else weight
    out, sums = torch.zeros(rows, slots, x.shape[2], dtype=x.dtype), torch.zeros(rows, slots)
    for row in range(rows):
        count = int(result.selection.count[row])
        for entry in range(count):
            center = int(result.selection.index[row, entry])
            arrives = [t for t in (result.target[row] == entry).nonzero().flatten().tolist() if t != center]
            slot = slots - count + entry if right else entry
            sums[row, slot] = weight[row, center]
            value, total = weight[row, center] * x[row, center].float(), weight[row, center]
            if not weight[row, center] > 0:
                value = torch.zeros(x.shape[2])
            for t in arrives:
                if weight[row, t] > 0:
                    value, total = value + weight[row, t] * x[row, t].float(), total + weight[row, t]
                sums[row, slot] += weight[row, t]
            moved = any(weight[row, t] > 0 for t in arrives)
            out[row, slot] = (value / total.clamp_min(eps)).to(x.dtype) if moved else x[row, center]
    return out, sums


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, a NaN to a NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def check(
    backend: Backend,
    x: torch.Tensor,
    window: torch.Tensor,
    merge: Any = 0.5,
    pairs: Any = None,
    **options: Any,
) -> MergedPairs:
    result = backend.merge_pairs(x, window, merge=merge, **options)
    metric = options.get("metric")
    if pairs is None:
        pairs = lambda r, i, m: math.floor(merge * m) if isinstance(merge, float) else merge  # noqa: E731
    masks = (options.get("source"), options.get("protected"))
    check_pairs(result, x if metric is None else metric, window, pairs, *masks)
    out, sums = exact(
        result, x, options.get("weight"), eps=options.get("eps", 0.0), right=options.get("align") == "right"
    )
    if backend is REFERENCE:
        precision = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype]
        assert torch.allclose(result.x, out, rtol=precision, atol=precision, equal_nan=True)
        assert torch.allclose(result.weight, sums)
    else:
        assert same_bits(result.x, out)
        assert same_bits(result.weight, sums)
    return result


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw(st.integers(1, 3)),
        "tokens": draw(st.sampled_from([0, 1, 2, 3, 9, 20, 40, 70])),
        "width": draw(st.sampled_from([0, 1, 3, 8, 16])),
        "metric_width": draw(st.sampled_from([None, 0, 1, 2, 8, 24, 40])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "metric_dtype": draw(st.sampled_from(DTYPES)),
        "merge": draw(st.sampled_from([0, 1, 5, 1000, 0.0, 0.3, 0.5, 1.0, "row", "window", "shares"])),
        "windows": draw(st.integers(1, 4)),
        "whole": draw(st.booleans()),
        "zero_weights": draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
        "source": draw(st.sampled_from([None, 0.2, 0.8])),
        "protected": draw(st.sampled_from([None, 0.3])),
        "eps": draw(st.sampled_from([0.0, 1e-8, 0.75])),
        "align": draw(st.sampled_from(["left", "right"])),
        "seed": draw(st.integers(0, 2**31)),
    }


@every_backend
@given(case=cases())
def test_pairs_and_sums(backend: Backend, case: dict[str, Any]) -> None:
    """Whole numbers make zero vectors, equal vectors and equal cosines."""
    torch.manual_seed(case["seed"])
    rows, tokens, windows = case["rows"], case["tokens"], case["windows"]

    def values(width: int, dtype: torch.dtype) -> torch.Tensor:
        drawn = torch.randn(rows, tokens, width)
        return (drawn.round() if case["whole"] else drawn).to(dtype)

    def mask(share: float | None) -> torch.Tensor | None:
        return None if share is None else torch.rand(rows, tokens) < share

    x = values(case["width"], case["dtype"])
    metric = None if case["metric_width"] is None else values(case["metric_width"], case["metric_dtype"])
    window = torch.randint(-2, windows, (rows, tokens), dtype=torch.int32)
    merge, pairs = case["merge"], None
    if merge == "row":
        merge = torch.randint(0, 10, (rows,), dtype=torch.int32)
        pairs = lambda r, i, m: int(merge[r])  # noqa: E731
    elif merge == "window":
        merge = torch.randint(0, 10, (rows, windows), dtype=torch.int32)
        pairs = lambda r, i, m: int(merge[r, i])  # noqa: E731
    elif merge == "shares":
        merge = torch.rand(rows, windows)
        pairs = lambda r, i, m: int((merge[r, i] * m).floor())  # noqa: E731
    kept = case["zero_weights"]
    weight = None if kept is None else torch.rand(rows, tokens) * (torch.rand(rows, tokens) >= kept)
    check(
        backend, x, window, merge, pairs, metric=metric, weight=weight, source=mask(case["source"]),
        protected=mask(case["protected"]), eps=case["eps"], align=case["align"],
    )  # fmt: skip


@native_backend
@every_dtype
@pytest.mark.parametrize("tokens", [31, 32, 33, 63, 64, 65, 66, 129, 200])
def test_odd_sizes(backend: Backend, dtype: torch.dtype, tokens: int) -> None:
    """One window of each size, and two that lie in each other; the tensor cores take widths of whole pieces."""
    for width in (31, 32, 40, 264):
        x = torch.randn(1, tokens, width).to(dtype)
        check(backend, x, torch.zeros(1, tokens, dtype=torch.int32))
        check(backend, x, (torch.arange(tokens) % 3 // 2)[None].int() * 1000, tokens // 5)


@every_dtype
def test_more_than_a_block(dtype: torch.dtype) -> None:
    """More sources, destinations and columns than the CPU twin takes at a time."""
    x = torch.randn(1, 1300, 1100).to(dtype)
    check(CPU, x, torch.zeros(1, 1300, dtype=torch.int32), 400, weight=torch.rand(1, 1300))
    check(CPU, x[:, :700, :40], torch.randint(0, 3, (1, 700), dtype=torch.int32))


@native_backend
@every_dtype
def test_one_destination_takes_all(backend: Backend, dtype: torch.dtype) -> None:
    """More arrivals than a block lists at a time, in rows that need more than one block of columns."""
    for tokens, width in ((66, 72), (700, 136), (700, 131)):
        source = torch.ones(1, tokens, dtype=torch.bool)
        source[0, 40] = False
        x = torch.randn(1, tokens, width).to(dtype)
        window = torch.zeros(1, tokens, dtype=torch.int32)
        weight = torch.rand(1, tokens) + 0.1
        weight[0, 5] = 0
        x[0, 5] = NAN
        result = check(backend, x, window, 1.0, source=source, weight=weight, metric=torch.ones(1, tokens, 1))
        assert result.selection.count.tolist() == [1]
        few = check(
            backend, x, window, tokens - 11, source=source, weight=weight, metric=torch.ones(1, tokens, 1)
        )
        # Equal cosines: the lower sources go.
        assert few.selection.index[0, :11].tolist() == [40, *range(tokens - 10, tokens)]


def tome(
    x: torch.Tensor, metric: torch.Tensor, size: torch.Tensor, r: int, protect: int
) -> tuple[torch.Tensor, ...]:
    """Bipartite soft matching with the size-weighted mean, in torch. Returns tokens in their order, and sizes."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    similarity = unit[0::2] @ unit[1::2].T
    similarity[:protect] = -INF
    best, to = similarity.max(dim=-1)
    order = best.argsort(descending=True)
    r = min(r, (len(x) - protect) // 2)
    gone = order[:r]
    total, summed = size[1::2].clone(), (x * size[:, None])[1::2].clone()
    total.index_add_(0, to[gone], size[0::2][gone])
    summed.index_add_(0, to[gone], (x * size[:, None])[0::2][gone])
    merged, sizes = x.clone(), size.clone()
    merged[1::2], sizes[1::2] = summed / total[:, None], total
    left = torch.ones(len(x), dtype=torch.bool)
    left[2 * gone] = False
    return merged[left], sizes[left]


@every_backend
def test_tome(backend: Backend) -> None:
    """Two layers of it: the sizes of one are the weights of the next; the class token neither gives nor receives."""
    for tokens, r in ((37, 5), (50, 25), (51, 100)):
        x, metric = torch.randn(tokens, 16), torch.randn(tokens, 24)
        protected = torch.zeros(1, tokens, dtype=torch.bool)
        protected[0, 0] = True
        size = torch.ones(tokens)
        for _ in range(2):
            n = len(x)
            expected, sizes = tome(x, metric[:n], size, r, 1)
            result = backend.merge_pairs(
                x[None], torch.zeros(1, n, dtype=torch.int32), merge=r, weight=size[None], metric=metric[None, :n],
                protected=protected[:, :n], capacity=len(expected),
            )  # fmt: skip
            assert result.selection.count.tolist() == [len(expected)]
            torch.testing.assert_close(result.x[0], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(result.weight[0], sizes)
            x, size = result.x[0], result.weight[0]
        assert size.sum() == tokens


def grid_windows(n: int, w: int) -> torch.Tensor:
    """LightKV's windows of n image tokens: a square of side ceil(sqrt(n)) in w parts a side, the first ones longer."""
    side = math.isqrt(n - 1) + 1
    part = torch.repeat_interleave(
        torch.arange(w), torch.tensor([side // w + (i < side % w) for i in range(w)])
    )
    return (part[:, None] * w + part).flatten()[:n].int()


@every_backend
def test_lightkv(backend: Backend) -> None:
    """Its counts, stage by stage, and message passing by its formula. Text passes through."""
    for n, sides, counts in ((576, (4, 2, 1), (288, 145, 73)), (2144, (6, 4, 2), (1073, 537, 269))):
        if backend is not CPU and n > 576:
            continue
        image, text = torch.randn(n, 8), torch.randn(7, 8)
        for side, left in zip(sides, counts, strict=True):
            x = torch.cat([text[:4], image, text[4:]])[None]
            xi = torch.rand(1, x.shape[1])
            window = torch.full((1, x.shape[1]), -1, dtype=torch.int32)
            window[0, 4:-3] = grid_windows(len(image), side)
            result = backend.merge_pairs(x, window, merge=0.5, weight=xi, eps=1e-8, capacity=left + 7)
            assert result.selection.count.tolist() == [left + 7]
            shares = torch.nn.functional.one_hot(result.target[0].long(), left + 7).double() * xi[0, :, None]
            expected = (shares.T @ x[0].double()) / shares.sum(dim=0).clamp_min(1e-8)[:, None]
            torch.testing.assert_close(result.x[0].double(), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(result.x[0, :4], text[:4])
            assert torch.equal(result.x[0, -3:], text[4:])
            image = result.x[0, 4:-3]


@every_backend
def test_equal_vectors_go_to_the_lower_ones(backend: Backend) -> None:
    for dtype in DTYPES:
        for tokens in (40, 150):  # a small window, and a large one
            x = torch.randn(1, 1, 24).repeat(1, tokens, 1)
            x[:, 1::4] *= 0.25
            result = backend.merge_pairs(
                x.to(dtype), torch.zeros(1, tokens, dtype=torch.int32), merge=7, metric=x.to(dtype)
            )
            gone = [t for t in range(tokens) if result.selection.inverse[0, t] < 0]
            assert gone == list(range(0, 14, 2))
            assert set(result.target[0, gone].tolist()) == {0}  # token 1 is the first that is left


@every_backend
def test_windows_in_words(backend: Backend) -> None:
    x = torch.arange(1.0, 13.0)[None, :, None]
    top = 2**31 - 1
    window = int32([[5, 5, -1, top, 0, 5, top, -1, -2, 5, -7, top]])
    result = check(backend, x, window, 0.5, metric=torch.ones(1, 12, 1))
    # 5: sources 0, 5, destinations 1, 9; top: 3 into 6, 11 is a source over the budget; 0: alone.
    assert result.selection.index.tolist() == [[1, 2, 4, 6, 7, 9, 11, -1, -1, -1, -1, -1]]
    assert result.target.tolist() == [[0, 0, 1, 3, 2, 0, 3, 4, -1, 5, -1, 6]]
    assert result.x.flatten().tolist() == [3.0, 3.0, 5.0, 5.5, 8.0, 10.0, 12.0] + [0.0] * 5
    assert result.weight.flatten().tolist() == [3, 1, 1, 2, 1, 1, 1] + [0] * 5
    moved = ops.gather_tokens(window, *result.selection[:2])
    assert moved[0, :7].tolist() == [5, -1, 0, top, -1, 5, top]


@every_backend
def test_source_and_protected(backend: Backend) -> None:
    x = torch.arange(1.0, 9.0)[None, :, None]
    window = torch.zeros(1, 8, dtype=torch.int32)
    source = torch.tensor([[True] * 5 + [False, True, True]])
    result = check(backend, x, window, 0.75, source=source)
    assert result.selection.index[0, :2].tolist() == [5, 7]  # six of seven sources, past half
    protected = torch.tensor([[True, True, False, False, False, False, False, False]])
    result = check(backend, x, window, 0.5, protected=protected)
    assert result.selection.index[0, :5].tolist() == [
        0,
        1,
        3,
        5,
        7,
    ]  # m is 6; positions still alternate over all 8
    assert result.target[0, [2, 4, 6]].tolist() == [2, 2, 2]
    result = check(backend, x, window, 0.5, source=source, protected=~source)
    assert result.selection.count.tolist() == [8]  # no destination is left


@every_backend
def test_shares_are_rounded_as_they_are_given(backend: Backend) -> None:
    """A Python share is a double, a tensor's a float32: 0.29 * 100 is 28.999... in the first, 29 in the second."""
    for share, tokens in ((0.35, 20), (0.29, 100), (0.07, 100), (0.5, 63)):
        x, window = torch.randn(1, tokens, 4), torch.zeros(1, tokens, dtype=torch.int32)
        count = backend.merge_pairs(x, window, merge=share).selection.count
        assert tokens - int(count) == min(math.floor(share * tokens), tokens // 2)
        count = backend.merge_pairs(x, window, merge=torch.tensor([share])).selection.count
        assert tokens - int(count) == min(int((torch.tensor(share) * tokens).floor()), tokens // 2)


@every_backend
def test_weights(backend: Backend) -> None:
    x = torch.tensor([[[1.0], [3.0]]])
    window = torch.zeros(1, 2, dtype=torch.int32)

    def merged(weight: list[float], eps: float = 0.0) -> tuple[float, float]:
        result = backend.merge_pairs(
            x, window, merge=1, weight=torch.tensor([weight], dtype=torch.float32), eps=eps
        )
        assert result.selection.count.tolist() == [1]
        return float(result.x[0, 0, 0]), float(result.weight[0, 0])

    assert merged([1, 3]) == (2.5, 4.0)
    assert merged([0, 3]) == (3.0, 3.0)  # nothing of weight arrives
    assert merged([2, 0]) == (1.0, 2.0)
    assert merged([0, 0]) == (3.0, 0.0)
    assert merged([-0.0, 1]) == (3.0, 1.0)
    assert merged([1.4e-45, 1.4e-45])[0] == 2.0
    assert merged([3e38, 3e38]) == (2.0, torch.finfo(torch.float32).max)
    assert merged([1, 3], eps=8.0) == (1.25, 4.0)
    assert merged([2.0**-30, 2.0**-30], eps=1e-8)[0] == pytest.approx(4 * 2.0**-30 / 1e-8)
    assert 0.0 <= merged([1e-38, 1e-38], eps=1e38)[0] < 1e-30


@every_backend
@every_dtype
def test_nan_and_infinity_stay_where_they_are(backend: Backend, dtype: torch.dtype) -> None:
    """They have cosine 0 to all; other windows and rows do not notice."""
    tokens = 160
    clean = torch.randn(2, tokens, 16).to(dtype)
    window = (torch.arange(tokens) // 80).int().repeat(2, 1)
    expected = backend.merge_pairs(clean, window, merge=1.0)
    for bad in (NAN, INF, -INF):
        x = clean.clone()
        x[1, 84, 3] = bad
        x[1, 91] = bad
        result = backend.merge_pairs(x, window, merge=1.0)
        check_pairs(result, x, window, lambda r, i, m: m)
        assert torch.equal(result.x[0], expected.x[0])
        assert torch.equal(result.x[1, :40], expected.x[1, :40])
        assert not result.x[1].isfinite().all()


@every_backend
def test_the_scale_of_the_metric_does_not_matter(backend: Backend) -> None:
    """Squares of these vectors over- or underflow in fp32; below 2^-126 all count as zero vectors."""
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (60, 90):
            x = torch.randn(1, tokens, 40).to(torch.bfloat16).to(dtype)
            window = torch.zeros(1, tokens, dtype=torch.int32)
            expected = backend.merge_pairs(x, window, merge=20).target
            for exponent in (-100, 100, torch.randint(-100, 101, (1, tokens, 1))):
                metric = (x.double() * 2.0**exponent).to(dtype)
                assert torch.equal(backend.merge_pairs(x, window, merge=20, metric=metric).target, expected)
            zero = backend.merge_pairs(x, window, merge=20, metric=(x.double() * 2.0**-135).to(dtype))
            assert torch.equal(
                zero.target, backend.merge_pairs(x, window, merge=20, metric=torch.zeros_like(x)).target
            )


def test_flushing_subnormals_changes_nothing() -> None:
    x = torch.randn(1, 4000, 3)
    window = torch.zeros(1, 4000, dtype=torch.int32)
    weight = torch.full((1, 4000), 1e-42)
    expected = ops.merge_pairs(x, window, merge=0.5, weight=weight)
    assert expected.x.isfinite().all()
    try:
        assert torch.set_flush_denormal(True)
        result = ops.merge_pairs(x, window, merge=0.5, weight=weight)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(result.x, expected.x)
    assert torch.equal(result.target, expected.target)


@every_backend
def test_empty_sizes(backend: Backend) -> None:
    for rows, tokens, width in ((0, 5, 4), (2, 0, 4), (2, 5, 0), (1, 1, 1)):
        x, window = torch.randn(rows, tokens, width), torch.zeros(rows, tokens, dtype=torch.int32)
        result = check(backend, x, window, 1)
        assert result.selection.count.tolist() == [tokens - (1 if tokens > 1 else 0)] * rows
    result = backend.merge_pairs(
        torch.randn(2, 0, 4), torch.zeros(2, 0, dtype=torch.int32), merge=1, capacity=3
    )
    assert result.selection.index.tolist() == [[-1] * 3] * 2
    assert not result.x.any()
    padding = torch.full((1, 5), -2, dtype=torch.int32)
    result = backend.merge_pairs(torch.randn(1, 5, 4), padding, merge=1, capacity=0)
    assert result.x.shape == (1, 0, 4)
    assert result.target.tolist() == [[-1] * 5]


@every_backend
def test_any_strides(backend: Backend) -> None:
    x, metric = torch.randn(2, 50, 24).half(), torch.randn(2, 50, 16)
    window = torch.randint(-1, 3, (2, 50), dtype=torch.int32)
    options = {
        "weight": torch.rand(2, 50),
        "source": torch.rand(2, 50) < 0.5,
        "protected": torch.rand(2, 50) < 0.1,
    }
    merge = torch.rand(2, 3)
    expected = backend.merge_pairs(x, window, merge=merge, metric=metric, **options)

    def wide(t: torch.Tensor) -> torch.Tensor:
        padded = torch.ones((*t.shape[:-1], 2 * t.shape[-1] + 3), dtype=t.dtype)
        padded[..., 1 : 1 + t.shape[-1]] = t
        return padded[..., 1 : 1 + t.shape[-1]]

    def reversed_(t: torch.Tensor) -> torch.Tensor:
        return t.permute(*range(t.dim() - 1, -1, -1)).contiguous().permute(*range(t.dim() - 1, -1, -1))

    for layout in (wide, reversed_):
        result = backend.merge_pairs(
            layout(x), layout(window), merge=layout(merge), metric=layout(metric),
            **{name: layout(t) for name, t in options.items()},
        )  # fmt: skip
        assert torch.equal(result.x, expected.x)
        assert torch.equal(result.weight, expected.weight)


@every_backend
def test_a_row_does_not_depend_on_its_batch(backend: Backend) -> None:
    x = torch.randn(3, 150, 40).bfloat16()
    window = torch.randint(-2, 3, (3, 150), dtype=torch.int32)
    weight = torch.rand(3, 150)
    together = backend.merge_pairs(x, window, merge=0.4, weight=weight)
    for row in range(3):
        part = slice(row, row + 1)
        alone = backend.merge_pairs(x[part], window[part], merge=0.4, weight=weight[part])
        assert torch.equal(alone.x, together.x[part])
        assert torch.equal(alone.target, together.target[part])


@every_dtype
def test_backends_agree_to_the_bit(dtype: torch.dtype) -> None:
    """For the same choices: these have none within rounding of each other."""
    x = torch.randn(2, 180, 64).to(dtype)
    for windows in (2, 5):
        window = torch.randint(-1, windows, (2, 180), dtype=torch.int32)
        cpu, emulated = (
            b.merge_pairs(x, window, merge=0.4, weight=torch.rand(2, 180).fill_(0.3)) for b in NATIVE
        )
        assert torch.equal(cpu.target, emulated.target)
        assert torch.equal(cpu.x, emulated.x)


def test_error_is_that_of_the_same_precision() -> None:
    """Against float64, at most twice the error of a plain fp32 composition, and a rounding to dtype."""
    for dtype, rounding in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        x, weight = torch.randn(1, 300, 48).to(dtype), torch.rand(1, 300)
        window = torch.randint(0, 4, (1, 300), dtype=torch.int32)
        truth = REFERENCE.merge_pairs(x.double(), window, merge=0.4, weight=weight)
        plain = exact(truth, x.float(), weight)[0].double()
        allowed = 2 * (plain - truth.x).abs().max() + rounding * truth.x.abs().max() + 1e-9
        for backend in NATIVE:
            result = backend.merge_pairs(x, window, merge=0.4, weight=weight)
            assert torch.equal(result.target, truth.target)
            assert (result.x.double() - truth.x).abs().max() <= allowed


def test_result_does_not_depend_on_threads() -> None:
    x = torch.randn(2, 900, 200).bfloat16()
    threads = torch.get_num_threads()
    for windows in (1, 20):
        window = torch.randint(0, windows, (2, 900), dtype=torch.int32)
        results = []
        try:
            for number in (1, 2, 3, 5):
                torch.set_num_threads(number)
                results.append(ops.merge_pairs(x, window, merge=0.3))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert torch.equal(result.x, results[0].x)
            assert torch.equal(result.target, results[0].target)


LEVEL_PROGRAM = """
import torch
from tests.ops import test_merge_pairs as t
from tests.ops.backends import CPU
torch.manual_seed(0)
for dtype in t.DTYPES:
    for tokens, width in ((50, 33), (130, 600)):
        t.check(CPU, torch.randn(1, tokens, width).to(dtype), torch.randint(0, 2, (1, tokens), dtype=torch.int32))
"""


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_cpu_levels(level: str) -> None:
    environment = {
        **os.environ,
        "LIGHTVLM_CPU_LEVEL": level,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", LEVEL_PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_who_takes_which_window() -> None:
    """Small windows of aligned 16-bit rows have a kernel of their own; the similarity tiles take the rest."""
    load_emulation()
    control = Control(emulation_library())

    def kernels(x: torch.Tensor) -> tuple[int, ...]:
        names = ("merge_window", "merge_similarity_tensor", "merge_similarity")
        before = [control.launch_count(name) for name in names]
        check(EMULATED, x, torch.zeros(x.shape[:2], dtype=torch.int32))
        return tuple(control.launch_count(n) - b for n, b in zip(names, before, strict=True))

    for dtype in (torch.float16, torch.bfloat16):
        assert kernels(torch.randn(1, 33, 24).to(dtype)) == (1, 0, 0)
        assert kernels(torch.randn(1, 70, 24).to(dtype)) == (1, 1, 0)
        assert kernels(torch.randn(1, 70, 23).to(dtype)) == (0, 0, 1)
        assert kernels(torch.randn(1, 70, 25).to(dtype)[..., 1:]) == (0, 0, 1)
    assert kernels(torch.randn(1, 33, 24)) == (0, 0, 1)
