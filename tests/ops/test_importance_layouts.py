"""importance: padding, batches, strides; where a NaN may go. On the tiers, to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.ops.backends import Backend
from tests.ops.scoring import EXACT, each_precision, every_backend, native_backend, vectors

INF, NAN = math.inf, math.nan
int32 = torch.int32


@native_backend
@each_precision
@pytest.mark.parametrize("options", EXACT, ids=str)
@pytest.mark.parametrize("given", [True, False])
def test_padding_and_batch_change_nothing(
    backend: Backend, dtype: torch.dtype, options: dict[str, Any], given: bool
) -> None:
    """Bit for bit: a row alone, in a batch, padded left, right, with ignored rows, or in longer buffers."""
    window, tokens, pads = 19, 77, [0, 13, 40]
    if given and options.get("axis") == "query":
        return
    query, key = (x.to(dtype) for x in vectors(3, window, tokens, 4, 2, 24))
    lse = torch.rand(3, 4, window) + 4 if given else None
    counts = [tokens, 64, 5]
    by_key = options.get("axis") != "query"
    key_buffer = torch.full((3, 150, 2, 24), NAN, dtype=dtype)
    query_buffer = torch.full((3, 45, 4, 24), NAN, dtype=dtype)
    row_pos = torch.full((3, 45), -1, dtype=int32)
    where = torch.randperm(45)[:window].sort().values
    query_buffer[:, where] = query
    lse_buffer = None
    if lse is not None:
        lse_buffer = torch.full((3, 4, 45), NAN)
        lse_buffer[:, :, where] = lse
    for b, (count, pad) in enumerate(zip(counts, pads, strict=True)):
        key_buffer[b, pad : pad + count] = key[b, :count]
        row_pos[b, where] = (pad + count - window + torch.arange(window)).clamp_min(-1).to(int32)
    leftpad = torch.tensor(pads, dtype=int32)
    lens = leftpad + torch.tensor(counts, dtype=int32)
    bounds = {"row_pos": row_pos, "leftpad": leftpad, "lens": lens}
    together, seen = backend.importance(
        query_buffer, key_buffer, lse=lse_buffer, return_visible=True, **bounds, **options
    )
    for b, (count, pad) in enumerate(zip(counts, pads, strict=True)):
        alone, visible = backend.importance(
            query[b : b + 1],
            key[b : b + 1, :count],
            lse=None if lse is None else lse[b : b + 1],
            return_visible=True,
            **options,
        )
        assert torch.equal(seen[b, pad : pad + count], visible[0])
        if by_key:
            assert torch.equal(together[b, ..., pad : pad + count], alone[0])
            outside = torch.cat([together[b, ..., :pad], together[b, ..., pad + count :]], dim=-1)
            assert (outside == 0).all()
        else:
            assert torch.equal(together[b, where], alone[0])
            assert together[b].count_nonzero() == alone[0].count_nonzero()


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    batch, rows, heads, width = x.shape
    wide = torch.full((batch, rows + 3, heads + 2, 2 * width + 1), NAN, dtype=x.dtype)
    wide[:, 2 : 2 + rows, 1 : 1 + heads, 5 : 5 + width] = x
    return {
        "heads_first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "slice": wide[:, 2 : 2 + rows, 1 : 1 + heads, 5 : 5 + width],
        "rows_first": x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    }


@every_backend
@each_precision
def test_any_strides(backend: Backend, dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in vectors(2, 18, 40, 4, 2, 24))
    for options in ({}, {"axis": "query"}):
        expected = backend.importance(query, key, **options)
        for name, other in layouts(query).items():
            assert torch.equal(backend.importance(other, layouts(key)[name], **options), expected), name
    shared = backend.importance(query[:1].expand(2, -1, -1, -1), key[:1].expand(2, -1, -1, -1))
    assert torch.equal(shared[0], shared[1])
    row_pos = torch.arange(22, 40, dtype=int32).expand(2, 18)
    assert torch.equal(backend.importance(query, key, row_pos=row_pos), backend.importance(query, key))
    strided = row_pos.T.contiguous().T
    assert torch.equal(backend.importance(query, key, row_pos=strided), backend.importance(query, key))


@every_backend
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("options", [{}, {"rows": "max", "heads": "max"}, {"axis": "query"}], ids=str)
@each_precision
def test_nan_stays_in_its_batch_row(
    backend: Backend, bad: float, options: dict[str, Any], dtype: torch.dtype
) -> None:
    query, key = (x.to(dtype) for x in vectors(3, 6, 30, 4, 2, 8))
    clean = backend.importance(query, key, **options)
    for spoil in (query[1, 2, 3], key[1, 11, 0]):
        before = spoil.clone()
        spoil[5] = bad
        score = backend.importance(query, key, **options)
        spoil.copy_(before)
        assert torch.equal(score[[0, 2]], clean[[0, 2]])
        if math.isnan(bad):
            assert score[1].isnan().any()
    if not options:
        lse = torch.zeros(3, 4, 6)
        lse[1, 1, 1] = NAN
        score = backend.importance(query, key, lse=lse)
        assert score[1].isnan().any()
        assert score[[0, 2]].isfinite().all()


@every_backend
@each_precision
def test_nan_reaches_only_what_depends_on_it(backend: Backend, dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in vectors(1, 4, 20, 2, 1, 8))
    clean = backend.importance(query, key, rows="sum")
    # Row 1 stands at 17: its NaN reaches the keys up to there.
    query[0, 1, 0, 0] = NAN
    score = backend.importance(query, key, rows="sum")
    assert score[0, :18].isnan().all()
    assert score[0, 18:].isfinite().all()
    # Ignored rows and keys outside are not looked at.
    row_pos = torch.tensor([[16, -1, 18, 19]], dtype=int32)
    around = torch.full((1, 3, 1, 8), NAN, dtype=dtype), torch.full((1, 2, 1, 8), INF, dtype=dtype)
    key = torch.cat([around[0], key, around[1]], dim=1)
    pad, lens = torch.tensor([3], dtype=int32), torch.tensor([23], dtype=int32)
    options = {"leftpad": pad, "lens": lens, "rows": "sum"}
    score = backend.importance(
        query, key, row_pos=(row_pos + 3) * (row_pos >= 0) - (row_pos < 0).int(), **options
    )
    assert score.isfinite().all()
    assert (score[0, 3:23] <= clean[0] + 1e-6).all()
    # Neither are rows whose log-sum-exp says that they saw nothing.
    lse = torch.zeros(1, 2, 4)
    lse[0, 0, 1] = -INF
    assert backend.importance(query, key, lse=lse, **options).isfinite().all()


@native_backend
def test_dead_rows_give_nothing(backend: Backend) -> None:
    query, key = vectors(1, 3, 10, 2, 1, 8)
    assert (backend.importance(query, key, lse=torch.full((1, 2, 3), -INF)) == 0).all()
    nobody = torch.full((1, 3), -1, dtype=int32)
    score, visible = backend.importance(query, key, row_pos=nobody, return_visible=True)
    assert (score == 0).all()
    assert (visible == 0).all()
    # They count as rows that see the key, as "mean" divides by these.
    lse = torch.zeros(1, 2, 3)
    whole = backend.importance(query, key, lse=lse, causal=False)
    lse[:, :, 0] = -INF
    assert (backend.importance(query, key, lse=lse, causal=False) < whole).all()
