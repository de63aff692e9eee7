"""Average pooling over an image's grid, against a slow implementation."""

from __future__ import annotations

import math
from typing import Any

import lightvlm
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightvlm.methods.base import Picture, Stage, StageInput
from lightvlm.methods.downsample import DownsamplePrefill, smaller_grid
from python.field.against_slow import SlowMethod, check
from python.test_prefill import ROWS, UNEVEN
from python.tiny import QWEN, Family, Video

SIZES = {(4, 4): (2, 2), (3, 5): (2, 2), (1, 1): (1, 1), (7, 2): (4, 1), (2, 3): (1, 1), (3, 4): (1, 3)}
"""What 0.3 leaves of a frame, found by hand."""


class Slow(SlowMethod):
    def budget(self, tokens: int, size: int, keep: float, image: int) -> int:
        return 0  # not asked for

    def choose(
        self, out: Any, hidden: Any, tokens: list[int], budget: int, *, image: int, **_: Any
    ) -> list[int]:
        frames, height, width = self.grids[image]
        rows, columns = SIZES[height, width]
        left = []
        for frame in range(frames):
            for i in range(rows):
                for j in range(columns):
                    top, bottom = math.floor(i * height / rows), math.ceil((i + 1) * height / rows)
                    first, end = math.floor(j * width / columns), math.ceil((j + 1) * width / columns)
                    cell = [
                        tokens[(frame * height + y) * width + x]
                        for y in range(top, bottom)
                        for x in range(first, end)
                    ]
                    middle = (frame * height + (top + bottom - 1) // 2) * width + (first + end - 1) // 2
                    out[tokens[middle]] = sum(hidden[token] for token in cell) / len(cell)
                    left.append(tokens[middle])
        return left


@pytest.mark.parametrize("layer", [0, 2])
def test_downsampling_is_what_it_says(model: Any, family: Family, layer: int) -> None:
    rows = [*ROWS, *UNEVEN[:2]] if family is QWEN else ROWS
    kept = check(model, family, DownsamplePrefill(0.3, layer=layer, min_image_tokens=0), rows, Slow)
    assert kept[layer][2] == [[0, 2, 8, 10], [0, 2, 8, 10]]


def test_frames_are_pooled_one_by_one(qwen: Any) -> None:
    rows = [[1, Video(0, 3, 3, 4), 2, 3], [4, 5, Video(1, 2, 4, 4), 6, Video(2, 2, 2, 3), 7]]
    kept = check(qwen, QWEN, DownsamplePrefill(0.3, min_image_tokens=0), rows, Slow)
    assert [len(video) for video in kept[0][1]] == [8, 2]


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.001, 0.999))
def test_smaller_grids(height: int, width: int, keep: float) -> None:
    frames, rows, columns = smaller_grid((3, height, width), keep)
    assert frames == 3
    assert 1 <= rows <= height
    assert 1 <= columns <= width
    assert rows * columns <= max(1, keep * height * width + 1e-6)
    # one side more would not fit, or the shape would suffer: a side is never more than one off its share, unless the
    # other is as short as it can be
    share = math.sqrt(keep)
    assert (
        rows * columns >= max(1, math.floor(share * height)) * max(1, math.floor(share * width))
        or min(rows, columns) == 1
    )


@pytest.mark.parametrize(
    ("grid", "keep", "expected"),
    [
        ((1, 24, 24), 0.35, (1, 14, 14)),
        ((1, 24, 24), 0.25, (1, 12, 12)),
        ((1, 1, 16), 0.35, (1, 1, 5)),
        ((1, 16, 1), 0.35, (1, 5, 1)),
        ((4, 12, 20), 0.5, (4, 8, 15)),
        ((1, 2, 2), 0.1, (1, 1, 1)),
    ],
)
def test_known_grids(grid: tuple[int, int, int], keep: float, expected: tuple[int, int, int]) -> None:
    assert smaller_grid(grid, keep) == expected


def test_without_a_grid_an_image_is_a_row() -> None:
    segment = torch.tensor([[-1, 0, 0, 0, 0, 0, 0, -1]], dtype=torch.int32)
    picture = Picture(0, 1, 7, 6, 6)
    part, stage = DownsamplePrefill(0.5), Stage(0, 0.5)
    assert part.counts(stage, [picture]) == [3]
    hidden = torch.arange(16.0).view(1, 8, 2)
    reduced = part.reduce(
        StageInput(
            hidden=hidden,
            scores=None,
            segment=segment,
            within=torch.tensor([[0, 0, 1, 2, 3, 4, 5, 0]], dtype=torch.int32),
            text=segment < 0,
            keep=torch.tensor([[3]], dtype=torch.int32),
            capacity=5,
            stage=stage,
            pictures=((Picture(0, 1, 7, 6, 3),),),
        )
    )
    assert reduced.selection.index.tolist() == [[0, 1, 3, 5, 7]]
    assert reduced.hidden[0].tolist() == [[0, 1], [3, 4], [7, 8], [11, 12], [14, 15]]


def test_options() -> None:
    assert DownsamplePrefill().stages(8) == (Stage(0, 0.35),)
    assert DownsamplePrefill(1).stages(8) == ()
    assert lightvlm.method("downsample", keep=0.2) == lightvlm.Downsample(0.2)
    with pytest.raises(ValueError, match=r"layers must be ascending layer numbers within 0..5, got \(6,\)"):
        DownsamplePrefill(layer=6).stages(6)
    with pytest.raises(ValueError, match="layer must be at least 0, got -1"):
        DownsamplePrefill(layer=-1)
