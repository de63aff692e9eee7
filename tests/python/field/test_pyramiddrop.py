"""PyramidDrop against a slow transcription of its formula."""

from __future__ import annotations

import re
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.base import Stage
from lightvlm.methods.pyramiddrop import PyramidDropPrefill
from python.field.scored import ROWS, UNEVEN, SlowScored, check
from python.slow import _weights
from python.test_prefill import noise, prompt
from python.tiny import INTERNVL, LLAVA, QWEN, generate_logits
from torch import Tensor


class SlowPyramidDrop(SlowScored):
    """softmax(q_last K^T / sqrt(D)), mean over heads, with the coming layer's queries and keys of the tokens as they
    are before it."""

    def _project(self, layer: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.places = positions
        return super()._project(layer, hidden, positions)

    def _reduce(self, hidden: Tensor, *args: Any) -> tuple[Tensor, list[int]]:
        *others, _, keep = args
        coming = self.layers[len(self.keys)]
        query, key, _ = self._project(coming, hidden, self.places)
        scores = _weights(query, key, coming.self_attn.scaling)[:, -1].mean(dim=0)
        return super()._reduce(hidden, *others, scores, keep)


OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "positions": {"positions": "keep", "keep": 0.25},
    "prompt": {"positions": "renumber_prompt", "layers": (2, 3), "fractions": (0.6, 0.2), "keep": 0.2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pyramiddrop_is_what_it_says(llava: Any, name: str) -> None:
    check(llava, LLAVA, SlowPyramidDrop, lightvlm.PyramidDrop(**OPTIONS[name], min_image_tokens=0), ROWS)


@pytest.mark.parametrize("name", OPTIONS)
def test_images_of_any_size(qwen: Any, name: str) -> None:
    check(qwen, QWEN, SlowPyramidDrop, lightvlm.PyramidDrop(**OPTIONS[name], min_image_tokens=0), UNEVEN)


@pytest.mark.parametrize("family", [LLAVA, INTERNVL, QWEN], ids=lambda family: family.name)
def test_rating_an_answer(model: Any, family: Any) -> None:
    """The question's last token scores, not the answer's; the logits are those of generating it."""
    with torch.no_grad(), lightvlm.attach(model, lightvlm.PyramidDrop(min_image_tokens=0)):
        tokens, expected = generate_logits(model, family.batch(ROWS), 5)
        answered = [[*row, *tokens[b, :-1].tolist()] for b, row in enumerate(ROWS)]
        found = model(**prompt(family, answered), logits_to_keep=5).logits
    assert (found - expected).abs().max() <= 4 * noise(model, family, ROWS) + 1e-5


def test_published_defaults() -> None:
    part = lightvlm.PyramidDrop().prefill
    assert part.stages(32) == (Stage(8, 0.5), Stage(16, 0.25), Stage(24, 0.125))  # type: ignore[union-attr]
    assert part.stages(40) == (Stage(10, 0.5), Stage(20, 0.25), Stage(30, 0.125))  # type: ignore[union-attr]
    assert part.positions == "renumber"  # type: ignore[union-attr]
    assert lightvlm.method("pyramiddrop") == lightvlm.PyramidDrop()
    assert PyramidDropPrefill(keep=1).stages(32) == ()


def test_bad_options() -> None:
    with pytest.raises(
        ValueError, match="positions must be one of 'keep', 'renumber', 'renumber_prompt', got 'new'"
    ):
        lightvlm.PyramidDrop(positions="new")
    with pytest.raises(
        ValueError, match=re.escape("layers must be ascending layer numbers within 0..31, got (40,)")
    ):
        PyramidDropPrefill(layers=(40,)).stages(32)
    with pytest.raises(ValueError, match=re.escape("the last of fractions must be keep (0.125), got 0.1")):
        PyramidDropPrefill(fractions=(0.5, 0.3, 0.1)).stages(32)
    with pytest.raises(ValueError, match=re.escape("keep must be in (0, 1], got 1.5")):
        lightvlm.PyramidDrop(1.5)
