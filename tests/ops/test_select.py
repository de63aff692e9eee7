"""select: every tier against an oracle made of sorted() and Fraction; errors; shapes and strides."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightvlm_ext
from lightvlm_ext import ops
from lightvlm_ext.ops import Selection
from tests.ops.backends import BACKENDS, CPU, EMULATED, NATIVE, REFERENCE, Backend

INF, NAN = math.inf, math.nan
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)


def round_half_even(value: Fraction) -> int:
    return round(value)


def oracle_masses(scores: list[float]) -> list[int]:
    """round(s * 2**40 / max): the product is exact in float64, the division rounds once."""
    positive = [s if s > 0 else 0.0 for s in scores]
    highest = max(positive, default=0.0)
    if highest == 0:
        return [0] * len(scores)
    return [round_half_even(Fraction(s * 2.0**40 / highest)) for s in positive]


def oracle_row(
    scores: list[float],
    keep: list[int] | int | None,
    mass: float | None,
    forced: list[bool],
    candidates: list[bool],
    segment: list[int],
) -> list[int]:
    kept = {i for i, flag in enumerate(forced) if flag}
    for group in sorted({g for g in segment if g >= 0}):
        members = [i for i in range(len(scores)) if segment[i] == group and candidates[i] and not forced[i]]
        members.sort(key=lambda i: (-scores[i] if not math.isnan(scores[i]) else INF, i))
        if mass is None:
            budget = keep[group] if isinstance(keep, list) else keep
            kept.update(members[:budget])
            continue
        masses = dict(zip(members, oracle_masses([scores[i] for i in members]), strict=True))
        total = sum(masses.values())
        target = total if mass == 1 else min(math.ceil(mass * float(total)), total)
        reached = 0
        for i in members:
            kept.add(i)
            reached += masses[i]
            if reached >= target:
                break
    return sorted(kept)


def check_against_oracle(result: Selection, expected: list[list[int]], tokens: int) -> None:
    index, count, inverse = result
    assert index.dtype == count.dtype == inverse.dtype == torch.int32
    assert count.tolist() == [len(e) for e in expected]
    for row, kept in enumerate(expected):
        assert index[row].tolist() == kept + [-1] * (index.shape[1] - len(kept))
        slots = {token: slot for slot, token in enumerate(kept)}
        assert inverse[row].tolist() == [slots.get(i, -1) for i in range(tokens)]


def assert_same(result: Selection, expected: Selection) -> None:
    for name, a, b in zip(Selection._fields, result, expected, strict=True):
        assert torch.equal(a, b), f"{name}: {a} != {b}"


special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, INF, -INF, NAN, 1e-45, 3e38, -3e38, 1e-30])
number = st.one_of(special, st.floats(width=32), st.integers(-3, 3).map(float))
# A power of two gives masses that tie and add up to the target exactly.
mass_number = st.one_of(
    st.sampled_from([0.0, -0.0, -1.0, -INF, NAN, 1e-45, 3e38, 1e-30, 1.0, 0.5, 0.25]),
    st.floats(0, 1, width=32),
)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    rows = draw(st.integers(1, 3))
    tokens = draw(st.sampled_from([0, 1, 2, 7, 31, 32, 33, 60]))
    by_mass = draw(st.booleans())

    def matrix(element: st.SearchStrategy[object]) -> list[list[object]]:
        return [draw(st.lists(element, min_size=tokens, max_size=tokens)) for _ in range(rows)]

    case: dict[str, object] = {"scores": matrix(mass_number if by_mass else number)}
    case["forced"] = matrix(st.booleans()) if draw(st.booleans()) else None
    case["candidates"] = matrix(st.booleans()) if draw(st.booleans()) else None
    case["segment"] = matrix(st.integers(-1, 3)) if draw(st.booleans()) else None
    if by_mass:
        case["mass"] = draw(st.sampled_from([1e-9, 0.25, 0.5, 0.75, 0.9, 0.975, 1.0]))
        return case
    kinds = ["int", "row"] + (["segment"] if case["segment"] is not None else [])
    kind = draw(st.sampled_from(kinds))
    budget = st.integers(0, tokens + 2)
    if kind == "int":
        case["keep"] = draw(budget)
    elif kind == "row":
        case["keep"] = [draw(budget) for _ in range(rows)]
    else:
        case["keep"] = [[draw(budget) for _ in range(4)] for _ in range(rows)]
    return case


def to_arguments(case: dict[str, object]) -> tuple[torch.Tensor, dict[str, object]]:
    dtypes = {"forced": torch.bool, "candidates": torch.bool, "segment": torch.int32, "keep": torch.int32}
    scores = torch.tensor(case["scores"], dtype=torch.float32)
    arguments: dict[str, object] = {}
    for name in ("forced", "candidates", "segment", "keep", "mass"):
        value = case.get(name)
        arguments[name] = torch.tensor(value, dtype=dtypes[name]) if isinstance(value, list) else value
    return scores, arguments


def expected_rows(case: dict[str, object], scores: torch.Tensor) -> list[list[int]]:
    rows, tokens = scores.shape
    expected = []
    for row in range(rows):
        keep = case.get("keep")
        expected.append(
            oracle_row(
                scores[row].tolist(),
                keep[row] if isinstance(keep, list) else keep,
                case.get("mass"),
                case["forced"][row] if case["forced"] else [False] * tokens,
                case["candidates"][row] if case["candidates"] else [True] * tokens,
                case["segment"][row] if case["segment"] else [0] * tokens,
            )
        )
    return expected


@every_backend
@given(case=cases())
def test_matches_the_oracle(backend: Backend, case: dict[str, object]) -> None:
    scores, arguments = to_arguments(case)
    result = backend.select(scores, **arguments)
    check_against_oracle(result, expected_rows(case, scores), scores.shape[1])


@native_backend
@pytest.mark.parametrize("tokens", [0, 1, 31, 33, 127, 129, 1023, 1024, 1025, 4096, 4097, 8192, 8195])
@pytest.mark.parametrize("kind", ["normal", "softmax", "equal", "two_values", "descending"])
def test_matches_the_reference_at_odd_sizes(backend: Backend, tokens: int, kind: str) -> None:
    scores = torch.randn(2, tokens)
    if kind == "softmax":
        scores = (4 * scores).softmax(dim=1)
    elif kind == "equal":
        scores = torch.full((2, tokens), 0.25)
    elif kind == "two_values":
        scores = (scores > 0).float()
    elif kind == "descending":
        scores = scores.sort(dim=1, descending=True).values
    for arguments in ({"keep": tokens // 3}, {"keep": tokens}, {"mass": 0.9}, {"mass": 1.0}):
        expected = REFERENCE.select(scores, **arguments)
        assert_same(backend.select(scores, **arguments), expected)


def misleading(tokens: int, kind: str) -> torch.Tensor:
    """Rows of which a sample says little: most of what counts lies in few places."""
    scores = torch.rand(1, tokens)
    place = torch.arange(tokens)
    if kind == "steps":
        scores = (place // 1000).float()[None]
    elif kind == "needles":
        scores[0, ::97] += 10
    elif kind == "block":
        scores[0, : tokens // 3] += 10
    elif kind == "columns":
        scores[0, place % 64 == 0] = 5.0
    elif kind == "few_values":
        scores = (scores * 5).floor()
    elif kind == "range":
        scores = (scores - 0.5) * 10.0 ** torch.randint(-38, 38, (1, tokens)).float()
    return scores


@pytest.mark.parametrize("kind", ["steps", "needles", "block", "columns", "few_values", "range"])
def test_long_rows_that_mislead_a_sample(kind: str) -> None:
    tokens = 20011
    scores = misleading(tokens, kind)
    for keep in (1, 2, 100, tokens // 97, tokens // 3, tokens // 3 + 1, tokens // 2, tokens - 1):
        assert_same(CPU.select(scores, keep=keep), REFERENCE.select(scores, keep=keep))
    for mass in (1e-6, 0.01, 0.5, 0.99, 1.0):
        assert_same(CPU.select(scores, mass=mass), REFERENCE.select(scores, mass=mass))


@native_backend
@pytest.mark.parametrize("tokens", [3000, 9000])
def test_long_rows_with_everything(backend: Backend, tokens: int) -> None:
    rows, groups = 3, 5
    scores = torch.randn(rows, tokens).softmax(dim=1)
    arguments = {
        "forced": torch.rand(rows, tokens) < 0.02,
        "candidates": torch.rand(rows, tokens) < 0.9,
        "segment": torch.randint(-1, groups, (rows, tokens), dtype=torch.int32).sort(dim=1).values,
    }
    keep = torch.randint(0, 300, (rows, groups), dtype=torch.int32)
    for budget in ({"keep": keep}, {"keep": keep[:, 0]}, {"keep": 17}, {"mass": 0.6}):
        expected = REFERENCE.select(scores, **budget, **arguments)
        assert_same(backend.select(scores, **budget, **arguments), expected)


@every_backend
def test_order_of_special_values(backend: Backend) -> None:
    scores = torch.tensor([[NAN, -INF, -0.0, 0.0, INF, -1.0, -NAN, 1.0]])
    # inf, 1, then the two zeros by index, -1, and the three last ones by index.
    order = [4, 7, 2, 3, 5, 0, 1, 6]
    for keep in range(9):
        assert backend.select(scores, keep=keep).index[0].tolist() == sorted(order[:keep])


@every_backend
def test_mass_of_nothing_keeps_the_highest(backend: Backend) -> None:
    scores = torch.tensor([[-2.0, -1.0, -3.0], [NAN, -INF, NAN], [0.0, 0.0, -0.0]])
    assert backend.select(scores, mass=0.9).index[:, 0].tolist() == [1, 0, 0]
    assert backend.select(scores, mass=0.9).count.tolist() == [1, 1, 1]


@every_backend
def test_mass_stops_exactly_at_the_edge(backend: Backend) -> None:
    scores = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    for mass, kept in ((0.5, [1]), (0.75, [0, 1]), (0.875, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        result = backend.select(scores, mass=mass)
        assert result.index[0, : len(kept)].tolist() == kept
        assert result.count.item() == len(kept)


@every_backend
def test_sparse_segment_ids(backend: Backend) -> None:
    scores = torch.arange(6.0).repeat(2, 1)
    segment = torch.tensor([[2**31 - 1, 7, 7, -5, 0, 0], [-1, -1, -1, -1, -1, 3]], dtype=torch.int32)
    result = backend.select(scores, keep=1, segment=segment)
    assert result.index[:, :3].tolist() == [[0, 2, 5], [5, -1, -1]]
    assert result.count.tolist() == [3, 1]


@every_backend
def test_default_capacity(backend: Backend) -> None:
    scores = torch.rand(2, 10)
    assert backend.select(scores, keep=4).index.shape == (2, 4)
    assert backend.select(scores, keep=40).index.shape == (2, 10)
    assert backend.select(scores, keep=4, candidates=scores > 0.5).index.shape == (2, 4)
    assert backend.select(scores, keep=4, forced=scores > 0.5).index.shape == (2, 10)
    assert backend.select(scores, mass=0.5).index.shape == (2, 10)
    keep = torch.tensor([1, 2], dtype=torch.int32)
    assert backend.select(scores, keep=keep).index.shape == (2, 10)
    assert backend.select(scores, keep=keep, capacity=2).index.shape == (2, 2)
    assert backend.select(scores, keep=4, capacity=13).index[0, 4:].tolist() == [-1] * 9


@every_backend
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_empty_rows_and_tokens(backend: Backend, rows: int) -> None:
    for arguments in ({"keep": 3}, {"mass": 0.5}, {"keep": 3, "capacity": 2}):
        result = backend.select(torch.empty(rows, 0), **arguments)
        assert result.count.tolist() == [0] * rows
        assert result.inverse.shape == (rows, 0)
        assert (result.index == -1).all()


@every_backend
def test_any_strides(backend: Backend) -> None:
    tokens = 70
    scores = torch.randn(4, tokens)
    flags = torch.rand(4, tokens) < 0.5
    segment = torch.randint(-1, 3, (4, tokens), dtype=torch.int32)
    wide = torch.randn(4, 3 * tokens)
    wide[:, 5 : 5 + tokens] = scores
    layouts = [
        wide[:, 5 : 5 + tokens],
        scores.T.contiguous().T,
        torch.stack([scores, scores], dim=2)[..., 1],
    ]
    expected = REFERENCE.select(scores, keep=9, forced=flags, candidates=~flags, segment=segment)
    for other in layouts:
        result = backend.select(
            other,
            keep=9,
            forced=flags.T.contiguous().T,
            candidates=~flags,
            segment=torch.stack([segment, segment], dim=1)[:, 0],
        )
        assert_same(result, expected)
    same_row = scores[:1].expand(4, tokens)
    assert_same(backend.select(same_row, keep=9), REFERENCE.select(same_row.contiguous(), keep=9))
    keep = torch.tensor([[1, 0], [2, 0], [3, 0], [4, 0]], dtype=torch.int32)[:, 0]
    assert backend.select(scores, keep=keep).count.tolist() == [1, 2, 3, 4]


@every_backend
def test_a_row_does_not_depend_on_its_batch(backend: Backend) -> None:
    scores = torch.randn(5, 333).softmax(dim=1)
    for arguments in ({"keep": 100}, {"mass": 0.8}):
        together = backend.select(scores, **arguments, capacity=333)
        for row in range(5):
            alone = backend.select(scores[row : row + 1], **arguments, capacity=333)
            assert_same(alone, Selection(*(t[row : row + 1] for t in together)))


def test_result_does_not_depend_on_threads() -> None:
    scores = torch.randn(64, 2000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.select(scores, mass=0.7)
        torch.set_num_threads(4)
        assert_same(ops.select(scores, mass=0.7), expected)
    finally:
        torch.set_num_threads(threads)


def test_reference_takes_float64() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert REFERENCE.select(scores, keep=1).index.tolist() == [[1]]


S = torch.rand(2, 6)
BAD_ARGUMENTS = [
    ({}, ValueError, "keep, mass"),
    ({"keep": 1, "mass": 0.5}, ValueError, "keep, mass"),
    ({"keep": -1}, ValueError, "keep: got -1"),
    ({"keep": 1.5}, TypeError, "keep: got float"),
    ({"keep": True}, TypeError, "keep: got bool"),
    ({"keep": torch.tensor([1, 2])}, TypeError, "keep: has dtype int64"),
    ({"keep": torch.ones(3, dtype=torch.int32)}, ValueError, r"keep: has shape \(3,\), must be \(2,\)"),
    ({"keep": torch.ones(2, 1, dtype=torch.int32)}, ValueError, "keep: .* with segment"),
    ({"mass": 0.0}, ValueError, "mass: got 0.0"),
    ({"mass": 1.01}, ValueError, "mass: got 1.01"),
    ({"mass": NAN}, ValueError, "mass: got nan"),
    ({"mass": "much"}, TypeError, "mass: got str"),
    ({"keep": 1, "capacity": -1}, ValueError, "capacity: got -1"),
    ({"keep": 1, "capacity": 2.0}, TypeError, "capacity: got float"),
    ({"keep": 1, "forced": S}, TypeError, "forced: has dtype float32, must be bool"),
    ({"keep": 1, "forced": (S > 0)[:, :5]}, ValueError, r"forced: has shape \(2, 5\), must be \(2, 6\)"),
    ({"keep": 1, "candidates": [True]}, TypeError, "candidates: got list"),
    ({"keep": 1, "segment": S.long()}, TypeError, "segment: has dtype int64, must be int32"),
]


@every_backend
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    backend: Backend, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        backend.select(S, **arguments)


@every_backend
def test_bad_scores(backend: Backend) -> None:
    with pytest.raises(TypeError, match="scores: got list"):
        backend.select([[1.0]], keep=1)
    with pytest.raises(TypeError, match="scores: has dtype float16, must be float32"):
        backend.select(S.half(), keep=1)
    with pytest.raises(ValueError, match=r"scores: has shape \(6,\), must be \(R, N\)"):
        backend.select(S[0], keep=1)


RAISING = pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)


@RAISING
def test_bad_values_raise_on_the_cpu(backend: Backend) -> None:
    scores = torch.rand(3, 6)
    with pytest.raises(ValueError, match="capacity"):
        backend.select(scores, keep=4, capacity=3)
    with pytest.raises(ValueError, match="keep"):
        backend.select(scores, keep=torch.tensor([1, 2, -1], dtype=torch.int32))
    segment = torch.zeros(3, 6, dtype=torch.int32)
    segment[1, 2] = 2
    with pytest.raises(ValueError, match="segment"):
        backend.select(scores, keep=torch.ones(3, 2, dtype=torch.int32), segment=segment)
    scores[2, 5] = INF
    with pytest.raises(ValueError, match="scores"):
        backend.select(scores, mass=0.5)
    # Allowed where it is no candidate.
    backend.select(scores, mass=0.5, forced=scores == INF)
    backend.select(scores, mass=0.5, candidates=scores < INF)


def test_the_first_bad_row_is_named() -> None:
    scores = torch.rand(500, 300)
    keep = torch.ones(500, dtype=torch.int32)
    keep[[77, 400]] = -3
    with pytest.raises(ValueError, match=r"row 77, got -3"):
        ops.select(scores, keep=keep)


def test_bad_values_set_the_device_word(monkeypatch: pytest.MonkeyPatch) -> None:
    lightvlm_ext.device_errors()
    scores = torch.tensor([[3.0, INF, 1.0, 2.0]])
    # The offending entry is ignored: the infinity is no candidate ...
    assert EMULATED.select(scores, mass=1.0).index[0].tolist() == [0, 2, 3, -1]
    assert "+inf" in "".join(lightvlm_ext.device_errors())
    assert lightvlm_ext.device_errors() == []
    # ... what does not fit is dropped ...
    result = EMULATED.select(scores, keep=3, capacity=2)
    assert result.index.tolist() == [[0, 1]]
    assert result.count.tolist() == [2]
    assert result.inverse.tolist() == [[0, 1, -1, -1]]
    # ... a negative budget is none, and a segment without a budget has no candidates.
    keep = torch.tensor([[-1, 1]], dtype=torch.int32)
    segment = torch.tensor([[0, 1, 1, 2]], dtype=torch.int32)
    assert EMULATED.select(scores, keep=keep, segment=segment).index[0].tolist() == [1, -1, -1, -1]
    found = lightvlm_ext.device_errors()
    assert [error.split(": ")[2] for error in found] == ["capacity", "keep", "segment"]

    monkeypatch.setenv("LIGHTVLM_CHECK", "1")
    with pytest.raises(ValueError, match="capacity"):
        EMULATED.select(scores, keep=3, capacity=2)
    assert lightvlm_ext.device_errors() == []


def test_observers_see_calls() -> None:
    calls: list[lightvlm_ext.OpCall] = []
    with lightvlm_ext.observe(calls.append):
        ops.select(S, keep=1)
    ops.select(S, keep=1)
    assert [(call.name, call.device) for call in calls] == [("select", "cpu")]
    assert calls[0].seconds is not None
    assert calls[0].seconds >= 0


@pytest.mark.parametrize("extra", [{}, {"forced": S > 0.9, "candidates": S > 0.1}, {"mass": 0.5}])
def test_opcheck(extra: dict[str, object]) -> None:
    outputs = [torch.empty(shape, dtype=torch.int32) for shape in ((2, 6), (2,), (2, 6))]
    forced, candidates = extra.get("forced"), extra.get("candidates")
    segment = torch.zeros(2, 6, dtype=torch.int32)
    mass = extra.get("mass", 0.0)
    keep = None if mass else torch.ones(2, 1, dtype=torch.int32)
    arguments = (S, forced, candidates, segment, keep, 0, mass, *outputs, None)
    torch.library.opcheck(torch.ops.lightvlm.select.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(lambda s: ops.select(s, keep=3), fullgraph=True, backend="aot_eager")
    assert_same(compiled(S), ops.select(S, keep=3))


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, S.double(), "scores: has dtype"),
        (0, S.T, "scores: the last dimension"),
        (1, S, "forced: has dtype"),
        (4, torch.ones(2, 1, dtype=torch.int32), "keep: .* segment"),
        (6, 2.0, "mass: got 2"),
        (7, torch.empty(2, 3), "index: has dtype"),
        (7, torch.empty(3, 3, dtype=torch.int32), r"index: has shape \(3, 3\), must be \(2, 3\)"),
        (8, torch.empty(4, dtype=torch.int32)[::2], "count: must be contiguous"),
        (9, torch.empty(2, 5, dtype=torch.int32), r"inverse: .* must be \(2, 6\)"),
        (10, torch.zeros(2, dtype=torch.int32), r"error: .* must be \(1\)"),
    ],
)
def test_raw_calls_are_checked(position: int, wrong: object, message: str) -> None:
    outputs = [torch.empty(shape, dtype=torch.int32) for shape in ((2, 3), (2,), (2, 6))]
    arguments: list[object] = [S, None, None, None, None, 1, 0.0, *outputs, None]
    ops.select(S, keep=1)
    arguments[position] = wrong
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.lightvlm.select(*arguments)
