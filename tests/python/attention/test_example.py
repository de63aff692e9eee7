"""The first example in docs/attention.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parents[3] / "docs" / "attention.md"


def test_the_example() -> None:
    block, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), found)
    q, k, v = (torch.randn(2, 20, heads, 32) for heads in (4, 2, 2))
    out, importance = found["read_prompt"](q, k, v)
    assert out.shape == q.shape
    assert importance.shape == (2, 20)
    caches = [torch.zeros(2, 24, 2, 32) for _ in range(2)]
    for cache, tokens in zip(caches, (k, v), strict=True):
        cache[:, :19] = tokens[:, :19]
    step = found["decode"](
        q[:, -1:], k[:, -1:], v[:, -1:], *caches, torch.tensor([19, 19], dtype=torch.int32)
    )
    torch.testing.assert_close(step, out[:, -1:])
    assert torch.equal(caches[0][:, :20], k)
