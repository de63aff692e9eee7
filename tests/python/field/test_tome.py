"""ToMe inside the decoder, against a slow implementation."""

from __future__ import annotations

import itertools
import re
from typing import Any

import lightvlm
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightvlm.methods.base import Picture, keep_count
from lightvlm.methods.tome import ToMePrefill, constant_steps
from python.field.against_slow import SlowMethod, check, cosine
from python.test_prefill import ROWS, UNEVEN, prompt
from python.tiny import DEPTH, LLAVA, QWEN, Family


class Slow(SlowMethod):
    """Counts are what the part says (tested below); sizes go along with the tokens."""

    sizes: list[float] | None = None

    def budget(self, tokens: int, size: int, keep: float, image: int) -> int:
        stage = next(stage for stage in self.part.stages(DEPTH) if stage.layer == len(self.keys))
        return int(self.part.counts(stage, [Picture(0, 0, tokens, size, 0)])[0])

    def _reduce(self, hidden: Any, segment: list[int], *rest: Any) -> Any:
        self.sizes = [1.0] * len(segment) if self.sizes is None else self.sizes
        out, left = super()._reduce(hidden, segment, *rest)
        self.sizes = [self.sizes[i] for i in left]
        return out, left

    def choose(self, out: Any, hidden: Any, tokens: list[int], budget: int, **_: Any) -> list[int]:
        assert self.sizes is not None
        metric = self.keys[-1].mean(dim=0)  # of the layer before
        sources, destinations = tokens[::2], tokens[1::2]
        pairs = len(tokens) - budget
        if pairs == 0:
            return tokens
        partner, likeness = {}, []
        for a in sources:
            values = [cosine(metric[a], metric[b]) for b in destinations]
            likeness.append(max(values))
            partner[a] = destinations[self.best(values)]
        merged = self.highest(sources, likeness, pairs)
        for b in destinations:
            group = [b, *(a for a in merged if partner[a] == b)]
            weight = sum(self.sizes[i] for i in group)
            out[b] = sum(self.sizes[i] * hidden[i] for i in group) / weight
            self.sizes[b] = weight
        return [i for i in tokens if i not in merged]


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "halves": {"keep": 0.1},
    "layers": {"keep": 0.3, "layers": (2, 4)},
    "fractions": {"keep": 0.4, "layers": (1, 3), "fractions": (0.8, 0.4)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tome_is_what_it_says(model: Any, family: Family, name: str) -> None:
    rows = [*ROWS, *UNEVEN[:2]] if family is QWEN else ROWS
    part = ToMePrefill(min_image_tokens=0, **OPTIONS[name])
    kept = check(model, family, part, rows, Slow)
    final = keep_count(16, part.keep)
    assert [len(image) for image in kept[4 if name != "fractions" else 3][2]] == [final, final]


def test_sizes_are_those_of_all_that_merged(llava: Any) -> None:
    """Weights matter: were each token to count as one, the second merge would give something else."""
    part = ToMePrefill(0.25, layers=(1, 2), min_image_tokens=0)
    slow = Slow(llava, part, [(1, 4, 4)])
    slow.read(LLAVA.batch([ROWS[0]]))
    assert slow.sizes is not None
    assert sum(slow.sizes) == 5 + 16
    assert max(slow.sizes) > 2


@given(st.integers(1, 40), st.floats(0.005, 0.99), st.integers(1, 600))
def test_the_schedule_leads_to_keep(stages: int, keep: float, tokens: int) -> None:
    if keep * 2**stages < 1:
        with pytest.raises(ValueError, match="keep must be at least"):
            constant_steps(stages, keep)
        return
    part = ToMePrefill(keep)
    found = part.stages(stages + 1)
    assert [stage.layer for stage in found] == list(range(1, stages + 1))
    left = tokens
    for stage in found:
        (count,) = part.counts(stage, [Picture(0, 0, left, tokens, 0)])
        assert left - left // 2 <= count <= left
        left = count
    if tokens <= keep_count(tokens, keep) * 2**stages:  # else no halving leads there
        assert left == keep_count(tokens, keep)
    if keep >= 1 / (stages + 1):  # no stage has to halve
        shares = [1.0, *(stage.keep for stage in found)]
        steps = [before - after for before, after in itertools.pairwise(shares)]
        assert steps == pytest.approx([(1 - keep) / stages] * stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 1)}, "layers must start at 1 or later: the keys come from the layer before"),
        ({"layers": (3, 6)}, "layers must be ascending layer numbers within 0..5, got (3, 6)"),
        ({"layers": ()}, "layers must be ascending layer numbers"),
        (
            {"layers": (2,)},
            "keep must be at least 0.5: each of 1 layers can merge half of its tokens, got 0.3",
        ),
        (
            {"layers": (1, 2), "fractions": (0.7, 0.3)},
            "fractions must not fall to less than a half at once (layer 2",
        ),
        ({"fractions": (0.5, 0.3)}, "fractions must have one entry per layer (5), got 2"),
    ],
)
def test_bad_schedules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ToMePrefill(0.3, **options).stages(6)


def test_options() -> None:
    assert constant_steps(4, 0.4) == pytest.approx((0.85, 0.7, 0.55, 0.4))
    assert constant_steps(4, 0.1) == pytest.approx((0.775, 0.4, 0.2, 0.1))
    assert ToMePrefill(1).stages(8) == ()
    assert lightvlm.method("tome", keep=0.2) == lightvlm.ToMe(0.2)


def test_the_same_input_gives_the_same_bits(model: Any, family: Family) -> None:
    with torch.no_grad(), lightvlm.attach(model, lightvlm.ToMe(0.2, min_image_tokens=0)):
        first, second = (model(**prompt(family, ROWS)).logits for _ in range(2))
    assert torch.equal(first, second)
