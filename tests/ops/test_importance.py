"""importance: every tier against loops over the formula; invariants, layouts, NaN, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lightvlm_ext
from lightvlm_ext import ops
from tests.ops.backends import CPU, EMULATED, REFERENCE, Backend
from tests.ops.scoring import EXACT, each_precision, every_backend, native_backend, vectors

INF, NAN = math.inf, math.nan
int32 = torch.int32


def sees(case: dict[str, Any], b: int, w: int, j: int) -> bool:
    """Whether row w sees key j, by the words of the documentation."""
    window, tokens = case["query"].shape[1], case["key"].shape[1]
    end = tokens if case.get("lens") is None else int(case["lens"][b])
    begin = 0 if case.get("leftpad") is None else int(case["leftpad"][b])
    position = end - window + w if case.get("row_pos") is None else int(case["row_pos"][b, w])
    if position < begin or not begin <= j < end:
        return False
    return j <= position or not case.get("causal", True)


def oracle(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and visible in float64, entry by entry."""
    query, key = case["query"].double(), case["key"].double()
    (batch, window, query_heads, width), (tokens, key_heads) = query.shape, key.shape[1:3]
    group = query_heads // key_heads
    scale = case.get("scale") or width**-0.5
    axis, rows, heads = case.get("axis", "key"), case.get("rows", "mean"), case.get("heads", "mean")
    mass = torch.zeros(batch, query_heads, window, tokens, dtype=torch.float64)
    visible = torch.zeros(batch, tokens, dtype=int32)
    for b in range(batch):
        shown = [[sees(case, b, w, j) for j in range(tokens)] for w in range(window)]
        visible[b] = torch.tensor([sum(row[j] for row in shown) for j in range(tokens)])
        for h in range(query_heads):
            logit = [
                [scale * float(query[b, w, h] @ key[b, j, h // group]) for j in range(tokens)]
                for w in range(window)
            ]
            for w in range(window):
                for j in range(tokens):
                    if not shown[w][j]:
                        continue
                    if axis == "query":
                        total = sum(math.exp(logit[v][j]) for v in range(window) if shown[v][j])
                    elif case.get("lse") is None:
                        total = sum(math.exp(logit[w][i]) for i in range(tokens) if shown[w][i])
                    else:
                        total = math.exp(float(case["lse"][b, h, w]))
                    mass[b, h, w, j] = math.exp(logit[w][j]) / total if total else 0.0
    if axis == "query":
        return mass.sum(dim=(1, 3)), visible
    per_head = torch.zeros(batch, query_heads, tokens, dtype=torch.float64)
    for b, h, j in [(b, h, j) for b in range(batch) for h in range(query_heads) for j in range(tokens)]:
        column = mass[b, h, :, j].tolist()
        if rows == "max":
            per_head[b, h, j] = max(column, default=0.0)
        else:
            per_head[b, h, j] = sum(column) / (max(1, int(visible[b, j])) if rows == "mean" else 1)
    if heads == "none":
        return per_head.unflatten(1, (key_heads, group)).mean(dim=2), visible
    fold = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}[heads]
    return fold(per_head, dim=1), visible


def call(backend: Backend, case: dict[str, Any], **more: Any) -> Any:
    return backend.importance(**{**case, **more})


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    batch, window, tokens = draw(st.integers(0, 2)), draw(st.integers(0, 4)), draw(st.integers(0, 6))
    key_heads, group, width = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 1000)))
    query, key = vectors(batch, window, tokens, key_heads * group, key_heads, width)
    case: dict[str, Any] = {
        "query": query,
        "key": key,
        "causal": draw(st.booleans()),
        "rows": draw(st.sampled_from(["sum", "mean", "max"])),
        "heads": draw(st.sampled_from(["mean", "sum", "max", "none"])),
        "axis": draw(st.sampled_from(["key", "key", "query"])),
        "scale": draw(st.sampled_from([None, 0.3, -1.0])),
    }
    if draw(st.booleans()):
        case["lens"] = torch.randint(0, tokens + 1, (batch,), dtype=int32)
    if draw(st.booleans()):
        end = case.get("lens", torch.full((batch,), tokens))
        case["leftpad"] = (torch.rand(batch) * (end + 1)).to(int32)
    if draw(st.booleans()):
        case["row_pos"] = torch.randint(-2, tokens + 3, (batch, window), dtype=int32)
    if case["axis"] == "key" and draw(st.booleans()):
        case["lse"] = torch.randn(batch, key_heads * group, window)
        case["lse"][torch.rand(case["lse"].shape) < 0.2] = -INF
    return case


@every_backend
@given(case=cases())
def test_matches_the_formula(backend: Backend, case: dict[str, Any]) -> None:
    expected, seen = oracle(case)
    score, visible = call(backend, case, return_visible=True)
    assert score.dtype == torch.float32
    assert visible.dtype == int32
    assert score.is_contiguous()
    assert torch.equal(visible, seen)
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(call(backend, case), score)


def assert_as_exact_as_torch(score: torch.Tensor, case: dict[str, Any]) -> None:
    """At most twice the error that plain torch makes in fp32 from the same inputs, and a few roundings."""
    wide = {**case, "query": case["query"].double(), "key": case["key"].double()}
    exact = call(REFERENCE, wide)
    plain = call(REFERENCE, case).double()
    if exact.numel() == 0:
        assert score.shape == exact.shape
        return
    bound = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (score.double() - exact).abs().max() <= bound


FOLDS = [("mean", "mean"), ("sum", "max"), ("max", "sum"), ("max", "max"), ("mean", "none"), ("max", "none")]
SIZES = [  # window, tokens: around the tiles of 12, 16, 32, 64, 128, 192 and the splits of 512
    (1, 1),
    (1, 511),
    (3, 513),
    (11, 12),
    (15, 13),
    (16, 63),
    (17, 64),
    (31, 65),
    (33, 127),
    (64, 130),
    (65, 33),
    (130, 129),
    (270, 200),
]


@native_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("window", "tokens"), SIZES)
def test_odd_sizes(backend: Backend, dtype: torch.dtype, window: int, tokens: int) -> None:
    rows, heads = FOLDS[(window + tokens) % len(FOLDS)]
    query, key = (x.to(dtype) for x in vectors(2, window, tokens, 6, 2, 40))
    case = {"query": query, "key": key, "rows": rows, "heads": heads}
    assert_as_exact_as_torch(call(backend, case), case)
    lse = 4 + torch.randn(2, 6, window)
    assert_as_exact_as_torch(call(backend, {**case, "lse": lse}), {**case, "lse": lse})
    per_row = {"query": query, "key": key, "axis": "query", "causal": window < tokens}
    assert_as_exact_as_torch(call(backend, per_row), per_row)


@native_backend
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 64, 100, 128, 255, 256])
def test_head_widths(backend: Backend, width: int) -> None:
    query, key = vectors(1, 5, 70, 4, 2, width)
    for dtype in (torch.float32, torch.bfloat16):
        case = {"query": query.to(dtype), "key": key.to(dtype)}
        assert_as_exact_as_torch(call(backend, case), case)


@native_backend
@each_precision
@pytest.mark.parametrize(("rows", "heads"), FOLDS)
@pytest.mark.parametrize("own", [True, False])
def test_folds(backend: Backend, dtype: torch.dtype, rows: str, heads: str, own: bool) -> None:
    query, key = (x.to(dtype) for x in vectors(2, 37, 90, 9, 3, 24))
    case: dict[str, Any] = {"query": query, "key": key, "rows": rows, "heads": heads}
    case["row_pos"] = torch.randint(-1, 92, (2, 37), dtype=int32)
    case["lens"] = torch.tensor([90, 70], dtype=int32)
    case["leftpad"] = torch.tensor([0, 13], dtype=int32)
    if not own:
        case["lse"] = torch.randn(2, 9, 37) + 3
    assert_as_exact_as_torch(call(backend, case), case)


@native_backend
@each_precision
def test_large_logits(backend: Backend, dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in vectors(1, 20, 100, 4, 2, 64))
    for factor in (30.0, 1e4, 1e8):  # soft, then one-hot
        case = {"query": factor * query, "key": key, "rows": "sum"}
        assert call(backend, case).isfinite().all()
        assert_as_exact_as_torch(call(backend, case), case)
    # A log-sum-exp far below the logits is used as it is: masses above 1, up to infinity.
    case = {"query": 0 * query, "key": key, "heads": "max", "rows": "max"}
    for value in (-80.0, -88.5, 87.0, 95.0, 200.0):
        score = call(backend, {**case, "lse": torch.full((1, 4, 20), value)})
        expected = torch.full_like(score, math.exp(-value) if value < 88 else 0.0)
        torch.testing.assert_close(score, expected, rtol=1e-6, atol=1.2e-38)
    assert (call(backend, {**case, "lse": torch.full((1, 4, 20), -89.0)}) == INF).all()


@native_backend
@pytest.mark.parametrize("causal", [True, False])
def test_mass_is_conserved(backend: Backend, causal: bool) -> None:
    query, key = vectors(2, 21, 150, 6, 2, 32)
    lens = torch.tensor([150, 90], dtype=int32)
    pad = torch.tensor([3, 80], dtype=int32)  # in the second row, 10 keys for 21 probe rows
    arguments = {"causal": causal, "lens": lens, "leftpad": pad, "rows": "sum", "heads": "sum"}
    score = backend.importance(query, key, **arguments)
    counted = torch.tensor([21, 10])
    torch.testing.assert_close(score.sum(dim=1), 6.0 * counted)
    # Over the rows, each head's share of a key that anybody sees is 1.
    score, visible = backend.importance(query, key, **arguments, axis="query", return_visible=True)
    torch.testing.assert_close(score.sum(dim=1), 6.0 * (visible > 0).sum(dim=1))


@every_backend
def test_given_lse_is_the_own_softmax(backend: Backend) -> None:
    query, key = vectors(2, 9, 50, 4, 2, 16)
    logits = torch.einsum("bwkgd,bnkd->bkgwn", query.unflatten(2, (2, 2)), key).flatten(1, 2) / 4
    hidden = torch.arange(50)[None] > torch.arange(9)[:, None] + 41
    lse = logits.masked_fill(hidden, -INF).logsumexp(dim=-1)
    expected = backend.importance(query, key)
    torch.testing.assert_close(backend.importance(query, key, lse=lse), expected)
    # As it comes: the last rows of a longer log-sum-exp, and any order of dimensions.
    longer = torch.cat([torch.full((2, 4, 30), NAN), lse], dim=2)
    torch.testing.assert_close(backend.importance(query, key, lse=longer[..., 30:]), expected)
    swapped = lse.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(backend.importance(query, key, lse=swapped), expected)


@every_backend
def test_grouped_heads_are_repeated_keys(backend: Backend) -> None:
    query, key = vectors(2, 7, 40, 6, 2, 16)
    repeated = key.repeat_interleave(3, dim=2)
    for heads in ("mean", "max"):
        torch.testing.assert_close(
            backend.importance(query, key, heads=heads), backend.importance(query, repeated, heads=heads)
        )
    torch.testing.assert_close(
        backend.importance(query, key, heads="none"),
        backend.importance(query, repeated, heads="none").unflatten(1, (2, 3)).mean(dim=2),
    )


@native_backend
def test_rows_are_taken_as_they_come(backend: Backend) -> None:
    # Probe rows in any order of positions, some twice, some beyond the last key.
    query, key = vectors(1, 6, 20, 2, 1, 8)
    row_pos = torch.tensor([[19, 3, -1, 3, 400, 0]], dtype=int32)
    case = {"query": query, "key": key, "row_pos": row_pos, "rows": "sum"}
    score, visible = call(backend, case, return_visible=True)
    assert visible[0].tolist() == [5] + [4] * 3 + [2] * 16
    assert_as_exact_as_torch(score, case)
    per_row = {**case, "axis": "query"}
    assert call(backend, per_row)[0, 2] == 0
    assert_as_exact_as_torch(call(backend, per_row), per_row)


@every_backend
@pytest.mark.parametrize("axis", ["key", "query"])
@pytest.mark.parametrize(("batch", "window", "tokens"), [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)])
def test_empty(backend: Backend, axis: str, batch: int, window: int, tokens: int) -> None:
    query, key = vectors(batch, window, tokens, 4, 2, 8)
    score, visible = backend.importance(query, key, axis=axis, return_visible=True)
    assert score.shape == (batch, tokens if axis == "key" else window)
    assert (score == 0).all()
    assert visible.shape == (batch, tokens)
    assert (visible == 0).all()
    none = torch.zeros(batch, dtype=int32)
    assert (backend.importance(query, key, lens=none, axis=axis) == 0).all()
    if axis == "key":
        assert backend.importance(query, key, heads="none").shape == (batch, 2, tokens)
        lse = torch.zeros(batch, 4, window)
        assert backend.importance(query, key, lse=lse).shape == (batch, tokens)


def test_result_does_not_depend_on_threads() -> None:
    query, key = vectors(2, 40, 700, 6, 2, 32)
    threads = torch.get_num_threads()
    try:
        for options in EXACT:
            torch.set_num_threads(1)
            expected = ops.importance(query, key, **options)
            for count in (2, 5):
                torch.set_num_threads(count)
                assert torch.equal(ops.importance(query, key, **options), expected)
    finally:
        torch.set_num_threads(threads)


def test_reference_takes_float64() -> None:
    query, key = (x.double() for x in vectors(1, 3, 9, 2, 1, 8))
    score = REFERENCE.importance(query, key, rows="sum", heads="sum")
    assert score.dtype == torch.float64
    assert abs(float(score.sum()) - 6) < 1e-14
    with pytest.raises(TypeError, match="query: has dtype float64"):
        ops.importance(query, key)


Q, K = torch.randn(2, 3, 4, 8), torch.randn(2, 6, 2, 8)
BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query: got list"),
    ({"query": Q.int()}, TypeError, "query: has dtype int32, must be float32 or float16 or bfloat16"),
    ({"key": K.half()}, TypeError, "key: has dtype float16, must be float32"),
    ({"query": Q[0]}, ValueError, r"query: has shape \(3, 4, 8\), must be \(B, W, Hq, D\)"),
    ({"key": K[:1]}, ValueError, r"key: has shape \(1, 6, 2, 8\), must be \(2, N, Hkv, 8\)"),
    ({"key": K[..., :7]}, ValueError, r"key: has shape \(2, 6, 2, 7\)"),
    ({"key": K.repeat(1, 1, 2, 1)[:, :, :3]}, ValueError, "query: has 4 heads, must be .* key's heads, 3"),
    ({"key": K[:, :, :0]}, ValueError, "query: has 4 heads, must be .* key's heads, 0"),
    ({"query": Q[..., :0], "key": K[..., :0]}, ValueError, "head width 0, must be 1 to 256"),
    (
        {"query": torch.zeros(1, 1, 1, 257), "key": torch.zeros(1, 1, 1, 257)},
        ValueError,
        "head width 257, must be 1 to 256",
    ),
    (
        {"query": Q.transpose(2, 3).contiguous().transpose(2, 3)},
        ValueError,
        "query: last dimension has stride 4",
    ),
    ({"key": K.to("meta")}, ValueError, "key: is on meta, must be on cpu"),
    ({"lse": torch.zeros(2, 4, 3).half()}, TypeError, "lse: has dtype float16"),
    ({"lse": torch.zeros(2, 3, 4)}, ValueError, r"lse: has shape \(2, 3, 4\), must be \(2, 4, 3\)"),
    ({"lse": torch.zeros(2, 4, 3), "axis": "query"}, ValueError, "lse: .* axis='query'"),
    ({"row_pos": torch.zeros(2, 3)}, TypeError, "row_pos: has dtype float32, must be int32"),
    ({"row_pos": torch.zeros(2, 4, dtype=int32)}, ValueError, r"row_pos: has shape \(2, 4\)"),
    ({"lens": torch.zeros(2)}, TypeError, "lens: has dtype float32"),
    ({"lens": 6}, TypeError, "lens: got int"),
    ({"leftpad": torch.zeros(3, dtype=int32)}, ValueError, r"leftpad: has shape \(3,\), must be \(2,\)"),
    ({"scale": INF}, ValueError, "scale: got inf"),
    ({"scale": "1"}, TypeError, "scale: got str"),
    ({"causal": 1}, TypeError, "causal: got int"),
    ({"rows": "none"}, ValueError, "rows: got 'none', must be 'sum' or 'mean' or 'max'"),
    ({"heads": "min"}, ValueError, "heads: got 'min'"),
    ({"axis": 1}, ValueError, "axis: got 1, must be 'key' or 'query'"),
]


@every_backend
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    backend: Backend, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        backend.importance(**{"query": Q, "key": K, **arguments})


BAD_VALUES = [([6, 7], [0, 0]), ([6, -1], [0, 0]), ([6, 6], [0, -1]), ([6, 3], [0, 4])]


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)
@pytest.mark.parametrize(("lens", "leftpad"), BAD_VALUES)
def test_bad_values_raise_on_the_cpu(backend: Backend, lens: list[int], leftpad: list[int]) -> None:
    bounds = {"lens": torch.tensor(lens, dtype=int32), "leftpad": torch.tensor(leftpad, dtype=int32)}
    with pytest.raises(ValueError, match=r"lens, leftpad.*row 1"):
        backend.importance(Q, K, **bounds)


@pytest.mark.parametrize(("lens", "leftpad"), BAD_VALUES)
@pytest.mark.parametrize("axis", ["key", "query"])
def test_bad_values_set_the_device_word_emulated(lens: list[int], leftpad: list[int], axis: str) -> None:
    lightvlm_ext.device_errors()
    bounds = {"lens": torch.tensor(lens, dtype=int32), "leftpad": torch.tensor(leftpad, dtype=int32)}
    score, visible = EMULATED.importance(Q, K, **bounds, axis=axis, return_visible=True)
    good = CPU.importance(Q[:1], K[:1], axis=axis)
    torch.testing.assert_close(score[:1], good)
    assert (score[1] == 0).all()
    assert (visible[1] == 0).all()
    (message,) = lightvlm_ext.device_errors()
    assert "importance: lens, leftpad" in message
