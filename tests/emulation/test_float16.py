"""The plain C++ conversions of common/float16.cuh, against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.emulation.self_test import SelfTest, compile_self_test

TYPES = [(1, torch.float16), (2, torch.bfloat16)]


@pytest.fixture(scope="module")
def t() -> SelfTest:
    return SelfTest(compile_self_test())


def to_float(t: SelfTest, kind: int, bits: np.ndarray) -> np.ndarray:
    out = np.zeros(bits.size, np.float32)
    t.call("convert_to_float", kind, bits, out, bits.size)
    return out


def from_float(t: SelfTest, kind: int, values: np.ndarray) -> np.ndarray:
    out = np.zeros(values.size, np.uint16)
    t.call("convert_from_float", kind, values, out, values.size)
    return out


@pytest.mark.parametrize(("kind", "dtype"), TYPES)
def test_every_16_bit_value_becomes_its_float(t: SelfTest, kind: int, dtype: torch.dtype) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    got = to_float(t, kind, bits)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize(("kind", "dtype"), TYPES)
def test_rounding_is_to_nearest_even(t: SelfTest, kind: int, dtype: torch.dtype) -> None:
    exact = to_float(t, kind, np.arange(65536, dtype=np.uint16))
    exact = np.sort(exact[np.isfinite(exact)])
    middle = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)  # ties, exact in fp32
    special = np.array([0.0, -0.0, np.inf, -np.inf, 65519.996, 65520, 65536, 1e38, 3.4e38, 1e-45], np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    around = [np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    values = np.concatenate([exact, middle, *around, special, -special, random[~np.isnan(random)]])
    expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(from_float(t, kind, values), expected)


@pytest.mark.parametrize(("kind", "dtype"), TYPES)
def test_nan_stays_nan_and_keeps_its_sign(t: SelfTest, kind: int, dtype: torch.dtype) -> None:
    payloads = np.array([1, 0x1FFF, 0xFFFF, 0x10000, 0x3FFFFF, 0x400000, 0x7FFFFF], np.uint32)
    bits = np.concatenate([0x7F800000 | payloads, 0xFF800000 | payloads]).astype(np.uint32)
    got = from_float(t, kind, bits.view(np.float32))
    assert np.isnan(to_float(t, kind, got)).all()
    np.testing.assert_array_equal(got >> 15, bits >> 31)
