"""Evenly spaced tokens, against a slow implementation."""

from __future__ import annotations

from typing import Any

import lightvlm
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightvlm.methods.base import Stage
from lightvlm.methods.spread import spread_rank
from lightvlm.methods.uniform import UniformPrefill
from python.field.against_slow import SlowMethod, check
from python.slow import even_order
from python.test_prefill import ROWS, UNEVEN
from python.tiny import QWEN, Family


class Slow(SlowMethod):
    """Every k-th token in reading order."""

    def choose(self, out: Any, hidden: Any, tokens: list[int], budget: int, **_: Any) -> list[int]:
        return [tokens[int((i + 0.5) * len(tokens) / budget)] for i in range(budget)]


@pytest.mark.parametrize("options", [{}, {"keep": 0.2, "layers": (0, 3)}], ids=["default", "two-stages"])
def test_in_reading_order(model: Any, family: Family, options: dict[str, Any]) -> None:
    part = UniformPrefill(min_image_tokens=0, order="raster", **options)
    kept = check(model, family, part, [*ROWS, *UNEVEN[:2]] if family is QWEN else ROWS, Slow)
    if options:
        assert kept[0][0] == [[1, 3, 5, 8, 10, 12, 14]]  # 16 sqrt(0.2) tokens: 7
        assert kept[3][0] == [[3, 8, 12]]


class SlowEven(SlowMethod):
    """Bayer's order on the image's grid."""

    def choose(
        self, out: Any, hidden: Any, tokens: list[int], budget: int, *, image: int, within: Any, **_: Any
    ) -> list[int]:
        order = even_order(*self.grids[image][1:])
        chosen = sorted(sorted(tokens, key=lambda i: order[within[i]])[:budget])
        if self.part.merge == "uniform":
            self._merge(out, hidden, None, chosen, [i for i in tokens if i not in chosen])
        return chosen


@pytest.mark.parametrize("merge", ["drop", "uniform"])
@pytest.mark.parametrize("options", [{}, {"keep": 0.2, "layers": (0, 3)}], ids=["default", "two-stages"])
def test_even_on_the_grid(model: Any, family: Family, options: dict[str, Any], merge: Any) -> None:
    part = UniformPrefill(min_image_tokens=0, merge=merge, **options)
    kept = check(model, family, part, [*ROWS, *UNEVEN[:2]] if family is QWEN else ROWS, SlowEven)
    if options:
        assert kept[0][0] == [[0, 2, 5, 7, 8, 10, 15]]
        assert kept[3][0] == [[0, 2, 10]]


def test_order_of_videos_and_of_unknown_grids() -> None:
    assert spread_rank(8, None) == (0, 4, 2, 6, 1, 5, 3, 7)
    frames = spread_rank(24, (2, 3, 4))
    assert all(later == earlier + 1 for earlier, later in zip(frames[:12], frames[12:], strict=True))
    assert sorted(frames) == list(range(24))


@given(st.integers(1, 40), st.integers(1, 40))
def test_order_is_that_of_the_matrix(height: int, width: int) -> None:
    order = even_order(height, width)
    rank = sorted(range(height * width), key=lambda i: order[i])
    found = spread_rank(height * width, (1, height, width))
    assert [found[token] for token in rank] == list(range(height * width))


def test_options() -> None:
    assert UniformPrefill().stages(28) == (Stage(0, 0.35),)
    assert UniformPrefill(0.3, layers=(0,)).stages(6) == (Stage(0, 0.3),)
    assert UniformPrefill(1).stages(6) == ()
    assert lightvlm.method("uniform", keep=0.2) == lightvlm.Uniform(0.2)
    with pytest.raises(ValueError, match=r"layers must be ascending layer numbers within 0..5, got \(6,\)"):
        UniformPrefill(layers=(6,)).stages(6)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        UniformPrefill(0)
