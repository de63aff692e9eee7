"""decode_attention: every tier against float64 and against what the same precision costs plain torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lightvlm_ext
from lightvlm_ext import ops
from lightvlm_ext._kv import PACKED_HEAD_DIMS, KVSegment, PackedKV, packed_row_bytes
from tests.emulation.build import Control
from tests.ops.backends import BACKENDS, CPU, EMULATED, NATIVE, REFERENCE, Backend, emulation_library
from tests.ops.packing import LAYOUTS, in_layout, lens_of, unpack_codes

INF, NAN = math.inf, math.nan
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
Segment = KVSegment | PackedKV


def query_of(batch: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 1, heads, width).to(dtype)


def dense(
    batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype = torch.float32, **bounds: Tensor
) -> KVSegment:
    key, value = (torch.randn(batch, tokens, heads, width).to(dtype) for _ in range(2))
    return KVSegment(key, value, **bounds)


def packed(
    bits: int,
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    *,
    block: int | None = None,
    lens: Tensor | None = None,
) -> PackedKV:
    """Any codes, scales and zeros are a packed cache; these give keys and values of about 1."""
    block = block or max(tokens, 1)
    blocks, levels = -(-tokens // block), 2**bits - 1

    def codes() -> Tensor:
        numbers = torch.randint(0, 256, (batch, heads, tokens, packed_row_bytes(width, bits)))
        numbers[..., -(-width * bits // 8) :] = 0  # past the last channel
        return numbers.to(torch.uint8)

    def channels() -> Tensor:
        return torch.rand(batch, heads, blocks, width)

    token = torch.rand(batch, heads, tokens, 2) * torch.tensor([2 / levels, -1])
    return PackedKV(
        bits=bits,
        head_dim=width,
        block=block,
        key_codes=codes(),
        value_codes=codes(),
        key_scale=(channels() + 0.2) * 3 / levels,
        key_zero=channels() - 2,
        value_channel=channels() * 2 + 0.1,
        value_token=token.half(),
        lens=lens,
    )


def wide(segment: Segment) -> Segment:
    if isinstance(segment, PackedKV):
        return segment
    return dataclasses.replace(segment, key=segment.key.double(), value=segment.value.double())


def dequantised(segment: Segment, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values (B, N, Hkv, D), by the words of the documentation."""
    if isinstance(segment, KVSegment):
        return segment.key, segment.value
    block = torch.arange(segment.tokens) // segment.block
    scale, zero, channel = (
        x.double()[:, :, block] for x in (segment.key_scale, segment.key_zero, segment.value_channel)
    )
    token = segment.value_token.double()
    key = scale * unpack_codes(segment.key_codes, segment.bits, segment.head_dim) + zero
    inner = (
        token[..., :1] * unpack_codes(segment.value_codes, segment.bits, segment.head_dim) + token[..., 1:]
    )
    return key.to(dtype).transpose(1, 2), (channel * inner).to(dtype).transpose(1, 2)


def bounds_of(segment: Segment, row: int) -> tuple[int, int]:
    tokens = segment.tokens if isinstance(segment, PackedKV) else segment.key.shape[1]
    leftpad = None if isinstance(segment, PackedKV) else segment.leftpad
    end = tokens if segment.lens is None else int(segment.lens[row])
    return (0 if leftpad is None else int(leftpad[row])), end


def plain(
    query: Tensor, segments: Sequence[Segment], dtype: torch.dtype, scale: float | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What a user would write: dequantise to `dtype`, attend in it. Returns out, lse and each segment's mass."""
    batch, _, heads, width = query.shape
    out, lse = torch.zeros(query.shape, dtype=dtype), torch.full((batch, heads, 1), -INF, dtype=dtype)
    numbers = [dequantised(segment, dtype) for segment in segments]
    mass = [torch.zeros(batch, key.shape[2], key.shape[1], dtype=torch.float64) for key, _ in numbers]
    for row in range(batch):
        places = [slice(*bounds_of(segment, row)) for segment in segments]
        if not any(place.stop > place.start for place in places):
            continue
        key = torch.cat([key[row, at] for (key, _), at in zip(numbers, places, strict=True)]).to(dtype)
        value = torch.cat([value[row, at] for (_, value), at in zip(numbers, places, strict=True)]).to(dtype)
        group = heads // key.shape[1]
        each_key, each_value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = torch.einsum("hd,nhd->hn", query[row, 0].to(dtype), each_key)
        logits = logits * (width**-0.5 if scale is None else scale)
        weights = logits.softmax(-1)
        out[row, 0] = torch.einsum("hn,nhd->hd", weights, each_value)
        lse[row, :, 0] = logits.logsumexp(-1)
        shares = weights.double().unflatten(0, (-1, group)).mean(1)
        lengths = [place.stop - place.start for place in places]
        for buffer, place, share in zip(mass, places, shares.split(lengths, -1), strict=True):
            buffer[row, :, place] = share
    return out, lse, mass


def buffers(segments: Sequence[Segment], heads: int) -> list[Tensor]:
    shapes = [
        (s.tokens, s.key_codes.shape[0]) if isinstance(s, PackedKV) else (s.key.shape[1], s.key.shape[0])
        for s in segments
    ]
    return [torch.zeros(batch, heads, tokens) for tokens, batch in shapes]


def check(backend: Backend, query: Tensor, segments: Sequence[Segment], heads: int, **options: Any) -> None:
    """Twice the error of plain torch in the query's dtype, and a few roundings; for out, lse and mass."""
    mass = buffers(segments, heads)
    out, lse = backend.decode_attention(query, segments, mass=mass, **options)
    assert out.dtype == query.dtype
    assert out.shape == query.shape
    assert lse.dtype == torch.float32
    assert lse.shape == (query.shape[0], query.shape[2], 1)
    exact = plain(query.double(), [wide(s) for s in segments], torch.float64, **options)
    rough = plain(query, segments, query.dtype, **options)
    empty = exact[1] == -INF
    assert torch.equal(lse == -INF, empty)
    assert (out[:, 0][empty[..., 0]] == 0).all()

    def compare(found: Tensor, precise: Tensor, same: Tensor, step: float) -> None:
        if precise.numel() == 0:
            return
        precise, same = precise.double(), same.double()
        bound = 2 * (same - precise).abs().max() + 4 * step * precise.abs().max()
        assert (found.double() - precise).abs().max() <= bound

    # Roundings of the result, and in fp32 those of sums in another order.
    eps = torch.finfo(query.dtype).eps * (4 if query.dtype == torch.float32 else 1)
    compare(out, exact[0], rough[0], eps / 2)
    compare(lse[~empty], exact[1][~empty], rough[1][~empty], eps / 2)
    for found, precise, same in zip(mass, exact[2], rough[2], strict=True):
        compare(found, precise, same, eps / 2)
    if not segments:
        return
    total = torch.stack([buffer.double().sum(-1) for buffer in mass]).sum(0)
    kept = ~empty.unflatten(1, (heads, -1))[:, :, 0, 0]
    # Weights that are kept for mass have 11 bits where the query has 16.
    near = 1e-5 if query.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(total, kept.double(), rtol=0, atol=near)


# ---- The result ---------------------------------------------------------------------------------


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


# ---- Layouts, bits, order -----------------------------------------------------------------------


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


# ---- Errors -------------------------------------------------------------------------------------

Q, K, P = query_of(2, 4, 64), dense(2, 6, 2, 64), packed(4, 2, 70, 2, 64, block=64)
MASS = [torch.zeros(2, 2, 6), torch.zeros(2, 2, 70)]
SPARSE = K.key.transpose(2, 3).contiguous().transpose(2, 3)


def change(segment: Segment, **changed: Any) -> list[Segment]:
    return [dataclasses.replace(segment, **changed)]


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query: got list"),
    ({"query": Q.int()}, TypeError, "query: has dtype int32, must be float32 or float16 or bfloat16"),
    ({"query": Q[0]}, ValueError, r"query: has shape \(1, 4, 64\), must be \(B, 1, Hq, D\)"),
    ({"query": Q.expand(-1, 2, -1, -1)}, ValueError, r"must be \(B, 1, Hq, D\)"),
    (
        {"query": Q[..., :48], "segments": []},
        ValueError,
        "query: has head width 48, must be one of 32, 64, 80, 96, 128, 192, 256",
    ),
    ({"query": Q[:, :, :3]}, ValueError, "query: has 3 heads, must be .* the segments' heads, 2"),
    ({"query": Q.repeat(1, 1, 1, 2)[..., ::2]}, ValueError, "query: last dimension has stride 2"),
    ({"segments": K}, TypeError, "segments: got KVSegment"),
    ({"segments": [Q]}, TypeError, r"segments\[0\]: got Tensor, must be a KVSegment or PackedKV"),
    ({"segments": [K] * 13}, ValueError, "segments: got 13, must be at most 12"),
    ({"segments": change(K, key=1)}, TypeError, r"segments\[0\].key: got int"),
    ({"segments": change(K, key=K.key.half())}, TypeError, r"segments\[0\].key: has dtype float16"),
    ({"segments": change(K, value=K.value.half())}, TypeError, r"segments\[0\].value: has dtype float16"),
    (
        {"segments": change(K, key=K.key[:1])},
        ValueError,
        r"segments\[0\].key: has shape .* \(2, N, Hkv, 64\)",
    ),
    ({"segments": change(K, value=K.value[:, :3])}, ValueError, r"segments\[0\].value: has shape"),
    ({"segments": change(K, key=SPARSE)}, ValueError, r"segments\[0\].key: last dimension has stride"),
    ({"segments": change(K, key=K.key.to("meta"))}, ValueError, r"segments\[0\].key: is on meta"),
    ({"segments": change(K, lens=lens_of(1))}, ValueError, r"segments\[0\].lens: has shape \(1,\)"),
    ({"segments": change(K, leftpad=torch.zeros(2))}, TypeError, r"segments\[0\].leftpad: has dtype float32"),
    ({"segments": [K, dense(2, 6, 1, 64)]}, ValueError, r"segments\[1\].key: has 1 heads, must have 2"),
    ({"segments": change(P, bits=3)}, ValueError, r"segments\[0\].bits: got 3, must be 8, 4 or 2"),
    ({"segments": change(P, bits=2)}, ValueError, r"segments\[0\].key_codes: has shape"),
    ({"segments": change(P, block=32)}, ValueError, r"segments\[0\].block: got 32, must be a multiple of 64"),
    ({"segments": [K, packed(4, 1, 9, 2, 64)]}, ValueError, r"segments\[1\]: has 1 batch rows"),
    ({"segments": [packed(4, 2, 9, 2, 96)]}, ValueError, r"segments\[0\]: has 2 batch rows of head width 96"),
    ({"mass": MASS[0]}, TypeError, "mass: got Tensor"),
    ({"mass": MASS[:1]}, ValueError, "mass: has 1 entries, must have one for each of 2 segments"),
    ({"mass": [None, MASS[0]]}, ValueError, r"mass\[1\]: has shape \(2, 2, 6\), must be \(2, 2, 70\)"),
    ({"mass": [MASS[0].half(), None]}, TypeError, r"mass\[0\]: has dtype float16, must be float32"),
    ({"mass": [torch.zeros(1, 1, 6).expand(2, 2, 6), None]}, ValueError, r"mass\[0\]: shares memory"),
    ({"segments": [K, K], "mass": [MASS[0], MASS[0]]}, ValueError, r"mass\[1\]: shares memory"),
    ({"scale": NAN}, ValueError, "scale: got nan"),
    ({"scale": "1"}, TypeError, "scale: got str"),
]


@every_backend
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(
    backend: Backend, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        backend.decode_attention(**{"query": Q, "segments": [K, P], **arguments})
    assert all((buffer == 0).all() for buffer in MASS)


BAD_BOUNDS = [([6, 7], [0, 0]), ([6, -1], [0, 0]), ([6, 6], [0, -1]), ([6, 3], [0, 4])]


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=str)
@pytest.mark.parametrize(("lens", "leftpad"), BAD_BOUNDS)
def test_bad_lens_raise_on_the_cpu(backend: Backend, lens: list[int], leftpad: list[int]) -> None:
    (segment,) = change(K, lens=lens_of(*lens), leftpad=lens_of(*leftpad))
    mass = [torch.zeros(2, 2, 70), torch.zeros(2, 2, 6)]
    with pytest.raises(ValueError, match=r"lens, leftpad.*row 1"):
        backend.decode_attention(Q, [P, segment], mass=mass)
    assert all((buffer == 0).all() for buffer in mass)
    with pytest.raises(ValueError, match=r"lens.*row 0"):
        backend.decode_attention(Q, change(P, lens=lens_of(71, 3)))


@pytest.mark.parametrize(("lens", "leftpad"), BAD_BOUNDS)
def test_bad_lens_set_the_device_word_emulated(lens: list[int], leftpad: list[int]) -> None:
    lightvlm_ext.device_errors()
    (segment,) = change(K, lens=lens_of(*lens), leftpad=lens_of(*leftpad))
    (good,) = change(K, lens=lens_of(6, 0))
    mass, expected_mass = ([torch.zeros(2, 2, 6), torch.zeros(2, 2, 70)] for _ in range(2))
    found = EMULATED.decode_attention(Q, [segment, P], mass=mass)
    expected = EMULATED.decode_attention(Q, [good, P], mass=expected_mass)
    for a, b in zip([*found, *mass], [*expected, *expected_mass], strict=True):
        assert torch.equal(a, b)
    (message,) = lightvlm_ext.device_errors()
    assert "decode_attention: lens, leftpad" in message


def test_reference_takes_float64() -> None:
    mass = [torch.zeros(2, 2, 6, dtype=torch.float64), None]
    out, lse = REFERENCE.decode_attention(Q.double(), [wide(K), P], mass=mass)
    assert out.dtype == lse.dtype == torch.float64
    with pytest.raises(TypeError, match="query: has dtype float64"):
        ops.decode_attention(Q.double(), [wide(K), P])
