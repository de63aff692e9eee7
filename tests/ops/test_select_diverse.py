"""select_diverse: every tier is checked to be the greedy choice, by float64 arithmetic of the test's own."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightvlm_ext import ops
from lightvlm_ext.ops import Selection
from tests.ops.backends import BACKENDS, CPU, EMULATED, NATIVE, REFERENCE, Backend

INF, NAN = math.inf, math.nan
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def cosine(x: Sequence[float], y: Sequence[float]) -> float:
    size = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
    if not math.isfinite(size) or size == 0:
        return 0.0
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / size


def check_greedy(
    kept: set[int],
    scores: list[float],
    features: list[list[float]],
    budget: int,
    strength: float,
    forced: set[int],
    candidates: set[int],
) -> None:
    """Whether `kept` is what the greedy choice keeps, up to the rounding of fp32 cosines."""
    free = candidates - forced
    assert forced <= kept <= forced | free
    assert len(kept - forced) == min(budget, len(free))
    worth = {i: max(scores[i], 0.0) if not math.isnan(scores[i]) else 0.0 for i in free}
    slack = 1e-5 * max(worth.values(), default=0.0) * max(1.0, strength)
    nearest = {i: max([0.0] + [cosine(features[i], features[j]) for j in forced]) for i in free}
    left, outside = kept - forced, free - kept

    def value(i: int) -> float:
        return worth[i] * (1 - strength * nearest[i])

    # The best of all is in `kept` at each step, so it is the best of those left in `kept`.
    while left:
        best = max(sorted(left), key=value)
        assert max((value(i) for i in outside), default=-INF) <= value(best) + slack
        left.remove(best)
        for i in nearest:
            nearest[i] = max(nearest[i], cosine(features[i], features[best]))


def check_selection(
    result: Selection, scores: torch.Tensor, features: torch.Tensor, strength: float, **options: object
) -> None:
    rows, tokens = scores.shape
    for row in range(rows):
        count = int(result.count[row])
        kept = result.index[row, :count].tolist()
        assert kept == sorted(set(kept))
        assert result.index[row, count:].tolist() == [-1] * (result.index.shape[1] - count)
        slots = {token: slot for slot, token in enumerate(kept)}
        assert result.inverse[row].tolist() == [slots.get(i, -1) for i in range(tokens)]

        def flags(name: str, default: bool, row: int = row) -> set[int]:
            mask = options.get(name)
            return {i for i in range(tokens) if (bool(mask[row, i]) if mask is not None else default)}

        segment = options.get("segment")
        ids = segment[row].tolist() if segment is not None else [0] * tokens
        keep = options["keep"]
        forced, candidates = flags("forced", False), flags("candidates", True)
        for group in {g for g in ids if g >= 0}:
            inside = {i for i in range(tokens) if ids[i] == group}
            budget = keep
            if isinstance(keep, torch.Tensor):
                budget = int(keep[row, group] if keep.dim() == 2 else keep[row])
            check_greedy(
                set(kept) & inside,
                scores[row].tolist(),
                features[row].double().tolist(),
                budget,
                strength,
                forced & inside,
                candidates & inside,
            )
        outside = {i for i in range(tokens) if ids[i] < 0}
        assert set(kept) & outside == forced & outside


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    rows = draw(st.integers(1, 2))
    tokens = draw(st.sampled_from([0, 1, 2, 9, 31, 33, 40]))
    channels = draw(st.sampled_from([0, 1, 2, 5, 33]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    case: dict[str, object] = {
        "scores": torch.randn(rows, tokens, generator=generator),
        "features": torch.randn(rows, tokens, channels, generator=generator),
        "strength": draw(st.sampled_from([0.25, 1.0, 2.0])),
        "keep": draw(st.integers(0, tokens + 1)),
    }

    def flags(probability: float) -> torch.Tensor:
        return torch.rand(rows, tokens, generator=generator) < probability

    if draw(st.booleans()):
        case["scores"] = case["scores"].abs()
    if draw(st.booleans()):
        case["forced"] = flags(0.2)
    if draw(st.booleans()):
        case["candidates"] = flags(0.7)
    if draw(st.booleans()):
        case["segment"] = torch.randint(-1, 3, (rows, tokens), dtype=torch.int32, generator=generator)
        if draw(st.booleans()):
            case["keep"] = torch.randint(0, 9, (rows, 3), dtype=torch.int32, generator=generator)
    return case


@every_backend
@given(case=cases())
def test_is_the_greedy_choice(backend: Backend, case: dict[str, object]) -> None:
    arguments = dict(case)
    scores, features = arguments.pop("scores"), arguments.pop("features")
    check_selection(backend.select_diverse(scores, features, **arguments), scores, features, **arguments)


@pytest.mark.parametrize("backend", NATIVE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "channels"), [(127, 64), (129, 32), (300, 17), (1025, 16)])
def test_larger_and_16_bit(backend: Backend, dtype: torch.dtype, tokens: int, channels: int) -> None:
    scores = torch.rand(2, tokens)
    features = torch.randn(2, tokens, channels).to(dtype)
    arguments = {"keep": 20, "strength": 0.8, "forced": torch.rand(2, tokens) < 0.02}
    check_selection(backend.select_diverse(scores, features, **arguments), scores, features, **arguments)


def check_greedy_choice(
    result: Selection, scores: torch.Tensor, features: torch.Tensor, forced: torch.Tensor
) -> None:
    """As check_greedy for one row and strength 1, by matrices."""
    kept = result.inverse[0] >= 0
    unit = torch.nn.functional.normalize(features[0].double(), dim=-1)
    cosine = unit @ unit.T
    worth = scores[0].double().clamp_min(0)
    nearest = torch.zeros_like(worth)
    if forced.any():
        nearest = cosine[:, forced[0]].amax(dim=1).clamp_min(0)
    left = kept & ~forced[0]
    slack = 1e-5 * float(worth.max())
    while left.any():
        value = worth * (1 - nearest)
        best = int(value.masked_fill(~left, -INF).argmax())
        assert float(value.masked_fill(kept, -INF).max()) <= float(value[best]) + slack
        left[best] = False
        nearest = torch.maximum(nearest, cosine[best])


@pytest.mark.parametrize("backend", NATIVE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "channels"), [(300, 128), (420, 136), (301, 129), (270, 300)])
def test_many_rounds_of_tokens_that_resemble_each_other(
    backend: Backend, dtype: torch.dtype, tokens: int, channels: int
) -> None:
    centres = torch.randn(12, channels)
    features = centres[torch.randint(12, (tokens,))] + 0.5 * torch.randn(tokens, channels) + 0.5
    features = features.to(dtype)[None]
    scores = torch.randn(1, tokens).exp()
    forced = torch.rand(1, tokens) < 0.02
    result = backend.select_diverse(scores, features, keep=tokens // 3, forced=forced)
    assert result.count.item() == tokens // 3 + int(forced.sum())
    check_greedy_choice(result, scores, features, forced)


@pytest.mark.parametrize("backend", NATIVE, ids=str)
def test_more_tokens_than_bounds_in_shared_memory(backend: Backend) -> None:
    tokens = 6200
    scores, features = torch.rand(1, tokens), torch.randn(1, tokens, 8).bfloat16()
    result = backend.select_diverse(scores, features, keep=60)
    check_greedy_choice(result, scores, features, torch.zeros(1, tokens, dtype=torch.bool))


@every_backend
def test_a_budget_for_all_keeps_all_candidates(backend: Backend) -> None:
    scores, features = torch.randn(1, 50), torch.randn(1, 50, 4)
    candidates = torch.rand(1, 50) < 0.5
    for keep in (int(candidates.sum()), 50):
        result = backend.select_diverse(scores, features, keep=keep, candidates=candidates)
        assert torch.equal(result.inverse >= 0, candidates)


@every_backend
def test_tokens_worth_nothing_go_by_index(backend: Backend) -> None:
    scores, features = -torch.rand(1, 400), torch.randn(1, 400, 4)
    scores[0, 390] = 1.0
    result = backend.select_diverse(scores, features, keep=200)
    assert result.index[0].tolist() == [*range(199), 390]


@every_backend
def test_any_strength(backend: Backend) -> None:
    # The second token turns negative, the third is worth nothing.
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
    scores = torch.tensor([[1.0, 0.9, 0.0, 0.1]])
    for strength in (3.0, 1e30, 1e300):
        for keep, kept in ((1, [0]), (2, [0, 3]), (3, [0, 2, 3])):
            result = backend.select_diverse(scores, features, keep=keep, strength=strength)
            assert result.index[0].tolist() == kept


@every_backend
def test_ties_go_to_the_lower_index(backend: Backend) -> None:
    features = torch.eye(3)[[0, 0, 1, 1, 2, 2]][None]
    scores = torch.ones(1, 6)
    # One of each kind, then, all others being worth nothing, the lowest.
    assert backend.select_diverse(scores, features, keep=3).index.tolist() == [[0, 2, 4]]
    assert backend.select_diverse(scores, features, keep=4).index.tolist() == [[0, 1, 2, 4]]
    # Worth nothing from the start: by index, whatever the features.
    assert backend.select_diverse(-scores, features, keep=3).index.tolist() == [[0, 1, 2]]


@every_backend
def test_forced_tokens_repel_in_their_segment_only(backend: Backend) -> None:
    features = torch.eye(2)[[0, 0, 1, 0, 0, 1]][None]
    scores = torch.tensor([[9.0, 5.0, 1.0, 0.0, 5.0, 1.0]])
    forced = torch.tensor([[True, False, False, False, False, False]])
    segment = torch.tensor([[0, 0, 0, 1, 1, 1]], dtype=torch.int32)
    whole = backend.select_diverse(scores, features, keep=2, forced=forced)
    assert whole.index[0, :3].tolist() == [0, 1, 2]
    parts = backend.select_diverse(scores, features, keep=1, forced=forced, segment=segment)
    assert parts.index[0].tolist() == [0, 2, 4, -1, -1, -1]


@every_backend
def test_strength_zero_is_select(backend: Backend) -> None:
    scores, features = torch.randn(3, 50), torch.randn(3, 50, 4)
    arguments = {"keep": 7, "forced": scores > 1, "candidates": scores < 0.9}
    result = backend.select_diverse(scores, features, strength=0.0, **arguments)
    for a, b in zip(result, REFERENCE.select(scores, **arguments), strict=True):
        assert torch.equal(a, b)


@every_backend
@pytest.mark.parametrize("factor", [1.0, 1e-42, 1e-30, 1e30, 3e38])
def test_range_of_features_and_scores(backend: Backend, factor: float) -> None:
    directions = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 0.0], [NAN, 1.0], [INF, 1.0]])
    features = (directions * factor)[None]
    scores = torch.tensor([[1.0, 0.99, 0.5, 0.4, 0.3, 0.2]])
    # The second resembles the first; those without a direction resemble nobody.
    order = [0, 2, 3, 4, 5, 1]
    for keep in range(7):
        result = backend.select_diverse(scores, features, keep=keep)
        assert result.index[0].tolist() == sorted(order[:keep])
    special = torch.tensor([[NAN, -INF, INF, 1.0, 3e38, -1.0]])
    for keep, kept in ((1, [2]), (2, [2, 4]), (3, [2, 3, 4]), (4, [0, 2, 3, 4])):
        assert backend.select_diverse(special, features, keep=keep).index[0].tolist() == kept


@every_backend
def test_any_strides(backend: Backend) -> None:
    scores, features = torch.rand(2, 40), torch.randn(2, 40, 6)
    expected = REFERENCE.select_diverse(scores, features, keep=9)
    wide = torch.zeros(40, 2, 10)
    wide[..., 2:8] = features.transpose(0, 1)
    for other in (features.permute(2, 1, 0).contiguous().permute(2, 1, 0), wide.transpose(0, 1)[..., 2:8]):
        result = backend.select_diverse(scores, other, keep=9)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@every_backend
def test_a_row_does_not_depend_on_its_batch(backend: Backend) -> None:
    scores, features = torch.rand(4, 70), torch.randn(4, 70, 8)
    together = backend.select_diverse(scores, features, keep=20)
    for row in range(4):
        alone = backend.select_diverse(scores[row : row + 1], features[row : row + 1], keep=20)
        assert torch.equal(alone.index[0], together.index[row])


@every_backend
def test_bad_arguments(backend: Backend) -> None:
    scores, features = torch.rand(2, 6), torch.rand(2, 6, 3)
    with pytest.raises(TypeError, match="features: has dtype int64"):
        backend.select_diverse(scores, features.long(), keep=1)
    with pytest.raises(ValueError, match=r"features: has shape \(2, 5, 3\), must be \(2, 6, Cf\)"):
        backend.select_diverse(scores, features[:, :5], keep=1)
    with pytest.raises(ValueError, match=r"strength: got -1\.0, must be >= 0"):
        backend.select_diverse(scores, features, keep=1, strength=-1.0)
    with pytest.raises(ValueError, match="strength: got nan"):
        backend.select_diverse(scores, features, keep=1, strength=NAN)
    with pytest.raises(TypeError, match="keep: got None"):
        backend.select_diverse(scores, features, keep=None)
    with pytest.raises(ValueError, match="keep: got -1"):
        backend.select_diverse(scores, features, keep=-1)


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)
def test_bad_values_raise_on_the_cpu(backend: Backend) -> None:
    scores, features = torch.rand(2, 6), torch.rand(2, 6, 3)
    with pytest.raises(ValueError, match="capacity"):
        backend.select_diverse(scores, features, keep=4, capacity=3)
    with pytest.raises(ValueError, match="keep"):
        backend.select_diverse(scores, features, keep=torch.tensor([1, -1], dtype=torch.int32))
    segment = torch.full((2, 6), 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="segment"):
        backend.select_diverse(scores, features, keep=torch.ones(2, 1, dtype=torch.int32), segment=segment)


def test_bad_values_set_the_device_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTVLM_CHECK", "1")
    scores, features = torch.rand(2, 6), torch.rand(2, 6, 3)
    with pytest.raises(ValueError, match="select_diverse: capacity"):
        EMULATED.select_diverse(scores, features, keep=4, capacity=3)
    with pytest.raises(ValueError, match="select_diverse: keep"):
        EMULATED.select_diverse(scores, features, keep=torch.tensor([1, -1], dtype=torch.int32))


def test_opcheck() -> None:
    scores, features = torch.rand(2, 6), torch.rand(2, 6, 3)
    ops.select_diverse(scores, features, keep=2)
    outputs = [torch.empty(shape, dtype=torch.int32) for shape in ((2, 6), (2,), (2, 6))]
    arguments = (scores, features, scores > 0.9, None, None, None, 2, 0.5, None, *outputs, None)
    torch.library.opcheck(torch.ops.lightvlm.select_diverse.default, arguments)


def test_result_does_not_depend_on_threads() -> None:
    # Many rows are shared out among threads; of one row its products are.
    for rows, tokens, channels in ((16, 300, 32), (1, 400, 1024)):
        scores, features = torch.rand(rows, tokens), torch.randn(rows, tokens, channels) + 0.3
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            expected = ops.select_diverse(scores, features, keep=150).index
            torch.set_num_threads(4)
            assert torch.equal(ops.select_diverse(scores, features, keep=150).index, expected)
        finally:
            torch.set_num_threads(threads)


LEVELS_PROGRAM = """
import torch
from lightvlm_ext import ops
torch.manual_seed(0)
scores, features = torch.rand(2, 400), torch.randn(2, 400, 50) + 0.5
print(ops.select_diverse(scores, features.half(), keep=140).index.tolist())
scores = torch.randn(3, 9000).softmax(dim=1)
print(ops.select(scores, keep=3000).index.tolist(), ops.select(scores, mass=0.9).inverse.tolist())
"""


def test_result_does_not_depend_on_the_level_of_the_processor() -> None:
    found = set()
    for level in ("portable", "avx2", "avx512"):
        environment = {**os.environ, "LIGHTVLM_CPU_LEVEL": level, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", LEVELS_PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1
