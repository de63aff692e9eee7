"""dequantize_kv: every tier against numbers read off the bits by the definition, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.backends import BACKENDS, NATIVE, Backend
from ops.packing import DTYPES, fields, same_bits, unpack_codes
from torch import Tensor

import lightvlm_ext
from lightvlm_ext import _library, ops, reference
from lightvlm_ext._kv import PACKED_BITS, PACKED_HEAD_DIMS, PackedKV, empty_packed

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)


def random_packed(
    batch: int, tokens: int, heads: int, width: int, bits: int, block: int, lens: Tensor | None
) -> PackedKV:
    """Any bits for codes, also where a row is padded; other numbers than quantize_kv would make."""
    packed = empty_packed(torch.empty(batch, tokens, heads, width), bits=bits, block=block, lens=lens)
    for codes in (packed.key_codes, packed.value_codes):
        codes.random_(0, 256)
    for channel in (packed.key_scale, packed.key_zero, packed.value_channel, packed.value_token):
        channel.normal_()
    return packed


def by_definition(packed: PackedKV) -> tuple[Tensor, Tensor]:
    block = torch.arange(packed.tokens) // packed.block
    scale, zero, channel = (
        x[:, :, block].double() for x in (packed.key_scale, packed.key_zero, packed.value_channel)
    )
    key_code, value_code = (
        unpack_codes(codes, packed.bits, packed.head_dim).double()
        for codes in (packed.key_codes, packed.value_codes)
    )
    token = packed.value_token.double()
    key = scale * key_code + zero
    value = channel * (token[..., :1] * value_code + token[..., 1:])
    if packed.lens is not None:
        past = torch.arange(packed.tokens) >= packed.lens[:, None]
        key[past[:, None].expand(key.shape[:3])] = 0
        value[past[:, None].expand(key.shape[:3])] = 0
    return key.transpose(1, 2), value.transpose(1, 2)


@every_backend
@given(
    sizes=st.tuples(
        st.integers(1, 2),
        st.sampled_from([0, 1, 63, 64, 65, 150]),
        st.integers(1, 3),
        st.sampled_from(PACKED_HEAD_DIMS),
    ),
    bits=st.sampled_from(PACKED_BITS),
    block=st.sampled_from([64, 128, 1000]),
    share=st.one_of(st.none(), st.floats(0, 1)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_matches_the_definition(
    backend: Backend,
    sizes: tuple[int, int, int, int],
    bits: int,
    block: int,
    share: float | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch, tokens = sizes[:2]
    lens = None
    if share is not None:
        lens = torch.tensor([tokens, int(share * tokens)][:batch], dtype=torch.int32)
    packed = random_packed(*sizes, bits, block, lens)
    found = backend.dequantize_kv(packed, dtype)
    again = reference.dequantize_kv(packed, dtype)
    unit = torch.finfo(dtype).eps
    for ours, theirs, wanted, code in zip(
        found, again, by_definition(packed), (packed.key_codes, packed.value_codes), strict=True
    ):
        assert ours.shape == wanted.shape
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert same_bits(ours, theirs)
        # One rounding of the result, and of a value's sum in fp32 before it is scaled.
        slack = torch.finfo(dtype).smallest_normal * unit
        if code is packed.value_codes and wanted.numel():
            slack += float(packed.value_channel.abs().amax()) * 2**-20
        assert bool(((ours.double() - wanted).abs() <= wanted.abs() * unit + slack).all())


@every_backend
def test_float16_overflows_to_infinity(backend: Backend) -> None:
    packed = random_packed(1, 3, 1, 32, 8, 64, None)
    packed.key_scale.fill_(0)
    packed.key_zero.fill_(1e6)
    key, _ = backend.dequantize_kv(packed, torch.float16)
    assert bool(key.isposinf().all())


@every_backend
def test_lens_out_of_range(backend: Backend) -> None:
    for wrong in (-1, 10, 2**31 - 1):
        packed = random_packed(2, 9, 2, 64, 4, 64, torch.tensor([4, wrong], dtype=torch.int32))
        if not backend.is_device:
            with pytest.raises(ValueError, match="lens"):
                backend.dequantize_kv(packed, torch.float32)
            continue
        lightvlm_ext.device_errors()
        found = backend.dequantize_kv(packed, torch.float32)
        assert any("lens" in error for error in lightvlm_ext.device_errors())
        wanted = by_definition(dataclasses.replace(packed, lens=torch.tensor([4, 0], dtype=torch.int32)))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs.float())


GOOD = empty_packed(torch.empty(2, 70, 3, 32), bits=4, block=64)
BAD: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"bits": 3}, ValueError, "packed.bits: got 3, must be 8, 4 or 2"),
    ({"head_dim": 48}, ValueError, "packed.head_dim: got 48, must be one of 32, 64, 80"),
    ({"block": 32}, ValueError, "packed.block: got 32, must be a multiple of 64, or at least the 70 tokens"),
    ({"block": 0}, ValueError, "packed.block: got 0, must be >= 1"),
    ({"key_codes": 1}, TypeError, "packed.key_codes: got int"),
    (
        {"key_codes": GOOD.key_codes[..., :8]},
        ValueError,
        r"packed.key_codes: has shape .* must be \(B, Hkv, N, 16\)",
    ),
    (
        {"value_codes": GOOD.value_codes[:, :, 1:]},
        ValueError,
        r"packed.value_codes: .* must be \(2, 3, 70, 16\)",
    ),
    (
        {"value_codes": GOOD.value_codes.int()},
        TypeError,
        "packed.value_codes: has dtype int32, must be uint8",
    ),
    ({"key_scale": GOOD.key_scale[:, :, :1]}, ValueError, r"packed.key_scale: .* must be \(2, 3, 2, 32\)"),
    ({"key_zero": GOOD.key_zero.half()}, TypeError, "packed.key_zero: has dtype float16, must be float32"),
    (
        {"value_channel": GOOD.value_channel.mT.contiguous().mT},
        ValueError,
        "packed.value_channel: last dimension",
    ),
    ({"value_token": GOOD.value_token.float()}, TypeError, "packed.value_token: has dtype float32"),
    (
        {"lens": torch.zeros(3, dtype=torch.int32)},
        ValueError,
        r"packed.lens: has shape \(3,\), must be \(2,\)",
    ),
    ({"lens": torch.zeros(2)}, TypeError, "packed.lens: has dtype float32, must be int32"),
]


@every_backend
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_packed(
    backend: Backend, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        backend.dequantize_kv(dataclasses.replace(GOOD, **change), torch.float32)


@every_backend
def test_bad_dtype(backend: Backend) -> None:
    for wrong, message in (
        ("float32", "dtype: got str, must be a torch.dtype"),
        (torch.int8, "dtype: got int8"),
    ):
        with pytest.raises(TypeError, match=message):
            backend.dequantize_kv(GOOD, wrong)
    with pytest.raises(TypeError, match="packed: got Tensor, must be a PackedKV"):
        backend.dequantize_kv(torch.zeros(1), torch.float32)


@native_backend
def test_raw_op_checks_what_memory_needs(backend: Backend) -> None:
    key, value = torch.empty(2, 70, 3, 32), torch.empty(2, 70, 3, 32)
    packed = random_packed(2, 70, 3, 32, 4, 64, None)
    good = [*fields(packed).values(), None, 4, 64, key, value, None]
    op = backend.raw("dequantize_kv")
    op(*good)
    for position, wrong in (
        (0, packed.key_codes[..., :8]), (1, packed.value_codes[:1]), (2, packed.key_scale[:, :, :1]),
        (5, packed.value_token.float()), (6, torch.zeros(1, dtype=torch.int32)), (7, 5), (8, 0), (8, 32),
        (9, key[:, :69]), (9, key.double()), (10, value[..., :16]), (10, value.half()),
        (9, torch.empty(2, 70, 3, 64)[..., ::2]),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            op(*(wrong if i == position else one for i, one in enumerate(good)))


@native_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_op_writes_to_any_strides(backend: Backend, dtype: torch.dtype) -> None:
    """Into a cache: between the rows that it is given, nothing changes."""
    packed = random_packed(2, 70, 3, 64, 4, 64, None)
    for width in (64, 72, 67):
        wide = torch.full((2, 2, 3, 75, width), 7, dtype=dtype)
        key, value = (wide[i, :, :, 3:-2, :64].transpose(1, 2) for i in range(2))
        backend.raw("dequantize_kv")(*fields(packed).values(), None, 4, 64, key, value, None)
        for ours, theirs in zip((key, value), reference.dequantize_kv(packed, dtype), strict=True):
            assert same_bits(ours, theirs)
        assert bool((wide[..., :3, :] == 7).all() and (wide[..., -2:, :] == 7).all())
        assert bool((wide[..., 64:] == 7).all())


def test_opcheck() -> None:
    _library.load()
    packed = random_packed(2, 70, 2, 80, 2, 64, torch.tensor([3, 70], dtype=torch.int32))
    key, value = torch.empty(2, 70, 2, 80), torch.empty(2, 70, 2, 80)
    arguments = (*fields(packed).values(), 2, 64, key, value, None)
    torch.library.opcheck(torch.ops.lightvlm.dequantize_kv.default, arguments)


def test_result_does_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    packed = random_packed(2, 1500, 4, 64, 4, 256, None)
    wanted = reference.dequantize_kv(packed, torch.bfloat16)
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            for ours, theirs in zip(ops.dequantize_kv(packed, torch.bfloat16), wanted, strict=True):
                assert same_bits(ours, theirs)
    finally:
        torch.set_num_threads(threads)
