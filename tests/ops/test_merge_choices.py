"""merge_tokens on the CPU: its choices to the bit, whatever screened them, on every level of the processor."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightvlm_ext import ops

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def lane_sum(products: torch.Tensor) -> torch.Tensor:
    """fp32 sums over the last dimension as the CPU twin defines them: 64 lanes, then halves onto halves."""
    padded = torch.nn.functional.pad(products, (0, -products.shape[-1] % 64))
    sums = torch.zeros(*products.shape[:-1], 64)
    for part in padded.unflatten(-1, (-1, 64)).unbind(-2):
        sums = sums + part
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def hard_to_screen(dtype: torch.dtype, width: int) -> dict[str, torch.Tensor]:
    """Vectors whose 8-bit screen has wide or misleading bounds."""
    n = 300
    noise = torch.randn(n, width)
    outlier = torch.zeros(n, width)
    outlier[torch.arange(n), torch.randint(0, width, (n,))] = 50 * torch.rand(n)
    center = torch.randn(10, width)[torch.randint(0, 10, (n,))]
    cases = {
        "noise": noise,
        "shared": noise + 40 * torch.randn(width),
        "outliers": noise + outlier,
        "only outliers": outlier,
        "close": center + 1e-3 * noise,
        "twins": center * 2.0 ** torch.randint(-3, 4, (n, 1)),
        "zeros": noise * (torch.rand(n, 1) < 0.5),
    }
    return {name: case.to(dtype)[None] for name, case in cases.items()}


@every_dtype
@pytest.mark.parametrize("width", [128, 200, 1000])
def test_screens_leave_the_choice_to_the_cosine(dtype: torch.dtype, width: int) -> None:
    """To the bit: what the CPU twin chooses is the highest cosine as it is defined, whatever found it."""
    for name, x in hard_to_screen(dtype, width).items():
        tokens = x.shape[1]
        selection = ops.select(torch.rand(1, tokens), keep=170)
        group = torch.zeros(1, tokens, dtype=torch.int32)
        _, target = ops.merge_tokens(x, selection, torch.ones(1, tokens), group, return_target=True)
        vectors, kept = x[0].float(), selection.index[0].long()
        length = lane_sum(vectors * vectors)
        # Rounded to fp32 after the root and after the division; torch's own fp32 may be a unit off.
        root = length.double().sqrt().float().double()
        inverse = torch.where(length > 0, 1 / root, 0).float()
        dropped = (selection.inverse[0] < 0).nonzero().flatten()
        cosine = lane_sum(vectors[dropped][:, None] * vectors[kept]) * inverse[kept]
        first = (cosine == cosine.amax(dim=1, keepdim=True)).int().argmax(dim=1)
        assert torch.equal(target[0, dropped].long(), first), name


LEVEL_PROGRAM = """
import torch
from tests.ops import test_merge_choices as t
from tests.ops.backends import CPU
from tests.ops.test_merge_tokens import check, random_case
torch.manual_seed(0)
for dtype in t.DTYPES:
    for tokens, width, keep in ((50, 33, 20), (130, 600, 40), (450, 40, 420)):
        check(CPU, *random_case(1, tokens, width, keep, dtype, groups=2))
    for x in t.hard_to_screen(dtype, 150).values():
        selection = t.ops.select(torch.rand(1, 300), keep=170)
        group = torch.zeros(1, 300, dtype=torch.int32)
        out, target = t.ops.merge_tokens(x, selection, torch.ones(1, 300), group, return_target=True)
        print(target.flatten().tolist(), out.double().sum().item())
"""


@functools.cache
def output_at(level: str) -> str:
    environment = {
        **os.environ,
        "LIGHTVLM_CPU_LEVEL": level,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", LEVEL_PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("level", ["avx2", "avx512", "avx512_vnni", "avx512_bf16"])
def test_cpu_levels_agree_to_the_bit(level: str) -> None:
    assert output_at("portable")
    assert output_at(level) == output_at("portable")
