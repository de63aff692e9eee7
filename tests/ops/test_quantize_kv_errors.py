"""quantize_kv: what it refuses, and what it does with values that are wrong."""

from __future__ import annotations

import pytest
import torch
from ops.backends import BACKENDS, NATIVE, Backend
from ops.packing import DTYPES, check_same, fields, lens_of, same_bits

import lightvlm_ext
from lightvlm_ext import reference
from lightvlm_ext._kv import empty_packed

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [70, 300])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(backend: Backend, dtype: torch.dtype, tokens: int, number: float) -> None:
    for name in ("key", "value"):
        for channel in (0, 37, 79):
            given = {which: torch.randn(2, tokens, 2, 80).to(dtype) for which in ("key", "value")}
            given[name][1, 66, 1, channel] = number
            if not backend.is_device:
                where = rf"{name}: row 1, token 66, head 1, channel {channel} is -?(nan|inf), must be finite"
                storage = empty_packed(given["key"], bits=4, block=tokens)
                before = {name: tensor.clone() for name, tensor in fields(storage).items()}
                with pytest.raises(ValueError, match=where):
                    backend.quantize_kv_(storage, **given)
                assert all(same_bits(t, before[n]) for n, t in fields(storage).items())
                continue
            lightvlm_ext.device_errors()
            packed = backend.quantize_kv(**given, bits=4)
            assert any("NaN or infinite" in error for error in lightvlm_ext.device_errors())
            given[name][1, 66, 1, channel] = 0
            check_same(packed, reference.quantize_kv(**given, bits=4))
            assert not lightvlm_ext.device_errors()


@every_backend
def test_lens_out_of_range(backend: Backend) -> None:
    key, value = torch.randn(2, 9, 1, 32), torch.randn(2, 9, 1, 32)
    for wrong in (-1, 10, 2**31 - 1, -(2**31)):
        lens = lens_of(4, wrong)
        if not backend.is_device:
            with pytest.raises(ValueError, match="lens"):
                backend.quantize_kv(key, value, bits=4, lens=lens)
            continue
        lightvlm_ext.device_errors()
        packed = backend.quantize_kv(key, value, bits=4, lens=lens)
        assert any("lens" in error for error in lightvlm_ext.device_errors())
        wanted = reference.quantize_kv(key, value, bits=4, lens=lens_of(4, 0))
        for name, tensor in fields(packed).items():
            assert name == "lens" or same_bits(tensor, fields(wanted)[name]), name


K = torch.zeros(2, 70, 3, 32)
BAD: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"key": None}, TypeError, "key: got NoneType, must be a torch.Tensor"),
    ({"value": [1]}, TypeError, "value: got list"),
    ({"key": K.int()}, TypeError, "key: has dtype int32"),
    ({"value": K.half()}, TypeError, "value: has dtype float16, must be float32"),
    ({"key": K[0]}, ValueError, r"key: has shape \(70, 3, 32\), must be \(B, N, Hkv, D\)"),
    ({"value": K[:, :69]}, ValueError, r"value: has shape \(2, 69, 3, 32\), must be \(2, 70, 3, 32\)"),
    (
        {"key": K[..., :31], "value": K[..., :31]},
        ValueError,
        "key: has head width 31, must be one of 32, 64, 80",
    ),
    ({"key": torch.zeros(2, 70, 3, 64)[..., ::2]}, ValueError, "key: last dimension has stride 2"),
    ({"value": torch.zeros(2, 70, 3, 64)[..., ::2]}, ValueError, "value: last dimension has stride 2"),
    ({"bits": 3}, ValueError, "bits: got 3, must be 8, 4 or 2"),
    ({"bits": 4.0}, ValueError, "bits: got 4.0"),
    ({"bits": True}, ValueError, "bits: got True"),
    ({"block": 32}, ValueError, "block: got 32, must be a multiple of 64, or at least the 70 tokens"),
    ({"block": 0}, ValueError, "block: got 0, must be >= 1"),
    ({"block": 64.0}, TypeError, "block: got float"),
    ({"lens": [70, 70]}, TypeError, "lens: got list"),
    ({"lens": torch.zeros(2)}, TypeError, "lens: has dtype float32, must be int32"),
    ({"lens": lens_of(1, 2, 3)}, ValueError, r"lens: has shape \(3,\), must be \(2,\)"),
]


@every_backend
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(
    backend: Backend, change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments: dict[str, object] = {"key": K, "value": K, "bits": 4, **change}
    with pytest.raises(error, match=message):
        backend.quantize_kv(arguments.pop("key"), arguments.pop("value"), **arguments)


@every_backend
def test_bad_storage(backend: Backend) -> None:
    storage = empty_packed(torch.empty(2, 192, 3, 32), bits=4, block=64)
    for change, error, message in (
        ({"packed": None}, TypeError, "packed: got NoneType, must be a PackedKV"),
        (
            {"key": K[:1], "value": K[:1]},
            ValueError,
            r"key: has shape \(1, 70, 3, 32\), must be \(2, N, 3, 32\)",
        ),
        ({"offset": 63}, ValueError, "offset: got 63, must be a multiple of packed.block, 64"),
        ({"offset": -64}, ValueError, "offset: got -64, must be >= 0"),
        ({"offset": 128}, ValueError, "offset: 128 and 70 more tokens do not fit, packed has room for 192"),
    ):
        arguments = {"packed": storage, "key": K, "value": K, "offset": 64, **change}
        with pytest.raises(error, match=message):
            backend.quantize_kv_(**arguments)


@native_backend
def test_raw_op_checks_what_memory_needs(backend: Backend) -> None:
    packed = empty_packed(K, bits=4, block=64)
    good = [K, K, None, 4, 64, *fields(packed).values(), None, None]
    op = backend.raw("quantize_kv")
    op(*good)
    narrow = empty_packed(K[:, :69], bits=4, block=64)
    for position, wrong in (
        (0, K.double()), (0, K[..., :16]), (1, K[:1]), (1, K.half()), (2, lens_of(1)), (2, torch.zeros(2)),
        (3, 3), (4, 0), (4, 65), (4, 32), (5, narrow.key_codes), (5, packed.key_codes.float()),
        (6, packed.key_codes[..., :8]), (7, packed.key_scale[:, :, :1]), (10, packed.value_token[..., :1]),
        (11, torch.zeros(3)), (12, torch.zeros(2, dtype=torch.int32)),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            op(*(wrong if i == position else one for i, one in enumerate(good)))
