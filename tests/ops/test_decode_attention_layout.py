"""decode_attention: strides, what stays out of a result, bits and launches."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext._kv import KVSegment, PackedKV
from lightvlm_ext.ops.decode_attention import decode_attention_checked
from tests.emulation.build import Control
from tests.ops.backends import BACKENDS, CPU, EMULATED, NATIVE, Backend, emulation_library
from tests.ops.decode_cases import INF, NAN, Segment, bounds_of, buffers, dense, packed, query_of
from tests.ops.decode_pages import in_pages
from tests.ops.packing import LAYOUTS, in_layout, lens_of

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def packed_layout(segment: PackedKV, how: str) -> PackedKV:
    """The same segment with codes and value_token somewhere else."""

    def moved(x: Tensor) -> Tensor:
        batch, heads, tokens, row = x.shape
        if how == "tokens first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        spare = {"unaligned": 1, "aligned to 4": 4, "aligned to 8": 8}[how] if x.dtype == torch.uint8 else 1
        storage = torch.full((batch, heads, tokens, row + 2 * spare), 255).to(x.dtype)
        storage[..., spare:-spare] = x
        return storage[..., spare:-spare]

    names = ("key_codes", "value_codes", "value_token")
    return dataclasses.replace(segment, **{name: moved(getattr(segment, name)) for name in names})


@every_backend
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("width", [32, 80, 128])
def test_strides_of_codes(backend: Backend, bits: int, width: int) -> None:
    query, segment = query_of(2, 4, width, torch.float16), packed(bits, 2, 70, 2, width)
    expected = backend.decode_attention(query, [segment])
    for how in ("tokens first", "unaligned", "aligned to 4", "aligned to 8"):
        found = backend.decode_attention(query, [packed_layout(segment, how)])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), how


@native_backend
@each_dtype
@pytest.mark.parametrize("width", [64, 80])
def test_strides_of_keys_and_values(backend: Backend, dtype: torch.dtype, width: int) -> None:
    query, segment = query_of(2, 4, width, dtype), dense(2, 40, 2, width, dtype, lens=lens_of(40, 33))
    expected = backend.decode_attention(query, [segment])
    heads_last = torch.full((2, 1, 4, width + 5), NAN, dtype=dtype)[..., 2:-3].copy_(query)
    for key_layout, value_layout in zip(LAYOUTS, reversed(LAYOUTS), strict=True):
        key, value = in_layout(segment.key, key_layout), in_layout(segment.value, value_layout)
        other = dataclasses.replace(segment, key=key, value=value)
        found = backend.decode_attention(heads_last, [other])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), key_layout


@every_backend
def test_one_buffer_for_all_rows(backend: Backend) -> None:
    segment = packed(4, 1, 40, 2, 64)
    shared = {
        name: getattr(segment, name).expand(3, -1, -1, -1)
        for name in ("key_codes", "value_codes", "key_scale", "key_zero", "value_channel", "value_token")
    }
    query = query_of(1, 4, 64).expand(3, -1, -1, -1)
    out, _ = backend.decode_attention(query, [dataclasses.replace(segment, **shared)])
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


@native_backend
def test_what_lies_outside_is_not_looked_at(backend: Backend) -> None:
    query = query_of(2, 4, 64, torch.float16)
    segment = dense(2, 40, 2, 64, torch.float16, lens=lens_of(33, 17), leftpad=lens_of(2, 17))
    codes = packed(4, 2, 70, 2, 64, lens=lens_of(65, 0))
    clean = backend.decode_attention(query, [segment, codes])
    for row in range(2):
        for number in (segment, codes):
            begin, end = bounds_of(number, row)
            if isinstance(number, PackedKV):
                number.value_token[row, :, end:] = NAN
                number.key_codes[row, :, end:] = 255
            else:
                for x in (number.key, number.value):
                    x[row, :begin], x[row, end:] = NAN, INF
    found = backend.decode_attention(query, [segment, codes])
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


@every_backend
@each_dtype
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_stays_in_its_batch_row(backend: Backend, dtype: torch.dtype, bad: float) -> None:
    query = query_of(3, 4, 64, dtype)
    segments = [dense(3, 40, 2, 64, dtype), packed(4, 3, 70, 2, 64)]
    clean = backend.decode_attention(query, segments)
    first, second = segments
    assert isinstance(first, KVSegment)
    assert isinstance(second, PackedKV)
    for spoil in (query[1, 0, 3], first.key[1, 11, 1], first.value[1, 39, 1], second.value_token[1, 1, 68]):
        before = spoil.clone()
        spoil[0] = bad
        mass = buffers(segments, 2)
        out, lse = backend.decode_attention(query, segments, mass=mass)
        spoil.copy_(before)
        assert torch.equal(out[[0, 2]], clean[0][[0, 2]])
        assert torch.equal(lse[[0, 2]], clean[1][[0, 2]])
        assert all(buffer[[0, 2]].isfinite().all() for buffer in mass)
        assert not out[1].isfinite().all()


@native_backend
def test_rows_of_a_batch_are_the_rows_alone(backend: Backend) -> None:
    # Few tokens, so that no row is split: then to the bit.
    query = query_of(3, 6, 64)
    segments = [dense(3, 30, 2, 64), packed(4, 3, 90, 2, 64, block=64)]
    together, lse = backend.decode_attention(query, segments)
    for row in range(3):
        alone = [
            dataclasses.replace(
                s,
                **{
                    f.name: getattr(s, f.name)[row : row + 1]
                    for f in dataclasses.fields(s)
                    if isinstance(getattr(s, f.name), Tensor)
                },
            )
            for s in segments
        ]
        out, own = backend.decode_attention(query[row : row + 1], alone)
        assert torch.equal(out[0], together[row])
        assert torch.equal(own[0], lse[row])


def large_case() -> tuple[Tensor, list[Segment]]:
    segments = [dense(2, 30, 2, 64), packed(4, 2, 1300, 2, 64), packed(2, 2, 900, 2, 64, block=64)]
    return query_of(2, 20, 64), segments


def everything(backend: Backend, query: Tensor, segments: list[Segment]) -> list[Tensor]:
    mass = buffers(segments, 2)
    return [*backend.decode_attention(query, segments, mass=mass), *mass]


def test_result_does_not_depend_on_threads() -> None:
    query, segments = large_case()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything(CPU, query, segments)
        for count in (2, 5):
            torch.set_num_threads(count)
            found = everything(CPU, query, segments)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_result_does_not_depend_on_the_order_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, segments = large_case()
    expected = everything(EMULATED, query, segments)
    for seed in ("0", "7", "1234"):
        monkeypatch.setenv("LIGHTVLM_EMULATION_SEED", seed)
        found = everything(EMULATED, query, segments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_launches() -> None:
    query, segments = large_case()
    control = Control(emulation_library())
    names = ("decode_attention", "decode_mass")

    def launches(**options: Any) -> list[int]:
        before = [control.launch_count(name) for name in names]
        EMULATED.decode_attention(query, segments, **options)
        return [control.launch_count(n) - b for n, b in zip(names, before, strict=True)]

    assert launches() == [1, 0]
    assert launches(mass=buffers(segments, 2)) == [1, 1]
    assert launches(mass=[None] * 3) == [1, 0]


def test_opcheck() -> None:
    _, segments = large_case()
    first, second, _ = segments
    assert isinstance(first, KVSegment)
    assert isinstance(second, PackedKV)
    ops.decode_attention(query_of(2, 4, 64), segments)  # loads the library
    arguments = (
        query_of(2, 4, 64),
        [first.key, second.key_codes],
        [first.value, second.value_codes],
        [0, 4],
        [0, second.block],
        [lens_of(3, 30), None],
        [lens_of(3, 1), None],
        [None, None],
        [None, second.key_scale],
        [None, second.key_zero],
        [None, second.value_channel],
        [None, second.value_token],
        0.5,
        [torch.zeros(2, 2, 1300)],
        [1],
        torch.empty(2, 1, 4, 64),
        torch.empty(2, 4, 1),
        None,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.lightvlm.decode_attention.default, arguments)


@native_backend
def test_the_way_in_without_checks(backend: Backend) -> None:
    segments: list[Segment] = [
        packed(4, 2, 90, 2, 64, lens=lens_of(90, 7)),
        dense(2, 33, 2, 64, torch.bfloat16, lens=lens_of(33, 2), leftpad=lens_of(1, 0)),
        in_pages(16, 2, 64, torch.bfloat16, lens=[40, 0]),
    ]
    query = query_of(2, 6, 64, torch.bfloat16)
    mass: list[list[Tensor | None]] = [[*buffers(segments, 2)] for _ in range(2)]
    mass[0][1] = mass[1][1] = None
    found = backend._wrap(decode_attention_checked)(query, segments, 0.2, mass[0])
    wanted = backend.decode_attention(query, segments, scale=0.2, mass=mass[1])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for one, other in zip(*mass, strict=True):
        assert one is other is None or torch.equal(one, other)
