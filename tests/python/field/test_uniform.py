"""Evenly spaced tokens, against a slow implementation."""

from __future__ import annotations

from typing import Any

import lightvlm
import pytest
from lightvlm.methods.base import Stage
from lightvlm.methods.uniform import UniformPrefill
from python.field.against_slow import SlowMethod, check
from python.test_prefill import ROWS, UNEVEN
from python.tiny import QWEN, Family


class Slow(SlowMethod):
    def choose(self, out: Any, hidden: Any, tokens: list[int], budget: int, **_: Any) -> list[int]:
        return [tokens[int((i + 0.5) * len(tokens) / budget)] for i in range(budget)]


@pytest.mark.parametrize("options", [{}, {"keep": 0.2, "layers": (0, 3)}], ids=["default", "two-stages"])
def test_uniform_is_what_it_says(model: Any, family: Family, options: dict[str, Any]) -> None:
    part = UniformPrefill(min_image_tokens=0, **options)
    kept = check(model, family, part, [*ROWS, *UNEVEN[:2]] if family is QWEN else ROWS, Slow)
    if options:
        assert kept[0][0] == [[1, 3, 5, 8, 10, 12, 14]]  # 16 sqrt(0.2) tokens: 7
        assert kept[3][0] == [[3, 8, 12]]


def test_options() -> None:
    assert UniformPrefill().stages(28) == lightvlm.Random().prefill.stages(28)  # type: ignore[union-attr]
    assert UniformPrefill(0.3, layers=(0,)).stages(6) == (Stage(0, 0.3),)
    assert UniformPrefill(1).stages(6) == ()
    assert lightvlm.method("uniform", keep=0.2) == lightvlm.Uniform(0.2)
    with pytest.raises(ValueError, match=r"layers must be ascending layer numbers within 0..5, got \(6,\)"):
        UniformPrefill(layers=(6,)).stages(6)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        UniformPrefill(0)
