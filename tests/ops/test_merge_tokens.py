"""merge_tokens: choices against float64 cosines, sums bit by bit, groups, special values, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightvlm_ext
from lightvlm_ext import _library, ops
from lightvlm_ext.ops import Selection
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

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def selection_of(kept: list[list[int]], tokens: int, slots: int | None = None) -> Selection:
    """The Selection that keeps these tokens; entries past count are poison."""
    slots = max((len(row) for row in kept), default=0) if slots is None else slots
    index = torch.full((len(kept), slots), 2**31 - 1, dtype=torch.int32)
    inverse = torch.full((len(kept), tokens), -1, dtype=torch.int32)
    for r, row in enumerate(kept):
        index[r, : len(row)] = torch.tensor(row, dtype=torch.int32)
        inverse[r, row] = torch.arange(len(row), dtype=torch.int32)
    return Selection(index, torch.tensor([len(row) for row in kept], dtype=torch.int32), inverse)


def random_case(
    rows: int, tokens: int, width: int, keep: int, dtype: torch.dtype = torch.float32, groups: int = 1
) -> tuple[torch.Tensor, Selection, torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, tokens, width).to(dtype)
    selection = ops.select(torch.rand(rows, tokens), keep=keep)
    group = torch.randint(0, groups, (rows, tokens), dtype=torch.int32)
    return x, selection, torch.rand(rows, tokens), group


def unit_vectors(metric: torch.Tensor) -> torch.Tensor:
    vectors = torch.where(metric.isfinite().all(dim=-1, keepdim=True), metric.double(), 0)
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, vectors / length, 0)


def check_target(
    target: torch.Tensor, metric: torch.Tensor, selection: Selection, group: torch.Tensor
) -> None:
    """Each choice is a token of the same group, and no other is closer than fp32 sums can tell."""
    assert target.dtype == torch.int32
    bound = 4 * (metric.shape[-1] + 4) * 2.0**-24
    for row in range(metric.shape[0]):
        kept = selection.index[row, : selection.count[row]].long()
        assert target[row, kept].tolist() == list(range(len(kept)))
        cosine = (unit := unit_vectors(metric[row])) @ unit[kept].T
        allowed = (group[row][:, None] == group[row, kept]) & (group[row] >= 0)[:, None]
        for token in set(range(metric.shape[1])) - set(kept.tolist()):
            entry = int(target[row, token])
            if not allowed[token].any():
                assert entry == -1
                continue
            assert entry >= 0
            assert allowed[token, entry]
            best = cosine[token].masked_fill(~allowed[token], -INF).max()
            assert cosine[token, entry] >= best - bound


def exact_rows(
    x: torch.Tensor, selection: Selection, weight: torch.Tensor, target: torch.Tensor, *, right: bool = False
) -> torch.Tensor:
    """What the op returns for these choices: every product and sum rounded to fp32, tokens in order."""
    rows, slots = selection.index.shape
    out = torch.zeros(rows, slots, x.shape[2], dtype=x.dtype)
    for row in range(rows):
        count = int(selection.count[row])
        for entry in range(count):
            center = int(selection.index[row, entry])
            arrives = [
                t for t in (target[row] == entry).nonzero().flatten().tolist()
                if t != center and weight[row, t] > 0
            ]  # fmt: skip
            slot = slots - count + entry if right else entry
            out[row, slot] = x[row, center]
            if not arrives:
                continue
            total, value = torch.zeros(()), torch.zeros(x.shape[2])
            for t in ([center] if weight[row, center] > 0 else []) + arrives:
                value = value + weight[row, t] * x[row, t].float()
                total = total + weight[row, t]
            out[row, slot] = (value / total).to(x.dtype)
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, a NaN to a NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and bool(
        ((a == b) | a.isnan()).all()
    )  # fmt: skip


def check(
    backend: Backend,
    x: torch.Tensor,
    selection: Selection,
    weight: torch.Tensor,
    group: torch.Tensor,
    metric: torch.Tensor | None = None,
    align: str = "left",
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = {"metric": metric, "align": align}
    out, target = backend.merge_tokens(x, selection, weight, group, return_target=True, **arguments)
    alone = backend.merge_tokens(x, selection, weight, group, **arguments)
    assert same_bits(alone, out)
    check_target(target, x if metric is None else metric, selection, group)
    expected = exact_rows(x, selection, weight, target, right=align == "right")
    if backend is REFERENCE:
        precision = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype]
        assert torch.allclose(out, expected, rtol=precision, atol=precision, equal_nan=True)
    else:
        assert same_bits(out, expected)
    return out, target


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    rows, tokens = draw(st.integers(1, 3)), draw(st.sampled_from([0, 1, 2, 3, 9, 20, 40]))
    seed = draw(st.integers(0, 2**31))
    return {
        "rows": rows,
        "tokens": tokens,
        "width": draw(st.sampled_from([0, 1, 3, 8, 16])),
        "metric_width": draw(st.sampled_from([None, 0, 1, 2, 8, 24])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "metric_dtype": draw(st.sampled_from(DTYPES)),
        "kept": draw(st.sampled_from([0.0, 0.1, 0.35, 0.8, 1.0])),
        "groups": draw(st.integers(1, 4)),
        "whole": draw(st.booleans()),
        "zero_weights": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "align": draw(st.sampled_from(["left", "right"])),
        "seed": seed,
    }


@every_backend
@given(case=cases())
def test_choices_and_sums(backend: Backend, case: dict[str, object]) -> None:
    """Whole numbers make zero vectors, equal vectors and equal cosines."""
    torch.manual_seed(case["seed"])
    rows, tokens = case["rows"], case["tokens"]

    def values(width: int, dtype: torch.dtype) -> torch.Tensor:
        drawn = torch.randn(rows, tokens, width)
        return (drawn.round() if case["whole"] else drawn).to(dtype)

    x = values(case["width"], case["dtype"])
    metric = None if case["metric_width"] is None else values(case["metric_width"], case["metric_dtype"])
    kept = [(torch.rand(tokens) < case["kept"]).nonzero().flatten().tolist() for _ in range(rows)]
    selection = selection_of(kept, tokens, slots=max(map(len, kept)) + 2)
    weight = torch.rand(rows, tokens) * (torch.rand(rows, tokens) >= case["zero_weights"])
    group = torch.randint(-1, case["groups"], (rows, tokens), dtype=torch.int32)
    check(backend, x, selection, weight, group, metric, case["align"])


@native_backend
@every_dtype
@pytest.mark.parametrize("tokens", [63, 64, 65, 127, 129, 200])
@pytest.mark.parametrize("width", [31, 64, 65, 72, 136])
def test_odd_sizes(backend: Backend, dtype: torch.dtype, tokens: int, width: int) -> None:
    for keep in (1, tokens // 2, tokens - 1, tokens):
        check(backend, *random_case(1, tokens, width, keep, dtype))


@every_dtype
def test_more_than_a_block(dtype: torch.dtype) -> None:
    """More kept tokens, dropped tokens and columns than the CPU twin takes at a time."""
    x, selection, weight, group = random_case(1, 1100, 1100, 460, dtype)
    check(CPU, x, selection, weight, group)
    x, selection, weight, group = random_case(2, 700, 40, 33, dtype, groups=3)
    check(CPU, x, selection, weight, group)


@native_backend
@every_dtype
def test_one_kept_token_takes_all(backend: Backend, dtype: torch.dtype) -> None:
    """More arrivals than a block lists at a time, and their order."""
    tokens = 900
    x = torch.randn(1, tokens, 20).to(dtype)
    selection = selection_of([[450]], tokens)
    weight = torch.rand(1, tokens) + 0.1
    group = torch.zeros(1, tokens, dtype=torch.int32)
    out, target = check(backend, x, selection, weight, group)
    assert target.tolist() == [[0] * tokens]
    assert torch.allclose(out[0, 0].double(), (weight[0] @ x[0].float() / weight.sum()).double(), atol=1e-2)


@every_backend
def test_equal_vectors_go_to_the_lower_one(backend: Backend) -> None:
    """Twins of a kept token, at every distance from it: same block, another tile, another block."""
    tokens, width = 500, 24
    base = torch.randn(1, 1, width)
    for dtype in DTYPES:
        for factor in (1.0, 2.0, 0.25):
            x = base.repeat(1, tokens, 1)
            x[:, 1::2] *= factor
            x = x.to(dtype)
            kept = [[3, 4, 40, 77, 130, 131, 200, 333, 450, *range(460, 490)]]
            group = torch.zeros(1, tokens, dtype=torch.int32)
            _, target = backend.merge_tokens(
                x, selection_of(kept, tokens), torch.ones(1, tokens), group, return_target=True
            )
            dropped = [t for t in range(tokens) if t not in kept[0]]
            assert set(target[0, dropped].tolist()) == {0}
    # A single different one in front does not attract them.
    x[0, 3] = -x[0, 3]
    _, target = backend.merge_tokens(
        x, selection_of(kept, tokens), torch.ones(1, tokens), group, return_target=True
    )
    assert set(target[0, dropped].tolist()) == {1}


@every_backend
def test_zero_vectors(backend: Backend) -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [-2.0, 0.0], [3.0, 0.0]]])
    group = torch.zeros(1, 6, dtype=torch.int32)
    weight = torch.ones(1, 6)
    # Kept: a zero vector and one to the left. A dropped zero vector has cosine 0 to both; what points to
    # the right is closer to the zero vector, what points to the left to the other.
    _, target = backend.merge_tokens(x, selection_of([[1, 2]], 6), weight, group, return_target=True)
    assert target.tolist() == [[0, 0, 1, 0, 1, 0]]
    # -0.0 equals 0.0: the lower one.
    x[0, 1] = -x[0, 1]
    _, target = backend.merge_tokens(x, selection_of([[1, 3]], 6), weight, group, return_target=True)
    assert target.tolist() == [[0, 0, 0, 1, 0, 0]]


@every_backend
def test_groups(backend: Backend) -> None:
    x = torch.eye(8)[None] + 1
    group = torch.tensor([[7, 7, -1, -1, 2**31 - 1, 2**31 - 1, 0, -9]], dtype=torch.int32)
    selection = selection_of([[0, 3, 4]], 8)
    out, target = check(backend, x, selection, torch.ones(1, 8), group)
    # 2 and 7 have no group, and group 0 keeps nothing: they vanish. 3 is kept as it is.
    assert target.tolist() == [[0, 0, -1, 1, 2, 2, -1, -1]]
    assert torch.equal(out[0], torch.stack([(x[0, 0] + x[0, 1]) / 2, x[0, 3], (x[0, 4] + x[0, 5]) / 2]))


@every_backend
def test_weights(backend: Backend) -> None:
    x = torch.tensor([[[1.0], [3.0], [7.0], [11.0]]])
    group = torch.zeros(1, 4, dtype=torch.int32)
    selection = selection_of([[0, 2]], 4)

    def merged(weight: list[float], metric: torch.Tensor) -> list[float]:
        return (
            backend.merge_tokens(
                x, selection, torch.tensor([weight], dtype=torch.float32), group, metric=metric
            )
            .flatten()
            .tolist()
        )

    left = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]])
    assert merged([1, 1, 1, 3], left) == [2.0, 10.0]
    assert merged([0, 0, 0, 0], left) == [1.0, 7.0]  # the weights sum to 0
    assert merged([1, 0, 0, 5], left) == [1.0, 11.0]  # nothing of weight arrives; the kept one weighs nothing
    assert merged([2e-45, 2e-45, 3e38, 3e38], left) == [2.0, 9.0]
    huge = torch.full((1, 4, 8), 3e38)
    huge[0, 1::2] *= -1
    out = backend.merge_tokens(huge, selection, torch.full((1, 4), 3e38), group, metric=left)
    assert out.isfinite().all()
    assert out.abs().max() < 1e32


def test_flushing_subnormals_changes_nothing() -> None:
    """torch.set_flush_denormal acts on the calling thread alone: what is subnormal is told by its bits."""
    x, selection, _, group = random_case(1, 4000, 3, 900)
    weight = torch.full((1, 4000), 1e-42)
    expected = ops.merge_tokens(x, selection, weight, group)
    assert expected.isfinite().all()
    try:
        assert torch.set_flush_denormal(True)
        result = ops.merge_tokens(x, selection, weight, group)
        with pytest.raises(ValueError, match="weight"):
            ops.merge_tokens(x, selection, -weight, group)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(result, expected)


@every_backend
@every_dtype
def test_nothing_arrives_keeps_the_bits(backend: Backend, dtype: torch.dtype) -> None:
    """Also NaN payloads, infinities, subnormals and the sign of zero."""
    bits = torch.tensor([[0, 1, 2], [0x7FC1, 0x7F81, 0x7C01], [0x8000, 0x0001, 0x7F80]], dtype=torch.int32)
    if dtype == torch.float32:
        x = (bits << 16 | 0x1234).view(torch.float32)[None]
    else:
        x = bits.to(torch.int16).view(dtype)[None]
    selection = selection_of([[0, 1, 2]], 3, slots=5)
    for align, first in (("left", 0), ("right", 2)):
        out = backend.merge_tokens(
            x, selection, torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.int32), align=align
        )
        integer = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(out[:, first : first + 3].view(integer), x.view(integer))
        assert not out.view(integer)[:, [3, 4] if align == "left" else [0, 1]].any()


@every_backend
@every_dtype
def test_nan_and_infinity_stay_where_they_are(backend: Backend, dtype: torch.dtype) -> None:
    """They have cosine 0 to all, and are merged into a token of their own row and group only."""
    tokens = 80
    clean = torch.randn(3, tokens, 16).to(dtype)
    group = (torch.arange(tokens) // 40).int().repeat(3, 1)
    selection = selection_of([list(range(0, tokens, 4))] * 3, tokens)
    weight = torch.rand(3, tokens) + 0.1
    expected, expected_target = backend.merge_tokens(clean, selection, weight, group, return_target=True)
    for bad in (NAN, INF, -INF):
        x = clean.clone()
        x[1, 41] = bad  # dropped
        x[1, 43, 5] = bad
        x[1, 48, 3] = bad  # kept, entry 12
        out, target = backend.merge_tokens(x, selection, weight, group, return_target=True)
        check_target(target, x, selection, group)
        assert torch.equal(out[[0, 2]], expected[[0, 2]])
        assert torch.equal(out[1, :10], expected[1, :10])
        assert target[1, [41, 43]].tolist() == [10, 10]
        touched = {10, 12}
        for entry in range(10, 20):
            if entry not in touched and torch.equal(target[1] == entry, expected_target[1] == entry):
                assert torch.equal(out[1, entry], expected[1, entry])
        assert not out[1, 10].isfinite().all()


@every_backend
def test_the_scale_of_the_metric_does_not_matter(backend: Backend) -> None:
    """Squares of these vectors over- or underflow in fp32."""
    for dtype in (torch.float32, torch.bfloat16):
        x, selection, weight, group = random_case(1, 90, 40, 30, torch.bfloat16)
        x = x.to(dtype)
        _, expected = backend.merge_tokens(x, selection, weight, group, return_target=True)
        for exponent in (-100, -70, 70, 100):
            metric = x * 2.0**exponent
            _, target = backend.merge_tokens(x, selection, weight, group, metric=metric, return_target=True)
            assert torch.equal(target, expected)
        metric = x * 2.0 ** torch.randint(-100, 101, (1, 90, 1)).float()
        _, target = backend.merge_tokens(
            x, selection, weight, group, metric=metric.to(dtype), return_target=True
        )
        assert torch.equal(target, expected)


@every_backend
def test_empty_sizes(backend: Backend) -> None:
    def run(rows: int, tokens: int, width: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        selection = selection_of([[]] * rows, tokens, slots=slots)
        group = torch.zeros(rows, tokens, dtype=torch.int32)
        return backend.merge_tokens(
            torch.randn(rows, tokens, width), selection, torch.ones(rows, tokens), group, return_target=True
        )

    for rows, tokens, width, slots in ((0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0), (2, 5, 4, 3)):
        out, target = run(rows, tokens, width, slots)
        assert out.shape == (rows, slots, width)
        assert not out.any()
        assert target.tolist() == [[-1] * tokens] * rows


@every_backend
def test_any_strides(backend: Backend) -> None:
    x, selection, weight, group = random_case(2, 50, 24, 20, torch.float16, groups=2)
    metric = torch.randn(2, 50, 16)
    expected = backend.merge_tokens(x, selection, weight, group, metric=metric)

    def wide(t: torch.Tensor) -> torch.Tensor:
        padded = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), 77, dtype=t.dtype)
        padded[..., 1 : 1 + t.shape[-1]] = t
        return padded[..., 1 : 1 + t.shape[-1]]

    def reversed_(t: torch.Tensor) -> torch.Tensor:
        return t.permute(*range(t.dim() - 1, -1, -1)).contiguous().permute(*range(t.dim() - 1, -1, -1))

    for layout in (wide, reversed_):
        out = backend.merge_tokens(
            layout(x),
            Selection(*map(layout, selection)),
            layout(weight),
            layout(group),
            metric=layout(metric),
        )
        assert torch.equal(out, expected)
    one = x[:1].expand(2, -1, -1)
    assert torch.equal(
        backend.merge_tokens(one, selection, weight, group),
        backend.merge_tokens(one.contiguous(), selection, weight, group),
    )


@every_backend
def test_a_row_does_not_depend_on_its_batch(backend: Backend) -> None:
    x, selection, weight, group = random_case(4, 150, 40, 50, torch.bfloat16, groups=3)
    together = backend.merge_tokens(x, selection, weight, group)
    for row in range(4):
        part = slice(row, row + 1)
        alone = backend.merge_tokens(
            x[part], Selection(*(t[part] for t in selection)), weight[part], group[part]
        )
        assert torch.equal(alone, together[part])


@every_dtype
def test_backends_agree_to_the_bit(dtype: torch.dtype) -> None:
    """For the same choices: these have none within rounding of each other."""
    x, selection, weight, group = random_case(2, 180, 64, 60, dtype, groups=2)
    for align in ("left", "right"):
        cpu = CPU.merge_tokens(x, selection, weight, group, align=align, return_target=True)
        emulated = EMULATED.merge_tokens(x, selection, weight, group, align=align, return_target=True)
        assert torch.equal(cpu[1], emulated[1])
        assert torch.equal(cpu[0], emulated[0])


def test_error_is_that_of_the_same_precision() -> None:
    """Against float64, at most twice the error of a plain fp32 composition, and a rounding to dtype."""
    for dtype, rounding in ((torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        x, selection, weight, group = random_case(1, 300, 48, 40, dtype)
        exact, target = REFERENCE.merge_tokens(x.double(), selection, weight, group, return_target=True)
        plain = exact_rows(x.float(), selection, weight, target)
        allowed = 2 * (plain.double() - exact).abs().max() + rounding * exact.abs().max() + 1e-9
        for backend in NATIVE:
            out, same = backend.merge_tokens(x, selection, weight, group, return_target=True)
            assert torch.equal(same, target)
            assert (out.double() - exact).abs().max() <= allowed


def test_result_does_not_depend_on_threads() -> None:
    x, selection, weight, group = random_case(2, 900, 200, 300, torch.bfloat16, groups=2)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            results.append(ops.merge_tokens(x, selection, weight, group))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_tensor_cores_take_what_is_aligned() -> None:
    load_emulation()
    control = Control(emulation_library())

    def kernels(metric: torch.Tensor) -> tuple[int, int]:
        names = ("merge_similarity_tensor", "merge_similarity")
        before = [control.launch_count(name) for name in names]
        tokens = metric.shape[1]
        check(
            EMULATED,
            torch.randn(1, tokens, 4),
            ops.select(torch.rand(1, tokens), keep=tokens // 3),
            torch.rand(1, tokens),
            torch.zeros(1, tokens, dtype=torch.int32),
            metric,
        )
        return tuple(control.launch_count(n) - b for n, b in zip(names, before, strict=True))

    for dtype in (torch.float16, torch.bfloat16):
        assert kernels(torch.randn(1, 70, 24).to(dtype)) == (2, 0)
        assert kernels(torch.randn(1, 70, 23).to(dtype)) == (0, 2)
        assert kernels(torch.randn(1, 70, 25).to(dtype)[..., 1:]) == (0, 2)
    assert kernels(torch.randn(1, 70, 24)) == (0, 2)


X = torch.randn(2, 6, 4)
SELECTION = selection_of([[1, 3], [0, 5]], 6)
W, G = torch.ones(2, 6), torch.zeros(2, 6, dtype=torch.int32)
INDEX, COUNT, INVERSE = SELECTION
BAD_ARGUMENTS = [
    ((None, SELECTION, W, G), {}, TypeError, "x: got NoneType"),
    ((X.int(), SELECTION, W, G), {}, TypeError, "x: has dtype int32, must be float32 or float16 or bfloat16"),
    ((X[0], SELECTION, W, G), {}, ValueError, r"x: has shape \(6, 4\), must be \(R, N, C\)"),
    ((X, INDEX, W, G), {}, TypeError, "selection: got Tensor"),
    ((X, Selection(INDEX.long(), COUNT, INVERSE), W, G), {}, TypeError, "selection.index: has dtype int64"),
    ((X, Selection(INDEX[:1], COUNT, INVERSE), W, G), {}, ValueError, r"selection.index: has shape \(1, 2\)"),
    ((X, Selection(INDEX, COUNT[:1], INVERSE), W, G), {}, ValueError, "selection.count: has shape"),
    ((X, Selection(INDEX, COUNT, INVERSE[:, :5]), W, G), {}, ValueError, "selection.inverse: has shape"),
    ((X, SELECTION, W.half(), G), {}, TypeError, "weight: has dtype float16"),
    ((X, SELECTION, W[:, :5], G), {}, ValueError, r"weight: has shape \(2, 5\), must be \(2, 6\)"),
    ((X, SELECTION, None, G), {}, TypeError, "weight: got NoneType"),
    ((X, SELECTION, W, G.long()), {}, TypeError, "group: has dtype int64, must be int32"),
    ((X, SELECTION, W, G[:1]), {}, ValueError, "group: has shape"),
    ((X, SELECTION, W, G), {"metric": X[:1]}, ValueError, r"metric: has shape .*, must be \(2, 6, Cm\)"),
    ((X, SELECTION, W, G), {"metric": X.int()}, TypeError, "metric: has dtype int32"),
    ((X, SELECTION, W, G), {"align": "middle"}, ValueError, "align: got 'middle'"),
]


@every_backend
@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    backend: Backend,
    arguments: tuple[object, ...],
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        backend.merge_tokens(*arguments, **options)


def changed(row: int, index: list[int] | None = None, count: int | None = None) -> Selection:
    new = Selection(*(t.clone() for t in SELECTION))
    if index is not None:
        new.index[row] = torch.tensor(index)
    if count is not None:
        new.count[row] = count
    return new


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)
def test_bad_values_raise_on_the_cpu(backend: Backend) -> None:
    for index, message in (
        ([3, 3], "index.*ascending"),
        ([3, 1], "index.*ascending"),
        ([-1, 2], "index.*outside"),
        ([2, 6], "index.*outside"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.merge_tokens(X, changed(1, index), W, G)
    for count in (-1, 3):
        with pytest.raises(ValueError, match="count"):
            backend.merge_tokens(X, changed(1, count=count), W, G)
    for bad in (-1e-30, NAN, INF, -INF):
        weight = W.clone()
        weight[1, 4] = bad
        with pytest.raises(ValueError, match=r"weight.*finite"):
            backend.merge_tokens(X, SELECTION, weight, G)


def test_bad_values_are_ignored_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    lightvlm_ext.device_errors()

    def errors() -> list[str]:
        return [error.split(": ")[2] for error in lightvlm_ext.device_errors()]

    good, good_target = EMULATED.merge_tokens(X, SELECTION, W, G, return_target=True)
    assert errors() == []
    # The slot of a bad index is zeros and its token is not kept; other rows do not notice.
    for index in ([3, 3], [3, 1], [3, -7], [3, 6]):
        out, target = EMULATED.merge_tokens(X, changed(1, index), W, G, return_target=True)
        assert target[1].tolist() == [0] * 6
        assert torch.equal(out[1, 0], exact_rows(X, selection_of([[], [3]], 6), W, target)[1, 0])
        assert not out[1, 1].any()
        assert torch.equal(out[0], good[0])
        assert errors() == ["index"]
    # All slots of a row with a bad count are zeros.
    for count in (-1, 3):
        out, target = EMULATED.merge_tokens(X, changed(0, count=count), W, G, return_target=True)
        assert not out[0].any()
        assert target[0].tolist() == [-1] * 6
        assert torch.equal(out[1], good[1])
        assert errors() == ["count"]
    # A bad weight is 0, of a kept token and of a dropped one.
    for token in (1, 0):
        zero = W.clone()
        zero[0, token] = 0
        expected = EMULATED.merge_tokens(X, SELECTION, zero, G)
        for bad in (-1.0, NAN, INF):
            weight = W.clone()
            weight[0, token] = bad
            out, target = EMULATED.merge_tokens(X, SELECTION, weight, G, return_target=True)
            assert torch.equal(out, expected)
            assert torch.equal(target, good_target)
            assert errors() == ["weight"]
    monkeypatch.setenv("LIGHTVLM_CHECK", "1")
    with pytest.raises(ValueError, match="weight"):
        EMULATED.merge_tokens(X, SELECTION, weight, G)
    assert lightvlm_ext.device_errors() == []


@native_backend
def test_raw_op_calls_are_checked(backend: Backend) -> None:
    if backend.is_device:
        load_emulation()
    else:
        _library.load()
    op = getattr(torch.ops, "lightvlm_emulated" if backend.is_device else "lightvlm").merge_tokens
    out, target = torch.empty(2, 2, 4), torch.empty(2, 6, dtype=torch.int32)
    workspace = torch.empty(100, dtype=torch.int64)
    good = (X, X, INDEX, COUNT, W, G, False, out, target, workspace, None)
    op(*good)
    bad = [
        (0, X[0]), (0, X.double()), (0, X.transpose(1, 2)), (1, X[:, :5]), (1, X.int()), (2, INDEX.long()),
        (2, INDEX[:1]), (3, COUNT[:1]), (4, W.double()), (4, W[:, :5]), (5, G.long()), (7, out[:, :1]), (7, out.half()),
        (7, out.transpose(0, 1)), (8, target[:, :5]), (8, target.long()),
    ]  # fmt: skip
    if backend.is_device:
        bad += [(9, None), (9, workspace[:10]), (9, workspace.int())]
    for position, value in bad:
        arguments = list(good)
        arguments[position] = value
        with pytest.raises((ValueError, RuntimeError)):
            op(*arguments)


def test_opcheck() -> None:
    _library.load()
    out, target = torch.empty(2, 2, 4), torch.empty(2, 6, dtype=torch.int32)
    for metric, where in ((torch.randn(2, 6, 3).half(), target), (torch.randn(2, 6, 4), None)):
        torch.library.opcheck(
            torch.ops.lightvlm.merge_tokens.default,
            (X, metric, INDEX, COUNT, W, G, False, out, where, None, None),
        )


def test_compiles_into_one_graph() -> None:
    def step(
        x: torch.Tensor, scores: torch.Tensor, weight: torch.Tensor, group: torch.Tensor
    ) -> torch.Tensor:
        return ops.merge_tokens(x, ops.select(scores, keep=2), weight, group, align="right") * 2

    scores = torch.rand(2, 6)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X, scores, W, G), step(X, scores, W, G))


def test_reference_takes_float64() -> None:
    x = torch.randn(1, 9, 5, dtype=torch.float64)
    selection = selection_of([[2, 7]], 9)
    weight = torch.rand(1, 9, dtype=torch.float64)
    out = REFERENCE.merge_tokens(x, selection, weight, torch.zeros(1, 9, dtype=torch.int32))
    assert out.dtype == torch.float64
