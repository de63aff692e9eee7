"""FrameFusion, against a slow implementation."""

from __future__ import annotations

import math
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.base import Picture, Probe, Stage
from lightvlm.methods.framefusion import FrameFusionPrefill
from python.field.against_slow import SlowMethod, check, cosine
from python.test_prefill import ROWS, UNEVEN
from python.tiny import QWEN, Family, Image, Row, Video, generate
from torch import Tensor

VIDEOS: list[Row] = [
    [1, 2, Video(0, 4, 2, 3), 3, 4],
    [5, 6, 7],
    [8, Video(1, 3, 3, 2), 9, Video(2, 5, 2, 2), 10, 11, 12],
    [13, Video(3, 1, 3, 3), 14],
]
MIXED: list[Row] = [
    [1, Image(4, 3, 3), 2, Video(5, 4, 2, 2), 3],
    [4, Video(6, 3, 2, 3), 5, Image(7, 2, 4), 6],
]


class Slow(SlowMethod):
    """Frame by frame: each merged token joins the one that its predecessor of the same patch is in."""

    def budget(self, tokens: int, size: int, keep: float, image: int) -> int:
        frames, height, width = self.grids[image]
        kept = super().budget(tokens, size, keep, image)
        if len(self.keys) not in self.part.merge_layers:
            return kept
        return tokens if frames == 1 else min(tokens, max(height * width, kept))

    def _score(self, weights: Tensor, segment: Any) -> Tensor:
        return weights.mean(dim=(0, 1))  # over heads and all rows

    def choose(
        self,
        out: Any,
        hidden: Any,
        tokens: list[int],
        budget: int,
        *,
        image: int,
        within: list[int],
        scores: Tensor,
        **_: Any,
    ) -> list[int]:
        if len(self.keys) not in self.part.merge_layers:
            return self.highest(tokens, [float(scores[i]) for i in tokens], budget)
        _, height, width = self.grids[image]
        before: dict[int, int] = {}
        latest: dict[int, int] = {}
        for token in tokens:
            patch = within[token] % (height * width)
            if patch in latest:
                before[token] = latest[patch]
            latest[patch] = token
        candidates = list(before)
        likeness = [cosine(hidden[i], hidden[before[i]]) for i in candidates]
        merged = self.highest(candidates, likeness, len(tokens) - budget)
        runs: dict[int, list[int]] = {}
        head: dict[int, int] = {}
        for token in tokens:
            head[token] = head[before[token]] if token in merged else token
            runs.setdefault(head[token], []).append(token)
        for first, run in runs.items():
            out[first] = sum(hidden[i] for i in run) / len(run)
        return sorted(runs)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "two-merges": {"keep": 0.25, "merge_layers": (0, 2), "prune_layer": 4},
    "mostly-merged": {"keep": 0.35, "merge_share": 1.0, "merge_layers": (1,)},
    "pruned-only": {"keep": 0.4, "merge_share": 0.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_videos(qwen: Any, name: str) -> None:
    part = FrameFusionPrefill(min_image_tokens=0, **OPTIONS[name])
    kept = check(qwen, QWEN, part, VIDEOS, Slow)
    assert list(kept) == [
        stage.layer for stage in part.stages(5) if name != "pruned-only" or stage.layer == 1
    ]
    final = kept[max(kept)]
    tokens = ([24], [], [18, 20], [9])
    assert [[len(video) for video in row] for row in final] == [
        [math.floor(part.keep * size + 0.5) for size in row] for row in tokens
    ]


def test_images_and_videos_mixed(qwen: Any) -> None:
    """Which grid is whose is read from the positions, where generate() gives them."""
    plan = lightvlm.FrameFusion(0.3, min_image_tokens=0)
    with lightvlm.attach(qwen, plan, trace=True) as run:
        tokens = generate(qwen, QWEN.batch(MIXED), 4)
        kept = run.kept
        alone = []
        for b, row in enumerate(MIXED):
            alone.append(generate(qwen, QWEN.batch([row]), 4)[0])
            assert {layer: rows[0] for layer, rows in run.kept.items()} == {
                layer: rows[b] for layer, rows in kept.items()
            }
    assert torch.equal(tokens, torch.stack(alone))
    assert [[len(picture) for picture in row] for row in kept[0]] == [[9, 10], [12, 8]]
    assert [[len(picture) for picture in row] for row in kept[1]] == [[3, 5], [5, 2]]


def test_images_are_pruned_only(model: Any, family: Family) -> None:
    rows = [*ROWS, *UNEVEN[:2]] if family is QWEN else ROWS
    kept = check(model, family, FrameFusionPrefill(min_image_tokens=0), rows, Slow)
    assert list(kept) == [1]


def test_the_first_token_of_a_patch_never_merges() -> None:
    """4 frames of 5 tokens, of which 0.1 shall stay: merging alone cannot get below 5."""
    part = FrameFusionPrefill(0.1, merge_share=1.0, merge_layers=(0,))
    merge, prune = part.stages(8)
    assert part.counts(merge, [Picture(0, 0, 20, 20, 0, (4, 1, 5))]) == [5]
    assert part.counts(prune, [Picture(0, 0, 5, 20, 0, (4, 1, 5))]) == [2]
    assert part.counts(merge, [Picture(0, 0, 20, 20, 0, None)]) == [20]
    assert part.counts(prune, [Picture(0, 0, 20, 20, 0, None)]) == [2]


def test_options() -> None:
    part = FrameFusionPrefill()
    assert part.stages(28) == (Stage(0, 0.65), Stage(1, 0.3))
    assert part.probe == Probe(rows="all", over_rows="sum")
    assert FrameFusionPrefill(0.4, merge_layers=(1, 2), prune_layer=5).stages(8) == (
        Stage(1, 0.85),
        Stage(2, 0.7),
        Stage(5, 0.4),
    )
    assert FrameFusionPrefill(1).stages(8) == ()
    assert lightvlm.method("framefusion", keep=0.2) == lightvlm.FrameFusion(0.2)
    assert lightvlm.Plan.from_json(lightvlm.FrameFusion(0.2).to_json()) == lightvlm.FrameFusion(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_layers": ()}, r"merge_layers must have at least one layer, got \(\)"),
        ({"merge_share": 1.5}, "merge_share must be at most 1.0, got 1.5"),
        ({"prune_layer": 0}, "prune_layer must be at least 1, got 0"),
        ({"merge_layers": (2,), "prune_layer": 1}, r"must ascend within 0..5, got \(2,\) and 1"),
        ({"merge_layers": (2, 1)}, r"must ascend within 0..5, got \(2, 1\) and 2"),
        ({"merge_layers": (5,)}, r"must ascend within 0..5, got \(5,\) and 6"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrameFusionPrefill(0.3, **options).stages(6)
