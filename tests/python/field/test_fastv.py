"""FastV against a slow transcription of its formula."""

from __future__ import annotations

import re
from typing import Any

import lightvlm
import pytest
from lightvlm.methods.base import Stage
from lightvlm.methods.fastv import FastVPrefill
from python.field.scored import ROWS, UNEVEN, SlowScored, check
from python.tiny import LLAVA, QWEN


class SlowFastV(SlowScored):
    """s_j = (1/H) sum_h A[h, last, j] of layer K - 1; the highest stay, and keep their positions."""


@pytest.mark.parametrize("options", [{}, {"keep": 0.2, "layer": 3}], ids=["published", "late"])
def test_fastv_is_what_it_says(llava: Any, options: dict[str, Any]) -> None:
    check(llava, LLAVA, SlowFastV, lightvlm.FastV(**options, min_image_tokens=0), ROWS)


def test_images_of_any_size(qwen: Any) -> None:
    check(qwen, QWEN, SlowFastV, lightvlm.FastV(0.3, min_image_tokens=0), UNEVEN)


def test_published_defaults() -> None:
    assert lightvlm.FastV().prefill.stages(32) == (Stage(2, 0.5),)  # type: ignore[union-attr]
    assert lightvlm.method("fastv") == lightvlm.FastV()
    assert FastVPrefill(keep=1, layer=40).stages(32) == ()


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=re.escape("layer must be within 1..31, got 32")):
        FastVPrefill(layer=32).stages(32)
    with pytest.raises(ValueError, match="layer must be at least 1, got 0"):
        lightvlm.FastV(layer=0)
    with pytest.raises(ValueError, match=re.escape("keep must be in (0, 1], got 0")):
        lightvlm.FastV(0)
    with pytest.raises(TypeError, match=re.escape("layer must be int, got 2.5")):
        lightvlm.FastV(layer=2.5)
