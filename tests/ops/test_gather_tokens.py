"""gather_tokens: every tier against indexing by hand; alignment, strides, dtypes, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightvlm_ext
from lightvlm_ext import ops
from lightvlm_ext.ops.gather_tokens import MAX_TENSORS
from tests.ops.backends import BACKENDS, CPU, EMULATED, NATIVE, REFERENCE, Backend, load_emulation

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex128,
]


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)


def random_index(rows: int, tokens: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending indices with -1 past random counts."""
    index = torch.full((rows, slots), -1, dtype=torch.int32)
    count = torch.randint(0, min(slots, tokens) + 1, (rows,), dtype=torch.int32)
    for row, kept in enumerate(count.tolist()):
        index[row, :kept] = torch.randperm(tokens)[:kept].sort().values.int()
    return index, count


def by_hand(x: torch.Tensor, index: torch.Tensor, count: torch.Tensor, align: str = "left") -> torch.Tensor:
    slots = index.shape[1]
    out = torch.zeros(x.shape[0], slots, *x.shape[2:], dtype=x.dtype)
    for row in range(x.shape[0]):
        kept = int(count[row])
        for j in range(kept):
            out[row, j + (slots - kept if align == "right" else 0)] = x[row, int(index[row, j])]
    return out


def assert_same(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, in a fresh contiguous tensor."""
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert result.is_contiguous()
    assert torch.equal(result, expected)


@every_backend
@given(
    rows=st.integers(0, 3),
    tokens=st.sampled_from([0, 1, 2, 31, 33, 70]),
    slots=st.sampled_from([0, 1, 5, 33, 80]),
    trailing=st.sampled_from([(), (1,), (3,), (33,), (64,), (3, 5), (2, 3, 4), (0,), (3, 0)]),
    dtype=st.sampled_from(DTYPES),
    align=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 1000),
)
def test_matches_indexing_by_hand(
    backend: Backend,
    rows: int,
    tokens: int,
    slots: int,
    trailing: tuple[int, ...],
    dtype: torch.dtype,
    align: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = random((rows, tokens, *trailing), dtype)
    index, count = random_index(rows, tokens, slots)
    assert_same(backend.gather_tokens(x, index, count, align=align), by_hand(x, index, count, align))


def layouts(rows: int, tokens: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Views as models hand them out."""
    wide = random((rows, tokens, 50), dtype)
    return {
        "mrope": random((3, rows, tokens, 16), dtype).permute(1, 2, 0, 3),
        "shared_row": random((1, tokens, 24), dtype).expand(rows, tokens, 24),
        "shared_axis": random((rows, tokens, 8), dtype)[:, :, None].expand(rows, tokens, 3, 8),
        "heads": random((rows, 4, tokens, 16), dtype).transpose(1, 2),
        "slice": wide[..., 1:34],
        "every_other_token": random((rows, 2 * tokens, 7), dtype)[:, ::2],
        "reversed_axes": random((5, 4, 3, tokens, rows), dtype).permute(4, 3, 2, 1, 0),
        "one_column": wide[..., 3],
        "strided_last": wide[..., ::2],
        "position_ids": random((3, rows, tokens), dtype)[..., None].permute(1, 2, 0, 3),
        "six_strided": random((2, 2, 2, 2, 2, 3, rows, tokens), dtype).permute(6, 7, 5, 4, 3, 2, 1, 0),
    }


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("align", ["left", "right"])
def test_strided_views(backend: Backend, dtype: torch.dtype, align: str) -> None:
    rows, tokens, slots = 2, 37, 20
    index, count = random_index(rows, tokens, slots)
    for name, x in layouts(rows, tokens, dtype).items():
        result = backend.gather_tokens(x, index, count, align=align)
        assert torch.equal(result, by_hand(x, index, count, align)), name
        assert result.is_contiguous(), name


@native_backend
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_any_alignment(backend: Backend, offset: int) -> None:
    # Bytes, so that the source begins at every distance from a 16-byte boundary.
    x = random((2, 9, 80), torch.uint8)[:, :, offset : offset + 48]
    index, count = random_index(2, 9, 9)
    assert_same(backend.gather_tokens(x, index, count), by_hand(x, index, count))


@every_backend
@pytest.mark.parametrize("align", ["left", "right"])
def test_a_list_is_moved_together(backend: Backend, align: str) -> None:
    rows, tokens, slots = 3, 50, 31
    index, count = random_index(rows, tokens, slots)
    x = [
        random((rows, tokens, 300)),
        random((3, rows, tokens, 16), torch.bfloat16).permute(1, 2, 0, 3),
        random((rows, tokens), torch.int32),
        random((rows, tokens, 1), torch.int64),
        random((rows, tokens, 2), torch.bool),
        random((rows, tokens, 0)),
    ]
    result = backend.gather_tokens(x, index, count, align=align)
    assert isinstance(result, list)
    for moved, one in zip(result, x, strict=True):
        assert_same(moved, by_hand(one, index, count, align))
    assert backend.gather_tokens([], index, count) == []
    (alone,) = backend.gather_tokens((x[0],), index, count, align=align)
    assert_same(alone, by_hand(x[0], index, count, align))


@native_backend
def test_a_long_list(backend: Backend) -> None:
    index, count = random_index(2, 6, 4)
    x = [random((2, 6, width)) for width in range(1, 2 * MAX_TENSORS + 3)]
    for moved, one in zip(backend.gather_tokens(x, index, count), x, strict=True):
        assert_same(moved, by_hand(one, index, count))


@every_backend
def test_right_alignment_in_words(backend: Backend) -> None:
    x = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    index = torch.tensor([[0, 2, 3], [1, -1, -1]], dtype=torch.int32)
    count = torch.tensor([3, 1], dtype=torch.int32)
    assert backend.gather_tokens(x, index, count).tolist() == [[10, 12, 13], [21, 0, 0]]
    assert backend.gather_tokens(x, index, count, align="right").tolist() == [[10, 12, 13], [0, 0, 21]]


@every_backend
def test_any_strides_of_index_and_count(backend: Backend) -> None:
    x = random((4, 30, 5))
    index, count = random_index(4, 30, 12)
    expected = by_hand(x, index, count)
    assert_same(backend.gather_tokens(x, index.T.contiguous().T, count), expected)
    assert_same(backend.gather_tokens(x, torch.stack([index, index], 1)[:, 1], count), expected)
    assert_same(backend.gather_tokens(x, index, torch.stack([count, count], 1)[:, 1]), expected)
    shared = index[:1].expand(4, 12)
    counts = count[:1].expand(4)
    assert_same(backend.gather_tokens(x, shared, counts), by_hand(x, shared, counts))


@every_backend
def test_what_lies_past_count_is_not_read(backend: Backend) -> None:
    x = random((1, 5, 3))
    index = torch.tensor([[0, 4, -7, 99, 2]], dtype=torch.int32)
    count = torch.tensor([2], dtype=torch.int32)
    lightvlm_ext.device_errors()
    assert_same(backend.gather_tokens(x, index, count), by_hand(x, index, count))
    assert lightvlm_ext.device_errors() == []


@every_backend
def test_follows_select(backend: Backend) -> None:
    scores, x = torch.rand(3, 100), random((3, 100, 8))
    selection = backend.select(scores, keep=torch.tensor([5, 0, 100], dtype=torch.int32))
    expected = by_hand(x, selection.index, selection.count)
    assert_same(backend.gather_tokens(x, selection.index, selection.count), expected)


@every_backend
def test_infinities_and_nan_are_moved_and_stay_where_they_are(backend: Backend) -> None:
    x = torch.full((2, 3, 4), float("nan"))
    x[0, 1] = float("inf")
    x[1] = 1.0
    index = torch.tensor([[1, 2], [0, -1]], dtype=torch.int32)
    count = torch.tensor([2, 1], dtype=torch.int32)
    result = backend.gather_tokens(x, index, count)
    assert (result[0, 0] == float("inf")).all()
    assert result[0, 1].isnan().all()
    assert result[1].tolist() == [[1.0] * 4, [0.0] * 4]


def test_result_does_not_depend_on_threads() -> None:
    x = random((4, 500, 257))
    index, count = random_index(4, 500, 400)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.gather_tokens(x, index, count)
        torch.set_num_threads(3)
        assert_same(ops.gather_tokens(x, index, count), expected)
    finally:
        torch.set_num_threads(threads)


X = torch.randn(2, 6, 4)
INDEX = torch.tensor([[0, 3], [1, -1]], dtype=torch.int32)
COUNT = torch.tensor([2, 1], dtype=torch.int32)
BAD_ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((3, INDEX, COUNT), {}, TypeError, "x: got int"),
    (("x", INDEX, COUNT), {}, TypeError, "x: got str"),
    (([X, 3], INDEX, COUNT), {}, TypeError, r"x\[1\]: got int"),
    ((X, [[0]], COUNT), {}, TypeError, "index: got list"),
    ((X, INDEX, 2), {}, TypeError, "count: got int"),
    ((X, INDEX.long(), COUNT), {}, TypeError, "index: has dtype int64, must be int32"),
    ((X, INDEX, COUNT.long()), {}, TypeError, "count: has dtype int64, must be int32"),
    ((X, INDEX[0], COUNT), {}, ValueError, r"index: has shape \(2,\), must be \(R, M\)"),
    ((X, INDEX, COUNT[:1]), {}, ValueError, r"count: has shape \(1,\), must be \(2,\)"),
    ((X[0, 0], INDEX, COUNT), {}, ValueError, r"x: has shape \(4,\), must be \(2, N, \.\.\.\)"),
    ((X[:1], INDEX, COUNT), {}, ValueError, r"x: has shape \(1, 6, 4\), must be \(2, N, \.\.\.\)"),
    (
        ([X, X[:, :5]], INDEX, COUNT),
        {},
        ValueError,
        r"x\[1\]: has shape \(2, 5, 4\), must be \(2, 6, \.\.\.\)",
    ),
    ((X, INDEX, COUNT), {"align": "centre"}, ValueError, "align: got 'centre', must be 'left' or 'right'"),
    ((X.to("meta"), INDEX, COUNT), {}, ValueError, "x: is on meta, must be on cpu as index"),
]


@every_backend
@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    backend: Backend, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        backend.gather_tokens(*args, **kwargs)


BAD_VALUES = [
    ([[0, 6], [1, -1]], [2, 1], "index"),
    ([[0, 1], [-1, 2]], [2, 2], "index"),
    ([[0, 1], [2, 2]], [2, 2], "index.*ascending"),
    ([[3, 1], [2, 3]], [2, 2], "index.*ascending"),
    ([[0, 1], [2, 3]], [2, 3], "count"),
    ([[0, 1], [2, 3]], [-1, 2], "count"),
]


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)
@pytest.mark.parametrize(("index", "count", "message"), BAD_VALUES)
def test_bad_values_raise_on_the_cpu(
    backend: Backend, index: list[list[int]], count: list[int], message: str
) -> None:
    arguments = (torch.tensor(index, dtype=torch.int32), torch.tensor(count, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        backend.gather_tokens(X, *arguments)


def test_bad_values_set_the_device_word(monkeypatch: pytest.MonkeyPatch) -> None:
    lightvlm_ext.device_errors()
    x = torch.arange(1, 7).repeat(4, 1)
    index = torch.tensor([[0, 9, 2], [3, 1, 2], [0, 1, 2], [1, 2, 3]], dtype=torch.int32)
    count = torch.tensor([3, 3, 4, 2], dtype=torch.int32)
    # A bad entry leaves a zero in its slot, a bad count a row of zeros.
    expected = [[1, 0, 3], [4, 0, 3], [0, 0, 0], [2, 3, 0]]
    assert EMULATED.gather_tokens(x, index, count).tolist() == expected
    found = lightvlm_ext.device_errors()
    assert len(found) == 3
    assert all("gather_tokens" in message for message in found)
    monkeypatch.setenv("LIGHTVLM_CHECK", "1")
    with pytest.raises(ValueError, match="gather_tokens: count"):
        EMULATED.gather_tokens(x[:1], index[:1, :2], count[:1])


def test_too_many_strided_dimensions_are_refused() -> None:
    x = random((2,) * 7 + (1, 3)).permute(7, 8, 6, 5, 4, 3, 2, 1, 0)
    index, count = random_index(1, 3, 2)
    with pytest.raises(ValueError, match="pass a contiguous tensor"):
        ops.gather_tokens(x, index, count)
    assert_same(ops.gather_tokens(x.contiguous(), index, count), by_hand(x, index, count))


def test_raw_calls_are_checked() -> None:
    load_emulation()
    out = torch.empty(2, 2, 4)
    ops.gather_tokens(X, INDEX, COUNT)  # loads the library
    for namespace in ("lightvlm", "lightvlm_emulated"):
        op = getattr(torch.ops, namespace).gather_tokens.default
        for bad in (
            ([X], INDEX, COUNT, False, [out[:, :1]], None),
            ([X], INDEX, COUNT, False, [out.half()], None),
            ([X], INDEX, COUNT, False, [], None),
            ([], INDEX, COUNT, False, [], None),
            ([X[:1]], INDEX, COUNT, False, [out[:1]], None),
            ([X], INDEX.long(), COUNT, False, [out], None),
            ([X], INDEX, COUNT[:1], False, [out], None),
            ([X, X[:, :3]], INDEX, COUNT, False, [out, out.clone()], None),
            ([X] * 17, INDEX, COUNT, False, [torch.empty_like(out) for _ in range(17)], None),
        ):
            with pytest.raises((ValueError, RuntimeError)):
                op(*bad)


def test_opcheck() -> None:
    ops.gather_tokens(X, INDEX, COUNT)
    mrope = random((3, 2, 6, 8)).permute(1, 2, 0, 3)
    for x in ([X], [X, mrope, random((2, 6), torch.int64)]):
        out = [torch.empty(2, 2, *one.shape[2:], dtype=one.dtype) for one in x]
        torch.library.opcheck(torch.ops.lightvlm.gather_tokens.default, (x, INDEX, COUNT, True, out, None))


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x = [mode.from_tensor(X), mode.from_tensor(random((2, 6, 3), torch.bool))]
        moved = ops.gather_tokens(x, mode.from_tensor(INDEX), mode.from_tensor(COUNT), align="right")
    assert [tuple(one.shape) for one in moved] == [(2, 2, 4), (2, 2, 3)]
    assert [one.dtype for one in moved] == [torch.float32, torch.bool]
