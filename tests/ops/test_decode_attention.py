"""decode_attention: every tier against float64 and against what the same precision costs plain torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightvlm_ext._kv import PACKED_HEAD_DIMS
from tests.ops.backends import BACKENDS, NATIVE, Backend
from tests.ops.decode_cases import INF, Segment, buffers, check, dense, packed, query_of
from tests.ops.packing import lens_of

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@every_backend
@each_dtype
@pytest.mark.parametrize("width", PACKED_HEAD_DIMS)
def test_every_width_and_format(backend: Backend, width: int, dtype: torch.dtype) -> None:
    segments = [packed(bits, 1, 75, 2, width) for bits in (8, 4, 2)]
    segments.append(dense(1, 37, 2, width, dtype))
    query = query_of(1, 6, width, dtype)
    for segment in segments:
        check(backend, query, [segment], 2)
    check(backend, query, segments, 2)


@every_backend
@pytest.mark.parametrize("group", [1, 4, 6, 7, 8, 12, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups(backend: Backend, group: int, dtype: torch.dtype) -> None:
    segments = [dense(2, 20, 2, 64, dtype), packed(4, 2, 70, 2, 64)]
    check(backend, query_of(2, 2 * group, 64, dtype), segments, 2)


@every_backend
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129])
@pytest.mark.parametrize("bits", [0, 8, 4, 2])
def test_sizes_around_tiles(backend: Backend, tokens: int, bits: int) -> None:
    dtype = torch.float16
    segment = packed(bits, 1, tokens, 1, 128) if bits else dense(1, tokens, 1, 128, dtype)
    check(backend, query_of(1, 3, 128, dtype), [segment], 1)


@every_backend
@pytest.mark.parametrize("bits", [8, 4, 2])
@each_dtype
def test_blocks_of_channel_parameters(backend: Backend, bits: int, dtype: torch.dtype) -> None:
    segment = packed(bits, 2, 200, 2, 64, block=64, lens=lens_of(200, 65))
    # Blocks of very different size.
    segment.key_scale[:, :, 1] *= 8
    segment.value_channel[:, :, 2] *= 50
    check(backend, query_of(2, 4, 64, dtype), [segment], 2)
    check(backend, query_of(2, 4, 64, dtype), [packed(bits, 2, 130, 2, 64, block=128)], 2)


@every_backend
@each_dtype
def test_rows_of_their_own_length(backend: Backend, dtype: torch.dtype) -> None:
    segments = [
        dense(4, 40, 2, 64, dtype, lens=lens_of(40, 0, 17, 5), leftpad=lens_of(3, 0, 16, 5)),
        packed(4, 4, 90, 2, 64, lens=lens_of(90, 0, 64, 0)),
        packed(2, 4, 70, 2, 64, lens=lens_of(1, 0, 70, 0)),
        dense(4, 0, 2, 64, dtype),
        packed(8, 4, 0, 2, 64),
    ]
    check(backend, query_of(4, 6, 64, dtype), segments, 2)


@every_backend
def test_without_any_key(backend: Backend) -> None:
    query = query_of(2, 4, 64)
    nothing = lens_of(0, 0)
    for segments in ([], [dense(2, 0, 2, 64)], [packed(4, 2, 30, 2, 64, lens=nothing)]):
        out, lse = backend.decode_attention(query, segments)
        assert (out == 0).all()
        assert (lse == -INF).all()
    assert backend.decode_attention(query[:0], [dense(0, 3, 2, 64)])[0].shape == (0, 1, 4, 64)
    # Keys there are, but no logit is above -inf.
    segment = dense(2, 3, 4, 64)
    segment.key[..., 0] = -INF
    query[..., 0] = 1
    mass = [torch.zeros(2, 4, 3)]
    out, lse = backend.decode_attention(query, [segment], mass=mass)
    assert (out == 0).all()
    assert (lse == -INF).all()
    assert (mass[0] == 0).all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tokens_are_split(backend: Backend, dtype: torch.dtype) -> None:
    segments = [
        dense(2, 30, 2, 64, dtype),
        packed(4, 2, 1500, 2, 64, lens=lens_of(1500, 700)),
        packed(2, 2, 1000, 2, 64),
        dense(2, 100, 2, 64, dtype, lens=lens_of(77, 0)),
    ]
    for query in (query_of(2, 14, 64, dtype), query_of(2, 20, 64, dtype)):
        check(backend, query, segments, 2)


@every_backend
def test_scale(backend: Backend) -> None:
    segments = [dense(1, 30, 1, 64), packed(4, 1, 40, 1, 64)]
    for scale in (0.3, -0.1, 0.0):
        check(backend, query_of(1, 4, 64), segments, 1, scale=scale)


@every_backend
@each_dtype
def test_huge_and_tiny_numbers(backend: Backend, dtype: torch.dtype) -> None:
    # One key decides, by far; its neighbours' weights vanish.
    query, segment = query_of(1, 4, 64, dtype), dense(1, 40, 1, 64, dtype)
    segment.key.mul_(40)
    mixed = packed(4, 1, 90, 1, 64)
    mixed.key_scale.mul_(60)
    check(backend, query, [segment, mixed], 1)
    # Scales of any size that float16 has, up and down within a tile and between tiles.
    mixed = packed(4, 1, 130, 1, 64)
    mixed.value_token[0, 0, 70:, 0] = torch.logspace(-6, 4, 60).half()
    mixed.key_scale[..., 5] = 1e-30
    mixed.key_scale[..., 7] = 0
    check(backend, query, [mixed], 1)
    mixed.key_scale.zero_()
    mixed.value_token[..., 0] = 0
    check(backend, query, [mixed], 1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, list[Segment], int]:
    torch.manual_seed(draw(st.integers(0, 1000)))
    batch, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 9))
    width = draw(st.sampled_from([32, 64, 80, 96]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    segments: list[Segment] = []
    for bits in draw(st.lists(st.sampled_from([0, 0, 8, 4, 2]), max_size=4)):
        tokens = draw(st.integers(0, 140))
        lens = None
        if draw(st.booleans()):
            lens = torch.randint(0, tokens + 1, (batch,), dtype=torch.int32)
        if bits:
            block = draw(st.sampled_from([None, 64, 128, 1000]))
            segments.append(packed(bits, batch, tokens, heads, width, block=block, lens=lens))
            continue
        segment = dense(batch, tokens, heads, width, dtype)
        if draw(st.booleans()):
            ends = torch.full((batch,), tokens) if lens is None else lens
            pad = (torch.rand(batch) * (ends + 1)).to(torch.int32)
            segment = dataclasses.replace(segment, leftpad=pad)
        segments.append(dataclasses.replace(segment, lens=lens))
    # Without segments the key heads are the query's.
    heads, group = (heads, group) if segments else (heads * group, 1)
    return query_of(batch, heads * group, width, dtype), segments, heads


@native_backend
@given(case=cases())
def test_any_mixture(backend: Backend, case: tuple[Tensor, list[Segment], int]) -> None:
    query, segments, heads = case
    check(backend, query, segments, heads)


@every_backend
def test_mass_is_added_to_what_is_there(backend: Backend) -> None:
    query = query_of(2, 6, 64)
    segments = [dense(2, 20, 2, 64, lens=lens_of(12, 20)), packed(4, 2, 70, 2, 64), dense(2, 9, 2, 64)]
    fresh = buffers(segments, 2)
    backend.decode_attention(query, segments, mass=fresh)
    # Room between the rows, other numbers in it, and a segment that nobody asks about.
    storage = torch.full((2, 3, 80), 7.0)
    mass = [torch.full((2, 2, 20), 0.25), storage[:, 1:, 4:74], None]
    backend.decode_attention(query, segments, mass=mass)
    torch.testing.assert_close(mass[0], fresh[0] + 0.25)
    assert (mass[0][0, :, 12:] == 0.25).all()
    torch.testing.assert_close(mass[1], fresh[1] + 7)
    storage[:, 1:, 4:74] = 7
    assert (storage == 7).all()
