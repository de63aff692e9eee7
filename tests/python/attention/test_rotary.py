"""apply_rotary_emb: against a rotation pair by pair in float64."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightvlm.attention.rotary import apply_rotary_emb
from torch import Tensor

from .test_kvcache import turned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tables(positions: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.rand(positions, half) * 6.28
    return angles.cos().to(dtype), angles.sin().to(dtype)


def check(
    found: Tensor, x: Tensor, cos: Tensor, sin: Tensor, positions: list[int], interleaved: bool
) -> None:
    """One sequence (S, H, D): within a rounding of the result."""
    wanted = turned(x, cos, sin, positions, interleaved)
    bound = torch.finfo(x.dtype).eps * (1 + float(wanted.abs().max()) if wanted.numel() else 1)
    assert found.dtype == x.dtype
    assert float((found.double() - wanted).abs().max()) <= bound if found.numel() else True


def test_signature() -> None:
    """Names, order and defaults of flash-attn 2.8."""
    found = {name: one.default for name, one in inspect.signature(apply_rotary_emb).parameters.items()}
    empty = inspect.Parameter.empty
    assert list(found.items()) == [
        ("x", empty), ("cos", empty), ("sin", empty), ("interleaved", False), ("inplace", False),
        ("seqlen_offsets", 0), ("cu_seqlens", None), ("max_seqlen", None),
    ]  # fmt: skip


@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 5),
    half=st.sampled_from([1, 4, 8]),
    interleaved=st.booleans(),
    inplace=st.booleans(),
    each=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_padded(
    batch: int, length: int, half: int, interleaved: bool, inplace: bool, each: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(batch, length, 2, 16).to(dtype)
    cos, sin = tables(9, half)
    offsets = [row % 3 for row in range(batch)] if each else [2] * batch
    given_offsets: Any = torch.tensor(offsets, dtype=torch.int32) if each else 2
    before = x.clone()
    found = apply_rotary_emb(x, cos, sin, interleaved, inplace, given_offsets)
    assert (found is x) == inplace
    assert inplace or torch.equal(x, before)
    for row, first in enumerate(offsets):
        positions = list(range(first, first + length))
        check(found[row], before[row], cos, sin, positions, interleaved)


@given(
    lengths=st.lists(st.integers(0, 4), max_size=4),
    outside=st.integers(0, 2),
    interleaved=st.booleans(),
    inplace=st.booleans(),
)
def test_packed(lengths: list[int], outside: int, interleaved: bool, inplace: bool) -> None:
    """Sequences of no token, and tokens that belong to none, which stay as they are."""
    ends = [sum(lengths[:row]) + outside for row in range(len(lengths) + 1)]
    x = torch.randn(ends[-1] + outside, 2, 16)
    before = x.clone()
    cos, sin = tables(8, 8)
    offsets = torch.tensor([row % 3 for row in range(len(lengths))], dtype=torch.int64)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    found = apply_rotary_emb(x, cos, sin, interleaved, inplace, offsets, cu_seqlens, 4)
    assert (found is x) == inplace
    for row, length in enumerate(lengths):
        part = slice(ends[row], ends[row] + length)
        first = row % 3
        check(found[part], before[part], cos, sin, list(range(first, first + length)), interleaved)
    for part in (slice(0, ends[0]), slice(ends[-1], None)):
        assert torch.equal(found[part], before[part])


def ends(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


PACKED: dict[str, Any] = {"x": torch.randn(5, 2, 16), "max_seqlen": 5}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x": torch.randn(5, 2, 16)}, ValueError, r"x: has shape \(5, 2, 16\), must be \(B, S, H, D\)"),
        ({"x": torch.randn(1, 5, 2, 16).requires_grad_()}, ValueError, "x: requires grad"),
        ({"x": torch.randn(1, 5, 2, 8)}, ValueError, "cos: rotates 16 channels, must be at most 8"),
        ({"sin": torch.randn(6, 4)}, ValueError, r"sin: has shape \(6, 4\), must be \(6, 8\)"),
        ({"seqlen_offsets": 2}, ValueError, "cos: has 6 positions, must have at least 7"),
        ({"seqlen_offsets": -1}, ValueError, "seqlen_offsets: got -1, must be >= 0"),
        (
            {"seqlen_offsets": torch.zeros(2).int()},
            ValueError,
            r"seqlen_offsets: has shape \(2,\), must be \(1,\)",
        ),
        ({"seqlen_offsets": torch.tensor([2])}, ValueError, "cos: has 6 positions, must have at least 7"),
        ({"seqlen_offsets": torch.tensor([-1])}, ValueError, "seqlen_offsets: has -1, must be at least 0"),
        ({"seqlen_offsets": torch.zeros(1)}, TypeError, "seqlen_offsets: has dtype float32, must be int32"),
        ({"max_seqlen": 5}, ValueError, "max_seqlen: must be given with cu_seqlens, and only with it"),
        (PACKED | {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: got list, must be a torch.Tensor"),
        (PACKED | {"cu_seqlens": ends(0, 6)}, ValueError, "max_seqlen: got 5, must be at least 6"),
        (PACKED | {"cu_seqlens": ends(3, 6)}, ValueError, "cu_seqlens: ends at 6, must be at most 5"),
        (PACKED | {"cu_seqlens": ends()}, ValueError, "cu_seqlens: is empty"),
        (PACKED | {"cu_seqlens": ends(0, 5).long()}, TypeError, "cu_seqlens: has dtype int64, must be int32"),
        ({"inplace": "yes"}, TypeError, "inplace: got str, must be a bool"),
        ({"cos": None}, TypeError, "cos: got NoneType, must be a torch.Tensor"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    cos, sin = tables(6, 8)
    with pytest.raises(error, match=message):
        apply_rotary_emb(**{"x": torch.randn(1, 5, 2, 16), "cos": cos, "sin": sin} | options)
