"""The CPU twin of decode_attention: processor levels, threads, rounds of batch rows, and where its integers end."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightvlm_ext import ops, reference
from lightvlm_ext._kv import KVSegment, PackedKV
from tests.ops.decode_cases import Segment, dense, dequantised, packed, query_of

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LEVELS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16")


def exactly(query: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Out, lse and masses in float64."""
    wide = [
        one
        if isinstance(one, PackedKV)
        else dataclasses.replace(one, key=one.key.double(), value=one.value.double())
        for one in segments
    ]
    mass = buffers(segments)
    out, lse = reference.decode_attention(query.double(), wide, mass=mass)
    return out, lse, mass


def buffers(segments: Sequence[Segment]) -> list[Tensor]:
    keys = [one.key_codes if isinstance(one, PackedKV) else one.key.transpose(1, 2) for one in segments]
    return [torch.zeros(key.shape[:3]) for key in keys]


def roughly(query: Tensor, segments: Sequence[Segment]) -> Tensor:
    """What plain torch gets in the query's dtype from the same cache."""
    rows = [KVSegment(*(part.to(query.dtype) for part in dequantised(one, query.dtype))) for one in segments]
    key, value = (torch.cat([getattr(row, name) for row in rows], 1) for name in ("key", "value"))
    batch, width = query.shape[0], query.shape[-1]
    grouped = query.view(batch, key.shape[2], -1, width)
    weights = torch.softmax(torch.einsum("bkgd,bnkd->bkgn", grouped, key) * width**-0.5, -1)
    return torch.einsum("bkgn,bnkd->bkgd", weights, value).reshape(query.shape)


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@each_dtype
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_error_on_average(bits: int, width: int, dtype: torch.dtype) -> None:
    """Largest errors have outliers; their root mean square may be twice that of plain torch at most."""
    torch.manual_seed(bits + width)
    found, rough = 0.0, 0.0
    for tokens in (100, 300, 1000):
        query = query_of(2, 14, width, dtype)
        segment = dense(2, tokens, 2, width, dtype) if bits > 8 else packed(bits, 2, tokens, 2, width)
        exact = exactly(query, [segment])[0]
        found += root_mean_square(ops.decode_attention(query, [segment])[0].double() - exact)
        rough += root_mean_square(roughly(query, [segment]).double() - exact)
    assert found <= 2 * rough


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_largest_sums_of_integers(bits: int, dtype: torch.dtype) -> None:
    """All codes and weights at their maximum, 256 channels and a whole span of 256 equal tokens."""
    segment = packed(bits, 1, 512, 1, 256)
    top = torch.full_like(segment.key_codes, 255)
    ones = torch.ones_like(segment.key_scale)
    segment = dataclasses.replace(
        segment,
        key_codes=top,
        value_codes=top,
        key_scale=ones / 64,
        key_zero=ones * 0,
        value_channel=ones,
        value_token=torch.ones_like(segment.value_token) * torch.tensor([1, 0], dtype=torch.float16),
    )
    for sign in (1, -1):
        query = torch.full((1, 1, 8, 256), sign, dtype=dtype)
        out, lse = ops.decode_attention(query, [segment])
        assert (out == 2**bits - 1).all()
        torch.testing.assert_close(lse.double(), exactly(query, [segment])[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_channels_and_tokens_of_very_different_size(bits: int) -> None:
    """Weights count in units of the largest: what is small beside it is off by as much as in bf16, not more."""
    torch.manual_seed(bits)
    segment = packed(bits, 2, 700, 2, 128)
    segment.key_scale[..., 5] *= 100
    segment.key_zero[..., 5] *= 100
    segment.value_token[:, :, 3::100] *= 50
    segment.value_token[:, :, 5::7, 0] *= -1
    segment.value_token[:, :, 6::7] = 0
    query = query_of(2, 14, 128, torch.bfloat16) / 20
    exact = exactly(query, [segment])[0]
    found = ops.decode_attention(query, [segment])[0]
    rough = roughly(query, [segment])
    assert root_mean_square(found - exact) <= 2 * root_mean_square(rough - exact)


def test_result_is_the_same_on_any_number_of_threads() -> None:
    """Formats, mass, blocks and rows of their own length, in enough items for every thread."""
    torch.manual_seed(0)
    lens, leftpad = torch.tensor([3000, 0, 1], dtype=torch.int32), torch.tensor([70, 0, 0], dtype=torch.int32)
    segments: list[Segment] = [
        dense(3, 3000, 2, 64, torch.bfloat16, lens=lens, leftpad=leftpad),
        packed(4, 3, 2100, 2, 64, block=192),
        packed(2, 3, 1500, 2, 64),
        packed(8, 3, 700, 2, 64),
    ]
    query = query_of(3, 22, 64, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            mass = buffers(segments)
            results.append((*ops.decode_attention(query, segments, mass=mass), *mass))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_more_rows_than_fit_a_round() -> None:
    """With mass the workspace of 120 rows would be some 75 MB: rows go in two rounds, and are the same as alone."""
    torch.manual_seed(0)
    segment = packed(2, 120, 4096, 1, 32)
    query = query_of(120, 32, 32, torch.float16)
    mass = buffers([segment])
    out, lse = ops.decode_attention(query, [segment], mass=mass)
    for row in (0, 60, 119):
        one = slice(row, row + 1)
        names = ("key_codes", "value_codes", "key_scale", "key_zero", "value_channel", "value_token")
        alone = dataclasses.replace(segment, **{name: getattr(segment, name)[one] for name in names})
        own = buffers([alone])
        out_alone, lse_alone = ops.decode_attention(query[one], [alone], mass=own)
        assert torch.equal(out[one], out_alone)
        assert torch.equal(lse[one], lse_alone)
        assert torch.equal(mass[0][one], own[0])


@pytest.mark.parametrize("bits", [4, 16])
def test_long_cache(bits: int) -> None:
    torch.manual_seed(bits)
    tokens = 40007
    segment = packed(4, 1, tokens, 1, 128) if bits == 4 else dense(1, tokens, 1, 128, torch.bfloat16)
    query = query_of(1, 7, 128, torch.bfloat16)
    mass = buffers([segment])
    out, lse = ops.decode_attention(query, [segment], mass=mass)
    exact, exact_lse, exact_mass = exactly(query, [segment])
    assert root_mean_square(out - exact) <= 2 * root_mean_square(roughly(query, [segment]) - exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mass[0], exact_mass[0], rtol=1e-2, atol=0)
    assert float(mass[0].double().sum()) == pytest.approx(1, abs=1e-5)


PROGRAM = """
import sys
import torch
from lightvlm_ext import ops
from tests.ops.decode_cases import dense, packed, query_of
from tests.ops.decode_pages import in_pages, unpaged
results = []
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for width in (32, 80, 128):
        torch.manual_seed(width)
        query = query_of(2, 9, width, dtype)
        segments = [dense(2, 70, 1, width, dtype)]
        segments += [packed(bits, 2, 330, 1, width, block=128) for bits in (8, 4, 2)]
        segments.append(in_pages(48, 1, width, dtype, lens=[600, 257], leftpad=[3, 0]))
        mass = [torch.zeros(2, 1, segment.tokens) for segment in segments]
        out, lse = ops.decode_attention(query, segments, mass=mass)
        results += [out, lse, *mass]
        again = ops.decode_attention(query, [*segments[:-1], unpaged(segments[-1])])
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
torch.save(results, sys.argv[1])
"""


def test_every_level_of_the_cpu(tmp_path: Path) -> None:
    """Levels differ in the order of sums, and in 16 bit in what is rounded: by a few units of the last place."""
    results = {}
    for level in LEVELS:
        out = tmp_path / f"{level}.pt"
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join([str(root), str(root / "python")])
        environment = {**os.environ, "LIGHTVLM_CPU_LEVEL": level, "PYTHONPATH": path}
        subprocess.run([sys.executable, "-c", PROGRAM, str(out)], check=True, env=environment)
        results[level] = torch.load(out)
    for best, *others in zip(*results.values(), strict=True):
        for other in others:
            # Of mass and lse in float32 too, which come from a query in 16 bit.
            torch.testing.assert_close(other, best, rtol=2e-2, atol=1e-2 * float(best.abs().max()))
    # For fp32 nothing is rounded to 16 bits on any level: out, lse and mass of three widths.
    for best, *others in zip(*(one[:18] for one in results.values()), strict=True):
        for other in others:
            torch.testing.assert_close(other, best, rtol=2e-5, atol=1e-6)
