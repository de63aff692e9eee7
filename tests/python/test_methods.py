"""Methods: their schedules and counts, and what they do to one stage."""

from __future__ import annotations

import math
import re
from typing import Any

import lightvlm
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightvlm.layout import RowLayout, Run
from lightvlm.methods.base import Stage, StageInput, keep_count, scaled_layers
from lightvlm.methods.lightvlm import LightVLMPrefill, default_layers
from lightvlm.methods.random import RandomPrefill
from lightvlm.session import Level, plan_stage


def test_registry() -> None:
    names = lightvlm.method_names()
    assert names == sorted(names)
    assert {"lightkv", "lightvlm", "random", "zipvl"} <= set(names)
    assert lightvlm.method("lightvlm", keep=0.5) == lightvlm.LightVLM(keep=0.5)
    assert lightvlm.method("random") == lightvlm.Random()
    with pytest.raises(ValueError, match=r"method must be one of .*lightvlm, .*zipvl, got 'quickv'"):
        lightvlm.method("quickv")
    with pytest.raises(TypeError, match="strenth"):
        lightvlm.method("lightvlm", strenth=1)


@given(st.integers(1, 5000), st.floats(0.001, 1.0))
def test_keep_count(tokens: int, keep: float) -> None:
    count = keep_count(tokens, keep)
    assert count == max(1, math.floor(keep * tokens + 0.5))
    assert 1 <= count <= tokens


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 8, 24, 28, 32, 80])
@pytest.mark.parametrize(("keep", "first"), [(0.03, 0.5), (0.25, 0.5), (0.35, 0.7), (0.5, 1.0), (0.6, 1.0)])
def test_default_schedule(depth: int, keep: float, first: float) -> None:
    layers = default_layers(depth)
    assert list(layers) == sorted(set(layers))
    assert layers[0] >= 1
    assert layers[-1] < depth
    stages = LightVLMPrefill(keep=keep).stages(depth)
    if first < 1:
        assert stages[0] == Stage(0, first)
        stages = stages[1:]
    assert [stage.layer for stage in stages] == list(layers)
    assert stages[-1].keep == keep
    ratios = [b.keep / a for a, b in zip([first, *(s.keep for s in stages)], stages, strict=False)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_documented_schedules() -> None:
    assert default_layers(8) == (3, 5, 6)
    assert default_layers(28) == (10, 18, 21)
    assert [stage.layer for stage in RandomPrefill().stages(28)] == [2, 8, 16]


@pytest.mark.parametrize(
    ("published", "depth", "layers", "expected"),
    [
        ((2, 6, 15), 32, 32, (2, 6, 15)),
        ((2, 6, 15), 32, 28, (2, 5, 13)),
        ((1, 2, 3), 4, 32, (8, 16, 24)),
        ((6, 7, 8), 28, 8, (2, 3, 4)),  # 1.7, 2, 2.3 of 8: each above the one before
        ((6, 7, 8), 28, 3, (1, 2)),  # no room for a third
        ((6, 7, 8), 28, 1, (0,)),
    ],
)
def test_published_layers_at_another_depth(
    published: tuple[int, ...], depth: int, layers: int, expected: tuple[int, ...]
) -> None:
    assert scaled_layers(layers, published, depth) == expected


def test_spread() -> None:
    """The first stage may be left out, moved, or asked for beside layers of one's own."""
    assert LightVLMPrefill(0.2, spread=1.0).stages(8)[0] == Stage(3, pytest.approx(0.2 ** (1 / 3)))
    assert LightVLMPrefill(0.2, layers=(2,)).stages(8) == (Stage(2, 0.2),)
    assert LightVLMPrefill(0.2, layers=(2,), spread=0.3).stages(8) == (Stage(0, 0.3), Stage(2, 0.2))
    assert LightVLMPrefill(1.0, spread=1.0).stages(8) == ()
    with pytest.raises(ValueError, match=r"spread must be at least keep \(0.4\), got 0.3"):
        LightVLMPrefill(0.4, spread=0.3)
    with pytest.raises(
        ValueError, match=r"fractions must lie in \(0, 0.3\] and not increase, got \(0.5, 0.2\)"
    ):
        LightVLMPrefill(0.2, spread=0.3, layers=(2, 3), fractions=(0.5, 0.2)).stages(8)


def test_keeping_everything_has_no_stage() -> None:
    assert LightVLMPrefill(keep=1.0).stages(8) == ()
    assert RandomPrefill(keep=1).stages(8) == ()


def test_own_schedule() -> None:
    part = LightVLMPrefill(keep=0.1, layers=(2, 5), fractions=(0.5, 0.1))
    assert part.stages(6) == (Stage(2, 0.5), Stage(5, 0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (6,)}, "layers must be ascending layer numbers within 0..5, got (6,)"),
        ({"layers": (-1,)}, "layers must be ascending layer numbers within 0..5, got (-1,)"),
        ({"layers": (3, 2)}, "layers must be ascending"),
        ({"layers": (2, 2)}, "layers must be ascending"),
        ({"layers": ()}, "layers must be ascending"),
        ({"layers": (0,)}, "layers must start at 1 or later: the score comes from the layer before"),
        ({"fractions": (0.3,)}, "fractions must have one entry per layer (3), got 1"),
        ({"layers": (2,), "fractions": (0.5,)}, "the last of fractions must be keep (0.3), got 0.5"),
        ({"layers": (1, 2), "fractions": (0.2, 0.3)}, "fractions must lie in (0, 1] and not increase"),
        ({"layers": (1, 2), "fractions": (1.5, 0.3)}, "fractions must lie in (0, 1] and not increase"),
    ],
)
def test_bad_schedules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LightVLMPrefill(keep=0.3, **options).stages(6)


def test_random_may_start_at_the_first_layer() -> None:
    assert RandomPrefill(keep=0.3, layers=(0,)).stages(6) == (Stage(0, 0.3),)


def test_counts_of_a_stage_never_grow() -> None:
    rows = (
        RowLayout(0, (Run(None, 2), Run(0, 10), Run(None, 1), Run(1, 3))),
        RowLayout(5, (Run(None, 11),)),
    )
    originals = [row.image_sizes for row in rows]
    part = RandomPrefill()
    first = plan_stage(Level(rows, 16), originals, Stage(2, 0.5), part.counts)
    assert first.keep == [[5, 2], []]
    assert [row.tokens for row in first.after.rows] == [10, 11]
    assert first.after.length == 11
    assert first.after.starts == [1, 0]
    # 0.45 of 10 rounds to 5 and of 3 to 1: counts are of the original tokens, whatever the stage before left
    second = plan_stage(first.after, originals, Stage(3, 0.45), part.counts)
    assert second.keep == [[5, 1], []]
    assert second.after.tail == 0


def stage_input(segment: list[int], keep: list[int], width: int = 8) -> StageInput:
    """One row with random states; text where the segment is -1."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([segment], dtype=torch.int32)
    within = [segment[:i].count(s) if s >= 0 else 0 for i, s in enumerate(segment)]
    return StageInput(
        hidden=torch.randn(1, len(segment), width, generator=generator),
        scores=torch.rand(1, len(segment), generator=generator),
        segment=ids,
        within=torch.tensor([within], dtype=torch.int32),
        text=ids < 0,
        keep=torch.tensor([keep], dtype=torch.int32),
        capacity=segment.count(-1) + sum(keep),
    )


@pytest.mark.parametrize("merge", ["uniform", "score", "drop"])
@pytest.mark.parametrize("selection", ["diverse", "top"])
def test_lightvlm_reduces_each_image_to_its_count(selection: Any, merge: Any) -> None:
    stage = stage_input([-1, 0, 0, 0, 0, -1, 1, 1, 1, -1], [2, 1])
    reduced = LightVLMPrefill(selection=selection, merge=merge).reduce(stage)
    index = reduced.selection.index[0].tolist()
    assert reduced.selection.count.tolist() == [6]
    assert [stage.segment[0, i].item() for i in index] == [-1, 0, 0, -1, 1, -1]
    texts = [slot for slot, i in enumerate(index) if stage.text[0, i]]
    assert torch.equal(reduced.hidden[0, texts], stage.hidden[0, [index[slot] for slot in texts]])
    if merge == "drop":
        assert torch.equal(reduced.hidden[0], stage.hidden[0, index])
    else:
        assert not torch.equal(reduced.hidden[0], stage.hidden[0, index])


def test_uniform_merging_keeps_the_sum_over_equal_tokens() -> None:
    """Two tokens kept, each with one identical twin: uniform merging changes neither."""
    stage = stage_input([0, 0, 0, 0, -1], [2])
    stage.hidden[0, 2:4] = stage.hidden[0, :2]
    stage.scores[0] = torch.tensor([4.0, 3.0, 1.0, 2.0, 0.0])  # type: ignore[index]
    reduced = LightVLMPrefill(selection="top").reduce(stage)
    assert reduced.selection.index.tolist() == [[0, 1, 4]]
    assert torch.allclose(reduced.hidden[0, :2], stage.hidden[0, :2])


def test_random_keeps_nested_subsets_that_depend_on_the_seed_alone() -> None:
    segment = [-1] + [0] * 40 + [-1] * 3
    kept = {}
    for count in (40, 20, 5):
        reduced = RandomPrefill(seed=4).reduce(stage_input(segment, [count]))
        kept[count] = {i for i in reduced.selection.index[0].tolist() if segment[i] == 0}
        assert len(kept[count]) == count
    assert kept[5] < kept[20] < kept[40]
    shifted = RandomPrefill(seed=4).reduce(stage_input([-1, -1, *segment], [5]))
    assert {i - 2 for i in shifted.selection.index[0].tolist() if i > 2 and i < 43} == kept[5]
    other = RandomPrefill(seed=5).reduce(stage_input(segment, [5]))
    assert {i for i in other.selection.index[0].tolist() if segment[i] == 0} != kept[5]


def test_random_merging_is_an_option() -> None:
    stage = stage_input([0] * 6 + [-1], [2])
    dropped = RandomPrefill().reduce(stage)
    merged = RandomPrefill(merge="uniform").reduce(stage)
    assert torch.equal(dropped.selection.index, merged.selection.index)
    assert not torch.equal(dropped.hidden[0, :2], merged.hidden[0, :2])
    assert torch.equal(dropped.hidden[0, 2], merged.hidden[0, 2])
