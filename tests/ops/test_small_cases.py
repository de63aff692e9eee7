"""Every op on its small cases, in every tier. `-k sanitizer -m gpu` is what compute-sanitizer runs."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import lightvlm_ext
from lightvlm_ext import ops
from lightvlm_ext._kv import PackedKV
from tests.ops.backends import NATIVE, REFERENCE, Backend
from tests.ops.small_cases import CASES, Call, bad_calls, make, tensors

OPS = sorted(name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
every_case = pytest.mark.parametrize("name", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def wide(call: Call, dtype: torch.dtype) -> Call:
    """The call with its tensors of `dtype` in float64, but for those whose dtype is the format's own."""
    segments = call.args[1] if call.op == "decode_attention" else ()
    packed = [segment for segment in segments if isinstance(segment, PackedKV)]
    fixed = {id(tensor) for tensor in tensors((packed, call.options.get("mass")))}
    return call.map(
        lambda tensor: tensor.double() if tensor.dtype == dtype and id(tensor) not in fixed else tensor
    )


def assert_agree(found: list[Tensor], exact: list[Tensor], plain: list[Tensor], step: float) -> None:
    """Within twice what plain torch loses in the same precision, and `step` of the largest; integers to the bit."""
    for here, precise, rough in zip(found, exact, plain, strict=True):
        if not precise.is_floating_point():
            assert torch.equal(here, precise)
            continue
        noise = (rough.double() - precise.double()).abs().max()
        assert (here.double() - precise.double()).abs().max() <= 2 * noise + step * precise.abs().max()


@native_backend
@every_case
@every_dtype
def test_sanitizer(name: str, dtype: torch.dtype, backend: Backend) -> None:
    lightvlm_ext.device_errors()
    call = make(name, dtype, seed=0)
    plain = call.copy().on(REFERENCE)
    # What packs is defined to the bit, in the precision that it is given.
    exact = plain if "quantize" in name else wide(call.copy(), dtype).on(REFERENCE)
    # Its reference computes 16 bits in fp32; the op rounds query and weights to 16 bits, as attention does.
    in_16_bit = call.op in ("decode_attention", "append_attend_") and dtype != torch.float32
    step = torch.finfo(dtype).eps if in_16_bit else 1e-6
    assert_agree(call.on(backend), exact, plain, step)
    assert lightvlm_ext.device_errors() == []


@native_backend
@every_case
def test_two_runs_agree_to_the_bit(name: str, backend: Backend) -> None:
    call = make(name, torch.bfloat16, seed=1)
    first, second = call.copy().on(backend), call.copy().on(backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@native_backend
@pytest.mark.parametrize("name", OPS)
def test_values_out_of_range_are_reported(
    name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = bad_calls()[name]
    lightvlm_ext.device_errors()
    if backend.is_device:
        call.copy().on(backend)
        found = lightvlm_ext.device_errors()
        assert len(found) == 1
        assert f": {name}: " in found[0]
        monkeypatch.setenv("LIGHTVLM_CHECK", "1")
    with pytest.raises(ValueError, match=r"\w+: "):
        call.on(backend)
    assert lightvlm_ext.device_errors() == []


@every_case
def test_seeds_give_other_values_in_the_same_shapes(name: str) -> None:
    one, other = (make(name, torch.float16, seed).tensors() for seed in (0, 1))
    assert [(a.shape, a.stride(), a.dtype) for a in one] == [(b.shape, b.stride(), b.dtype) for b in other]
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True) if a.is_floating_point())


def test_every_op_has_cases() -> None:
    assert sorted({make(name, torch.float32, 0).op for name in CASES}) == OPS
    assert sorted(bad_calls()) == OPS
