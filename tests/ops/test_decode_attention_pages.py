"""decode_attention over pages: as over the same tokens in a piece, and nothing else is looked at."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lightvlm_ext
from lightvlm_ext import ops
from lightvlm_ext._kv import PACKED_HEAD_DIMS, KVSegment
from tests.emulation.build import Control
from tests.ops.backends import BACKENDS, CPU, EMULATED, NATIVE, REFERENCE, Backend, emulation_library
from tests.ops.decode_cases import INF, Segment, buffers, check, dense, packed, query_of
from tests.ops.decode_pages import LAYOUTS, in_pages, same, unpaged
from tests.ops.packing import lens_of

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
each_size = pytest.mark.parametrize("size", [16, 48, 256])


def everything(backend: Backend, query: Tensor, segments: list[Segment], heads: int) -> list[Tensor]:
    mass = buffers(segments, heads)
    return [*backend.decode_attention(query, segments, mass=mass), *mass]


@every_backend
@each_dtype
@pytest.mark.parametrize("width", PACKED_HEAD_DIMS)
def test_every_width(backend: Backend, width: int, dtype: torch.dtype) -> None:
    segment = in_pages(32, 2, width, dtype, lens=[75, 33], leftpad=[0, 17])
    check(backend, query_of(2, 6, width, dtype), [segment], 2)


@every_backend
@each_size
@each_dtype
def test_lengths_around_pages(backend: Backend, size: int, dtype: torch.dtype) -> None:
    lens = [0, 1, size - 1, size, size + 1, 2 * size, 2 * size + 7]
    segment = in_pages(size, 1, 64, dtype, lens=lens)
    check(backend, query_of(len(lens), 3, 64, dtype), [segment], 1)
    leftpad = [0, 0, size - 2, size, 3, size - 1, 2 * size + 6]
    padded = in_pages(size, 1, 64, dtype, lens=lens, leftpad=leftpad)
    check(backend, query_of(len(lens), 3, 64, dtype), [padded], 1)


@every_backend
@pytest.mark.parametrize("group", [1, 7, 8, 9, 17])
def test_groups(backend: Backend, group: int) -> None:
    segment = in_pages(16, 2, 64, torch.bfloat16, lens=[40, 19])
    check(backend, query_of(2, 2 * group, 64, torch.bfloat16), [segment], 2)


@every_backend
@each_dtype
def test_among_other_segments(backend: Backend, dtype: torch.dtype) -> None:
    segments = [
        in_pages(16, 2, 64, dtype, lens=[40, 0], leftpad=[5, 0]),
        packed(4, 2, 90, 2, 64, lens=lens_of(90, 7)),
        dense(2, 33, 2, 64, dtype, lens=lens_of(33, 2)),
        in_pages(80, 2, 64, dtype, lens=[200, 81]),
        packed(2, 2, 70, 2, 64),
    ]
    check(backend, query_of(2, 6, 64, dtype), segments, 2)


@every_backend
def test_all_twelve_segments_in_pages(backend: Backend) -> None:
    segments = [in_pages(16 * (1 + i % 3), 1, 32, torch.float16, lens=[i, 20 - i]) for i in range(12)]
    check(backend, query_of(2, 4, 32, torch.float16), segments, 1)


@every_backend
def test_without_pages_or_tokens(backend: Backend) -> None:
    query = query_of(2, 4, 64)
    for segment in (
        in_pages(16, 2, 64, torch.float32, lens=[0, 0], blocks=0, pages=3),
        in_pages(16, 2, 64, torch.float32, lens=[0, 0], blocks=2, pages=0),
        in_pages(16, 2, 64, torch.float32, lens=[9, 32], leftpad=[9, 32], blocks=2),
    ):
        out, lse = backend.decode_attention(query, [segment])
        assert (out == 0).all()
        assert (lse == -INF).all()


@every_backend
def test_rows_of_one_prefix(backend: Backend) -> None:
    segment = in_pages(16, 2, 64, torch.float16, lens=[40, 40, 35], blocks=3, pages=5)
    table = torch.tensor([[3, 1, 4], [3, 1, 0], [3, 1, 0]], dtype=torch.int32)
    key, value = (torch.randn(5, 16, 2, 64).half() for _ in range(2))
    segment = dataclasses.replace(segment, key=key, value=value, block_table=table)
    query = query_of(1, 4, 64, torch.float16).expand(3, -1, -1, -1)
    check(backend, query, [segment], 2)
    shared = dataclasses.replace(segment, lens=lens_of(32, 32, 32))
    out, _ = backend.decode_attention(query, [shared])
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


@every_backend
def test_without_lens_all_tokens_are_valid(backend: Backend) -> None:
    segment = in_pages(48, 2, 64, torch.float32, lens=[96, 96], blocks=2)
    query = query_of(2, 4, 64)
    expected = everything(backend, query, [segment], 2)
    assert segment.tokens == 96
    assert same(everything(backend, query, [dataclasses.replace(segment, lens=None)], 2), expected)


@native_backend
@each_dtype
@pytest.mark.parametrize("width", [64, 80])
def test_strides_of_pages_and_tables(backend: Backend, dtype: torch.dtype, width: int) -> None:
    query = query_of(2, 4, width, dtype)
    for layout in LAYOUTS:
        segment = in_pages(16, 2, width, dtype, lens=[40, 33], leftpad=[3, 0], layout=layout)
        table = segment.block_table
        assert table is not None
        wider = torch.cat([table, table.new_full((2, 5), -7)], 1)[:, : table.shape[1]]
        expected = everything(backend, query, [unpaged(segment)], 2)
        assert same(everything(backend, query, [segment], 2), expected), layout
        strided = dataclasses.replace(segment, block_table=wider)
        assert same(everything(backend, query, [strided], 2), expected), layout


@native_backend
@each_dtype
def test_long_rows(backend: Backend, dtype: torch.dtype) -> None:
    """Splits of a row, and on the CPU items and spans that go on with the rows fetched ahead."""
    segment = in_pages(48, 2, 64, dtype, lens=[1700, 900, 257], leftpad=[0, 130, 256])
    query = query_of(3, 20, 64, dtype)
    expected = everything(backend, query, [unpaged(segment)], 2)
    assert same(everything(backend, query, [segment], 2), expected)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, list[Segment], int]:
    torch.manual_seed(draw(st.integers(0, 1000)))
    batch, heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 9))
    width = draw(st.sampled_from([32, 64, 80, 96]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    segments: list[Segment] = []
    for kind in ["pages", *draw(st.lists(st.sampled_from(["pages", "dense", "codes"]), max_size=2))]:
        if kind == "codes":
            segments.append(packed(draw(st.sampled_from([8, 4, 2])), batch, 70, heads, width))
        elif kind == "dense":
            segments.append(dense(batch, 21, heads, width, dtype))
        else:
            size = 16 * draw(st.integers(1, 16))
            lens = draw(st.lists(st.integers(0, 3 * size), min_size=batch, max_size=batch))
            leftpad = [draw(st.integers(0, n)) for n in lens] if draw(st.booleans()) else None
            layout = draw(st.sampled_from(LAYOUTS))
            segments.append(
                in_pages(size, heads, width, dtype, lens=lens, leftpad=leftpad, blocks=4, layout=layout)
            )
    return query_of(batch, heads * group, width, dtype), segments, heads


@native_backend
@given(case=cases())
def test_pages_are_the_same_tokens_in_a_piece(
    backend: Backend, case: tuple[Tensor, list[Segment], int]
) -> None:
    """To the bit: how work is shared depends on the tokens alone."""
    query, segments, heads = case
    pieces = [
        unpaged(one) if isinstance(one, KVSegment) and one.block_table is not None else one
        for one in segments
    ]
    assert same(everything(backend, query, segments, heads), everything(backend, query, pieces, heads))


def wrong_table(page: int, block: int) -> KVSegment:
    """Three rows in six pages, of which the second names one that is not there."""
    segment = in_pages(16, 2, 64, torch.float32, lens=[40, 48, 5], leftpad=[0, 17, 0], blocks=4, pages=6)
    table = segment.block_table
    assert table is not None
    table[1, block] = page
    return segment


WRONG = [(6, 1), (-1, 1), (2**31 - 1, 2), (-(2**31), 2)]


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)
@pytest.mark.parametrize(("page", "block"), WRONG)
def test_pages_out_of_range_raise_on_the_cpu(backend: Backend, page: int, block: int) -> None:
    segments = [packed(4, 3, 70, 2, 64), wrong_table(page, block)]
    mass = buffers(segments, 2)
    with pytest.raises(ValueError, match=r"block_table.*row 1.*must be in|block_table.*outside.*row 1"):
        backend.decode_attention(query_of(3, 4, 64), segments, mass=mass)
    assert all((buffer == 0).all() for buffer in mass)


@pytest.mark.parametrize(("page", "block"), WRONG)
def test_pages_out_of_range_set_the_device_word_emulated(page: int, block: int) -> None:
    lightvlm_ext.device_errors()
    query, wrong, codes = query_of(3, 4, 64), wrong_table(page, block), packed(4, 3, 70, 2, 64)
    without = dataclasses.replace(wrong, lens=lens_of(40, 0, 5), leftpad=None)
    found = everything(EMULATED, query, [wrong, codes], 2)
    assert same(found, everything(EMULATED, query, [without, codes], 2))
    assert (found[2][1] == 0).all()
    assert (found[2][0].sum(-1) > 0).all()
    (message,) = lightvlm_ext.device_errors()
    assert "decode_attention: block_table: a page in use lies outside" in message
    # Alone, the row has no key.
    out, lse = EMULATED.decode_attention(query, [wrong])
    assert (out[1] == 0).all()
    assert (lse[1] == -INF).all()
    assert lse[[0, 2]].isfinite().all()
    assert len(lightvlm_ext.device_errors()) == 1


def test_a_page_out_of_range_far_into_the_table() -> None:
    """Further than a block has threads."""
    lightvlm_ext.device_errors()
    segment = in_pages(16, 1, 32, torch.float16, lens=[2500, 2500], blocks=160)
    query = query_of(2, 1, 32, torch.float16)
    assert segment.block_table is not None
    segment.block_table[0, 2500 // 16] = len(segment.key)
    with pytest.raises(ValueError, match=r"block_table.*row 0, position 156"):
        CPU.decode_attention(query, [segment])
    out, lse = EMULATED.decode_attention(query, [segment])
    assert (out[0] == 0).all()
    assert lse.isfinite().flatten().tolist() == [False, True]
    assert len(lightvlm_ext.device_errors()) == 1


def test_launches() -> None:
    control = Control(emulation_library())
    segments: list[Segment] = [in_pages(16, 2, 64, torch.bfloat16, lens=[700, 40])]
    query = query_of(2, 6, 64, torch.bfloat16)

    def launches(**options: Any) -> list[int]:
        before = [control.launch_count(name) for name in ("decode_attention", "decode_mass")]
        EMULATED.decode_attention(query, segments, **options)
        after = [control.launch_count(name) for name in ("decode_attention", "decode_mass")]
        return [b - a for a, b in zip(before, after, strict=True)]

    assert launches() == [1, 0]
    assert launches(mass=buffers(segments, 2)) == [1, 1]


def test_opcheck() -> None:
    segment = in_pages(16, 2, 64, torch.float32, lens=[40, 33], leftpad=[3, 0])
    query = query_of(2, 4, 64)
    ops.decode_attention(query, [segment])  # loads the library
    nothing = [None]
    arguments = (
        query,
        [segment.key],
        [segment.value],
        [0],
        [0],
        [segment.lens],
        [segment.leftpad],
        [segment.block_table],
        *[nothing] * 4,
        0.5,
        [torch.zeros(2, 2, segment.tokens)],
        [0],
        torch.empty(2, 1, 4, 64),
        torch.empty(2, 4, 1),
        None,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.lightvlm.decode_attention.default, arguments)
