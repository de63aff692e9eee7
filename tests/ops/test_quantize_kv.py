"""quantize_kv: the reference against another way to the same numbers, every tier against the reference to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.backends import (
    BACKENDS,
    CPU,
    EMULATED,
    NATIVE,
    REFERENCE,
    Backend,
    emulation_library,
    load_emulation,
)
from ops.packing import (
    DTYPES,
    LAYOUTS,
    check_same,
    fields,
    half_steps,
    in_layout,
    lens_of,
    same_bits,
    unpack_codes,
)
from torch import Tensor

from lightvlm_ext import _library, ops, reference
from lightvlm_ext._kv import PACKED_BITS, PACKED_HEAD_DIMS, empty_packed
from tests.emulation.build import Control

ROOT = Path(__file__).resolve().parents[2]
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
native_backend = pytest.mark.parametrize("backend", NATIVE, ids=str)
every_bits = pytest.mark.parametrize("bits", PACKED_BITS)


# The reference

BLOCKS = [(1, None), (5, None), (70, None), (64, 64), (65, 64), (150, 128)]


@every_bits
@pytest.mark.parametrize(("tokens", "block"), BLOCKS)
def test_reference_picks_the_nearest_code(bits: int, tokens: int, block: int | None) -> None:
    """Parameters from their definition, each code against all codes that there are."""
    key, value = torch.randn(2, tokens, 2, 32).double(), torch.randn(2, tokens, 2, 32).double() * 3
    packed = reference.quantize_kv(key.float(), value.float(), bits=bits, block=block)
    key, value = key.float().double(), value.float().double()
    size = block or max(tokens, 1)
    levels = torch.arange(2**bits).double()
    assert packed.block == size
    for t in range(-(-tokens // size)):
        taken = slice(t * size, (t + 1) * size)
        k, v = key[:, taken].transpose(1, 2), value[:, taken].transpose(1, 2)
        zero, scale = packed.key_zero[:, :, t].double(), packed.key_scale[:, :, t].double()
        assert torch.equal(zero, k.amin(2))
        torch.testing.assert_close(scale, (k.amax(2) - k.amin(2)) / (2**bits - 1), rtol=1e-6, atol=0)
        codes = unpack_codes(packed.key_codes[:, :, taken], bits, 32)
        offered = zero[:, :, None, :, None] + scale[:, :, None, :, None] * levels
        check_nearest(k, offered, codes)

        channel = packed.value_channel[:, :, t].double()
        factor = channel / v.abs().amax(2).sqrt()
        exponent = factor.log2().round()
        torch.testing.assert_close(factor, 2**exponent, rtol=1e-6, atol=0)
        assert bool((exponent == exponent[..., :1]).all())  # one power of two for all channels of a head
        pair = packed.value_token[:, :, taken].double()
        offered = channel[:, :, None, :, None] * (pair[..., :1, None] * levels + pair[..., 1:, None])
        check_nearest(v, offered, unpack_codes(packed.value_codes[:, :, taken], bits, 32))
        # The codes cover the token's range, and little more than rounding of scale and zero to fp16.
        u = v / channel[:, :, None]
        low, high = u.amin(-1), u.amax(-1)
        scale, zero = pair[..., 0], pair[..., 1]
        top = zero + scale * (2**bits - 1)
        assert bool((zero <= low + 1e-6 * low.abs()).all())
        assert bool((top >= high - 1e-6 * high.abs()).all())
        assert bool((top - zero <= (high - low) * (1 + 2**-9) + (low.abs() + high.abs()) * 2**-9).all())
        assert bool((scale <= 1).all())


def check_nearest(numbers: Tensor, offered: Tensor, codes: Tensor) -> None:
    distance = (numbers[..., None] - offered).abs()
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    step = (offered[..., 1] - offered[..., 0]).abs()
    assert bool((chosen <= distance.amin(-1) + 1e-4 * step + 1e-6 * numbers.abs()).all())


@every_bits
@pytest.mark.parametrize("width", PACKED_HEAD_DIMS)
def test_reference_layout(bits: int, width: int) -> None:
    """Code d stands at bit d * bits of the row; D is rounded up to a multiple of 32 with codes of 0."""
    levels = 2**bits - 1
    codes = torch.randint(0, levels + 1, (1, 40, 2, width))
    codes[:, 0], codes[:, 1] = 0, levels
    packed = reference.quantize_kv(codes.float() * 0.25 - 3, codes.float(), bits=bits)
    row = int.from_bytes(bytes(packed.key_codes[0, 1, 17].tolist()), "little")
    assert [row >> (d * bits) & levels for d in range(width)] == codes[0, 17, 1].tolist()
    assert row >> (width * bits) == 0
    assert packed.key_codes.shape == packed.value_codes.shape == (1, 2, 40, -(-width // 32) * 32 * bits // 8)
    assert bool((packed.key_scale == 0.25).all())
    assert bool((packed.key_zero == -3).all())


def test_bytes() -> None:
    key = torch.zeros(2, 100, 3, 128, dtype=torch.bfloat16)
    for bits, codes in ((8, 256), (4, 128), (2, 64)):
        packed = reference.quantize_kv(key, key, bits=bits, block=64)
        assert packed.tokens == 100
        assert packed.nbytes == 2 * 3 * (100 * (codes + 4) + 2 * 3 * 128 * 4)
        assert reference.quantize_kv(key, key, bits=bits, lens=lens_of(1, 2)).nbytes == (
            2 * 3 * (100 * (codes + 4) + 3 * 128 * 4) + 8
        )


# Native tiers


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    tokens = draw(st.sampled_from([0, 1, 2, 15, 63, 64, 65, 130]))
    return {
        "batch": draw(st.integers(1, 3)),
        "tokens": tokens,
        "heads": draw(st.integers(1, 3)),
        "width": draw(st.sampled_from(PACKED_HEAD_DIMS)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layouts": draw(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))),
        "bits": draw(st.sampled_from(PACKED_BITS)),
        "block": draw(st.sampled_from([None, 64, 128, 1000])),
        "lens": draw(st.one_of(st.none(), st.lists(st.integers(0, tokens), min_size=3, max_size=3))),
        "kind": draw(st.sampled_from(list(KINDS))),
        "seed": draw(st.integers(0, 2**31)),
    }


def channels(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * torch.randn(shape[-1]).mul(20).exp().clamp(max=1e30)


def tokens_apart(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * torch.randn(shape[1]).mul(10).exp().clamp(max=1e30)[None, :, None, None]


KINDS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "normal": torch.randn,
    "biased": lambda shape: torch.randn(shape) * 0.1 + 100,
    "ties": lambda shape: torch.randint(-300, 300, shape).float() / 4,
    "huge": lambda shape: (torch.rand(shape) * 2 - 1) * 3.3e38,
    "largest": lambda shape: torch.where(torch.rand(shape) > 0.5, 3.38e38, -3.38e38),
    "tiny": lambda shape: (torch.rand(shape) * 2 - 1) * 1e-39,
    "subnormal": lambda shape: torch.randint(-3, 4, shape) * 2.0**-149,
    "constant": lambda shape: torch.full(shape, -1.7),
    "zeros": torch.zeros,
    "signed zeros": lambda shape: torch.where(torch.rand(shape) > 0.5, 0.0, -0.0),
    "channels": channels,
    "tokens": tokens_apart,
    "narrow": lambda shape: 1 + torch.rand(shape) * 1e-4,
}


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "tokens") -> Tensor:
    numbers = KINDS[kind](shape).to(dtype)
    if dtype == torch.float16:
        numbers = numbers.clamp(-65504, 65504)
    return in_layout(numbers, layout)


@native_backend
@settings(max_examples=200)
@given(case=cases())
def test_equals_the_reference(backend: Backend, case: dict[str, object]) -> None:
    torch.manual_seed(case["seed"])
    batch = case["batch"]
    shape = (batch, case["tokens"], case["heads"], case["width"])
    key, value = (make(case["kind"], shape, case["dtype"], layout) for layout in case["layouts"])
    lens = None if case["lens"] is None else torch.tensor(case["lens"][:batch], dtype=torch.int32)
    options = {"bits": case["bits"], "block": case["block"], "lens": lens}
    packed = backend.quantize_kv(key, value, **options)
    check_same(packed, reference.quantize_kv(key, value, **options))
    assert packed.lens is lens or torch.equal(packed.lens, lens)


@every_backend
@every_bits
@pytest.mark.parametrize("kind", KINDS)
def test_error_bound(backend: Backend, bits: int, kind: str) -> None:
    """Half a step of the codes, and what fp32 rounds; of keys and of values, whatever their range."""
    for dtype in DTYPES:
        key, value = (make(kind, (2, 66, 2, 32), dtype) for _ in range(2))
        packed = backend.quantize_kv(key, value, bits=bits, block=64)
        steps = half_steps(packed)
        for name, tensor in fields(packed).items():
            assert bool(tensor.isfinite().all()), name
        for found, number, half in zip(
            reference.dequantize_kv(packed, torch.float64), (key, value), steps, strict=True
        ):
            rounded = number.double().abs() * 2**-22
            assert bool(((found - number.double()).abs() <= half * (1 + 2**-12) + rounded).all())
        for found in backend.dequantize_kv(packed, torch.float32):
            assert bool(found.isfinite().all())
        # And the steps are as small as the ranges allow: no error beyond half of (max - min) / levels by
        # more than the rounding of scale and zero to fp16, which needs numbers of a usual size to show.
        if kind in ("normal", "biased", "ties"):
            v = value.double()
            c = v[:, :64].abs().amax(1, keepdim=True).sqrt()
            u = v[:, :64] / c
            low, high = u.amin(-1, keepdim=True), u.amax(-1, keepdim=True)
            widest = (high - low) * (1 + 2**-9) + low.abs() * 2**-9
            assert bool((steps[1][:, :64] <= c * widest / (2**bits - 1) / 2 * (1 + 2**-9)).all())


@every_bits
def test_as_good_as_plain_torch(bits: int) -> None:
    """Mean error against the same quantiser composed in fp32 torch, with fp32 scales."""
    key, value = torch.randn(1, 500, 4, 128), torch.randn(1, 500, 4, 128) * torch.rand(128)
    packed = ops.quantize_kv(key, value, bits=bits)
    found = ops.dequantize_kv(packed, torch.float32)
    levels = 2**bits - 1

    def plain(x: Tensor, dim: int) -> Tensor:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        scale = (high - low) / levels
        return ((x - low) / scale).round() * scale + low

    c = value.abs().amax(1, keepdim=True).sqrt()
    for ours, theirs, wanted in (
        (found[0], plain(key, 1), key),
        (found[1], plain(value / c, 3) * c, value),
    ):
        assert (ours - wanted).square().mean() <= 1.01 * (theirs - wanted).square().mean()


@native_backend
@every_bits
@pytest.mark.parametrize("tokens", [255, 256, 257, 1025, 2100])
def test_long_blocks(backend: Backend, bits: int, tokens: int) -> None:
    """On CUDA the extremes of a long block are found in parts, and its codes written in tiles."""
    key, value = (torch.randn(1, tokens, 2, 32, dtype=torch.bfloat16) for _ in range(2))
    for lens in (None, lens_of(tokens - 100), lens_of(130)):
        packed = backend.quantize_kv(key, value, bits=bits, lens=lens)
        check_same(packed, reference.quantize_kv(key, value, bits=bits, lens=lens))


def test_long_blocks_take_three_launches() -> None:
    load_emulation()
    control = Control(emulation_library())
    names = ("quantize_block", "quantize_extremes", "quantize_channels", "quantize_codes")
    for tokens, wanted in ((128, [1, 0, 0, 0]), (129, [0, 1, 1, 1])):
        before = [control.launch_count(name) for name in names]
        EMULATED.quantize_kv(torch.zeros(1, tokens, 1, 32), torch.zeros(1, tokens, 1, 32), bits=4)
        assert [control.launch_count(n) - b for n, b in zip(names, before, strict=True)] == wanted


@every_backend
def test_tokens_past_lens_count_for_nothing(backend: Backend) -> None:
    key, value = torch.randn(3, 70, 2, 64), torch.randn(3, 70, 2, 64)
    lens = lens_of(0, 33, 70)
    wanted = backend.quantize_kv(key, value, bits=4, lens=lens)
    key[1, 33:], value[1, 33:] = float("nan"), float("inf")
    key[0], value[0] = float("-inf"), float("nan")
    packed = backend.quantize_kv(key, value, bits=4, lens=lens)
    check_same(packed, wanted)
    assert not packed.key_codes[1, :, 33:].any()
    assert not packed.value_codes[1, :, 33:].any()
    assert not packed.value_token[1, :, 33:].any()
    assert not packed.key_scale[0].any()
    alone = backend.quantize_kv(key[1:2, :33], value[1:2, :33], bits=4)
    assert torch.equal(alone.key_codes[0], packed.key_codes[1, :, :33])
    assert torch.equal(alone.value_codes[0], packed.value_codes[1, :, :33])
    assert torch.equal(alone.value_channel[0], packed.value_channel[1])


@every_backend
def test_a_batch_is_the_same_as_one_by_one(backend: Backend) -> None:
    key, value = torch.randn(3, 70, 2, 96).half(), torch.randn(3, 70, 2, 96).half()
    together = backend.quantize_kv(key, value, bits=2, block=64)
    for b in range(3):
        alone = backend.quantize_kv(key[b : b + 1], value[b : b + 1], bits=2, block=64)
        for name, tensor in fields(alone).items():
            assert same_bits(tensor[0], fields(together)[name][b]), name


# In place


@every_backend
@every_bits
@pytest.mark.parametrize("width", [32, 80, 128])
def test_appended_blocks_are_the_whole(backend: Backend, bits: int, width: int) -> None:
    key, value = (torch.randn(2, 300, 2, width, dtype=torch.bfloat16) for _ in range(2))
    wanted = reference.quantize_kv(key, value, bits=bits, block=64)
    storage = empty_packed(torch.empty(2, 400, 2, width), bits=bits, block=64)
    for tensor in fields(storage).values():
        tensor.view(torch.uint8).fill_(0xA5)
    for first, last in ((0, 128), (128, 192), (192, 300)):
        taken = key[:, first:last], value[:, first:last]
        assert backend.quantize_kv_(storage, *taken, offset=first) is None
    check_same(storage.narrow(0, 300), wanted)
    for name, tensor in fields(storage).items():
        past = 300 if tensor.shape[2] == 400 else 5
        assert bool((tensor[:, :, past:].contiguous().view(torch.uint8) == 0xA5).all()), name


@every_backend
def test_storage_of_any_strides(backend: Backend) -> None:
    key, value = torch.randn(2, 130, 3, 64), torch.randn(2, 130, 3, 64)
    wanted = reference.quantize_kv(key, value, bits=2, block=64)
    plain = empty_packed(key, bits=2, block=64)
    moved = {}
    for name, tensor in fields(plain).items():
        batch, heads, rows, width = tensor.shape
        wide = torch.zeros(rows + 3, batch, heads + 1, width + 5, dtype=tensor.dtype)
        moved[name] = wide[1:-2, :, 1:, 3:-2].permute(1, 2, 0, 3)
    storage = type(plain)(bits=2, head_dim=64, block=64, **moved)
    backend.quantize_kv_(storage, key, value)
    check_same(storage, wanted)
    for ours, theirs in zip(
        backend.dequantize_kv(storage, torch.float16),
        reference.dequantize_kv(wanted, torch.float16),
        strict=True,
    ):
        assert same_bits(ours, theirs)


@every_backend
def test_one_block_for_all_begins_at_0(backend: Backend) -> None:
    key, value = torch.randn(1, 40, 1, 32), torch.randn(1, 40, 1, 32)
    storage = empty_packed(torch.empty(1, 90, 1, 32), bits=8, block=90)
    backend.quantize_kv_(storage, key, value, lens=lens_of(35))
    for found, wanted in zip(
        reference.dequantize_kv(storage.narrow(0, 35), torch.float32), (key, value), strict=True
    ):
        torch.testing.assert_close(found, wanted[:, :35], atol=0.03, rtol=0)
    with pytest.raises(ValueError, match=r"offset: got 40, must be a multiple of packed.block, 90"):
        backend.quantize_kv_(storage, key, value, offset=40)


@every_backend
@every_bits
def test_compact_kv_moves_packed_tokens(backend: Backend, bits: int) -> None:
    """With one block for all tokens, a kept token is its rows of codes and value_token, wherever they stand."""
    key, value = torch.randn(2, 90, 3, 80), torch.randn(2, 90, 3, 80)
    packed = backend.quantize_kv(key, value, bits=bits)
    before = reference.dequantize_kv(packed, torch.float32)
    kept = [torch.arange(1, 90, 3), torch.tensor([0, 5, 6, 88])]
    index = torch.full((2, 31), -1, dtype=torch.int32)
    for row, tokens in enumerate(kept):
        index[row, : len(tokens)] = tokens
    backend.compact_kv_(
        packed.key_codes.transpose(1, 2),
        packed.value_codes.transpose(1, 2),
        index,
        lens_of(*map(len, kept)),
        extras=[packed.value_token.transpose(1, 2)],
    )
    after = reference.dequantize_kv(packed, torch.float32)
    for row, tokens in enumerate(kept):
        for old, new in zip(before, after, strict=True):
            assert torch.equal(new[row, : len(tokens)], old[row, tokens])


# The library


def test_result_does_not_depend_on_threads() -> None:
    threads = torch.get_num_threads()
    key, value = torch.randn(2, 1500, 4, 64).bfloat16(), torch.randn(2, 1500, 4, 64).bfloat16()
    wanted = reference.quantize_kv(key, value, bits=4, block=256)
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            check_same(ops.quantize_kv(key, value, bits=4, block=256), wanted)
    finally:
        torch.set_num_threads(threads)


LEVELS_PROGRAM = """
import torch
from ops.backends import CPU, REFERENCE
from ops.packing import check_same
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for bits in (8, 4, 2):
        for width in (32, 80, 128, 192, 256):
            key, value = torch.randn(1, 67, 2, width).to(dtype), torch.randn(1, 67, 2, width).to(dtype)
            packed = REFERENCE.quantize_kv(key, value, bits=bits)
            check_same(CPU.quantize_kv(key, value, bits=bits), packed)
            for out in (torch.float32, torch.float16, torch.bfloat16):
                for ours, theirs in zip(CPU.dequantize_kv(packed, out), REFERENCE.dequantize_kv(packed, out)):
                    assert torch.equal(ours, theirs), (dtype, bits, width, out)
"""


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_every_level_of_the_cpu(level: str) -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "python")))
    environment = {**os.environ, "LIGHTVLM_CPU_LEVEL": level, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", LEVELS_PROGRAM], check=True, env=environment, cwd=ROOT)


def test_opcheck() -> None:
    for key, lens, block in (
        (torch.randn(2, 70, 2, 80), None, 64),
        (torch.randn(2, 2, 70, 32).half().transpose(1, 2), lens_of(3, 70), 70),
    ):
        packed = empty_packed(key, bits=4, block=block)
        arguments = (key, key.clone(), lens, 4, block, *fields(packed).values(), None, None)
        _library.load()
        torch.library.opcheck(torch.ops.lightvlm.quantize_kv.default, arguments)


def test_compiles() -> None:
    def step(key: Tensor, value: Tensor) -> Tensor:
        packed = ops.quantize_kv(key * 2, value, bits=4)
        back = ops.dequantize_kv(packed, torch.float32)
        return back[0] + back[1] + packed.key_scale.sum()

    key, value = torch.randn(1, 70, 2, 32), torch.randn(1, 70, 2, 32)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(key, value), step(key, value))


def test_float64_is_for_the_reference_alone() -> None:
    key = torch.randn(1, 10, 1, 32).double()
    single = REFERENCE.quantize_kv(key.float(), key.float(), bits=8)
    double = REFERENCE.quantize_kv(key, key, bits=8)
    torch.testing.assert_close(double.key_scale, single.key_scale, rtol=1e-5, atol=0)
    with pytest.raises(TypeError, match="key: has dtype float64"):
        CPU.quantize_kv(key, key, bits=8)
