"""iLLaVA against a slow transcription of its formula."""

from __future__ import annotations

import re
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.base import Stage
from lightvlm.methods.illava import ILLaVAPrefill, merge_tail
from python.field.scored import ROWS, UNEVEN, SlowScored, check
from python.tiny import LLAVA, QWEN
from torch import Tensor


class SlowILLaVA(SlowScored):
    """x' = sum (i + 1) x_i / sum (i + 1) over the r + 1 lowest tokens, the highest of them first, in its place."""

    def _choose(self, tokens: list[int], scores: Tensor, hidden: Tensor, budget: int) -> list[int]:
        # the order in the tail is the weights'
        order = self.ordered(tokens, scores, *range(budget - 1, len(tokens)))
        self.tail = order[budget - 1 :]
        return sorted(order[:budget])

    def _merge(self, out: Tensor, hidden: Tensor, scores: Tensor, kept: Any, dropped: Any) -> None:
        total = sum(i + 1 for i in range(len(self.tail)))
        out[self.tail[0]] = sum((i + 1) * hidden[token] / total for i, token in enumerate(self.tail))


OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "far": {"keep": 0.2},
    "one-token": {"keep": 0.01, "layers": (2, 3), "fractions": (0.5, 0.01)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_illava_is_what_it_says(llava: Any, name: str) -> None:
    check(llava, LLAVA, SlowILLaVA, lightvlm.ILLaVA(**OPTIONS[name], min_image_tokens=0), ROWS)


@pytest.mark.parametrize("name", OPTIONS)
def test_images_of_any_size(qwen: Any, name: str) -> None:
    check(qwen, QWEN, SlowILLaVA, lightvlm.ILLaVA(**OPTIONS[name], min_image_tokens=0), UNEVEN)


def test_the_lowest_token_weighs_most() -> None:
    merged, place = merge_tail(torch.eye(5), torch.tensor([0.5, 0.1, 0.4, 0.2, 0.4]), 2)
    # by falling score 0, 2, 4, 3, 1: equal scores in ascending order, so that 2 leads the tail
    assert place.tolist() == [2]
    assert torch.allclose(merged, torch.tensor([0.0, 0.4, 0.1, 0.3, 0.2]))


def test_published_defaults() -> None:
    part = lightvlm.ILLaVA().prefill
    stages = part.stages(28)  # type: ignore[union-attr]
    assert [stage.layer for stage in stages] == [6, 7, 8]
    assert [stage.keep for stage in stages] == pytest.approx([0.9, 0.81, 0.729])
    assert lightvlm.ILLaVA(0.7, layers=(8,)).prefill.stages(28) == (Stage(8, 0.7),)  # type: ignore[union-attr]
    assert lightvlm.method("illava") == lightvlm.ILLaVA()
    assert ILLaVAPrefill(keep=1).stages(28) == ()


def test_bad_options() -> None:
    with pytest.raises(
        ValueError, match="layers must start at 1 or later: the score comes from the layer before"
    ):
        ILLaVAPrefill(layers=(0, 3)).stages(28)
    with pytest.raises(ValueError, match=re.escape("fractions must have one entry per layer (3), got 1")):
        ILLaVAPrefill(fractions=(0.729,)).stages(28)
    with pytest.raises(TypeError, match=re.escape("layers must be tuple, got 8")):
        lightvlm.ILLaVA(layers=8)
    with pytest.raises(ValueError, match=re.escape("keep must be in (0, 1], got -0.1")):
        lightvlm.ILLaVA(-0.1)
