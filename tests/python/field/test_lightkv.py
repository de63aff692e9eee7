"""LightKV against a slow transcription of its formulas, its published counts, and positions that are numbered anew."""

from __future__ import annotations

import math
import re
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache
from lightvlm.methods.base import Picture, Stage, kept_slots
from lightvlm.methods.lightkv import LightKVPrefill, default_layers
from python.slow import SlowDecoder
from python.test_prefill import noise, slow_options
from python.tiny import DEPTH, LLAVA, QWEN, Family, Image, generate_logits
from torch import Tensor

ROWS = [
    [1, 2, Image(1), 5, 6, 7, 8],
    [9, 8, 7],
    [4, Image(2), 1, Image(3), 2, 3],
]
LARGE = [
    [1, Image(1, 9, 7), 5, 6],
    [2, 3, 9, Image(2, 6, 8), 5, Image(3, 10, 4), 6, 7],
    [4, Image(4, 4, 4), 6, Image(5, 7, 7), 3],  # its first image is too small, so the row is left alone
]


class SlowLightKV(SlowDecoder):
    """LightKV's stage in plain loops: methods.md's steps 0 to 4."""

    def _project(self, layer: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super()._project(layer, hidden, positions)
        self.last = (query, key, layer.self_attn.scaling)
        return query, key, value

    def _score(self, weights: Tensor, segment: Any) -> Tensor:
        query, key, scale = self.last
        received = torch.zeros(len(segment), dtype=torch.float64)
        for head in range(len(query)):
            logits = query[head] @ key[head // (len(query) // len(key))].T * scale
            spread = logits.softmax(dim=0)  # over the queries, without a mask
            for token, image in enumerate(segment):
                if image < 0:
                    received += spread[:, token]
        return received

    def _reduce(
        self, hidden: Tensor, segment: list[int], within: Any, sizes: list[int], scores: Any, keep: float
    ) -> tuple[Tensor, list[int]]:
        assert self.prefill is not None
        stage = len(self.kept)
        ratio, grids = self.prefill["shares"][stage], self.prefill["grids"]
        tokens = [[i for i in range(len(segment)) if segment[i] == image] for image in range(len(sizes))]
        side = self.prefill["sides"][stage]
        scores = scores if self.prefill["guidance"] == "prompt" else None  # None at layer 0 in any case
        if any(len(image) < 8 * side**2 for image in tokens):
            return hidden, list(range(len(segment)))
        out, gone = hidden.clone(), set()
        for image, own in enumerate(tokens):
            windows: dict[tuple[int, int], list[int]] = {}
            edge = math.ceil(math.sqrt(len(own)))
            for place, token in enumerate(own):
                if grids is None:
                    where = (_part(place // edge, edge, side), _part(place % edge, edge, side))
                else:
                    height, width = grids[image]
                    row, column = divmod(within[token], width)
                    first = self.prefill["sides"][0]
                    where = (
                        row * first // height // (first // side),
                        column * first // width // (first // side),
                    )
                windows.setdefault(where, []).append(token)
            for window in windows.values():
                gone |= self._pass(out, hidden, scores, window, ratio)
        left = [i for i in range(len(segment)) if i not in gone]
        return out[left], left

    def _pass(self, out: Tensor, hidden: Tensor, scores: Any, window: list[int], ratio: float) -> set[int]:
        """Message passing within a window; returns the tokens that are gone."""
        sources, targets = window[0::2], window[1::2]
        pairs = min(math.floor(ratio * len(window) + 1e-9), len(window) // 2)
        if scores is not None and self.prefill["split"] == "diverse":
            targets = self._choose(window, scores, hidden, len(window) - pairs)
            sources = [i for i in window if i not in targets]
        best = {}
        for a in sources:
            distance = [1 - _cosine(hidden[a], hidden[b]) for b in targets]
            if targets:
                best[a] = (min(distance), targets[distance.index(min(distance))])
        order = sorted(best, key=lambda a: (best[a][0], a))
        merged = order[:pairs]
        for b in targets:
            arrive = [a for a in merged if best[a][1] == b]
            if arrive:
                weight = {i: 1.0 if scores is None else float(scores[i]) for i in [b, *arrive]}
                total = sum(weight.values())
                out[b] = sum(weight[i] * hidden[i] for i in [b, *arrive]) / max(total, 1e-8)
        return set(merged)


def _part(at: int, edge: int, side: int) -> int:
    """Part of a side of ``edge`` cells that cell ``at`` is in; the first parts are longer by one."""
    sizes = [edge // side + (part < edge % side) for part in range(side)]
    return next(part for part in range(side) if at < sum(sizes[: part + 1]))


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def slow_lightkv(model: Any, part: LightKVPrefill, grids: Any = None) -> SlowLightKV:
    stages = part.stages(DEPTH)
    sides = list(part.windows or (1,))
    options = (
        slow_options(part)
        | {
            "shares": [stage.ratios[-1] for stage in stages],  # type: ignore[attr-defined]
            "sides": (sides + sides[-1:] * len(stages))[: len(stages)],
            "grids": grids,
        }
    )
    slow = SlowLightKV(model, options)
    return slow


def compare(model: Any, family: Family, rows: Any, part: LightKVPrefill, steps: int = 5) -> dict[int, Any]:
    """Logits of a padded batch's prompt and of generated tokens against the slow decoder, row by row."""
    cache = CompactCache(model.config)
    with lightvlm.attach(model, lightvlm.Plan(prefill=part), trace=True) as run:
        tokens, logits = generate_logits(model, family.batch(rows), steps, past_key_values=cache)
    limit = 4 * noise(model, family, rows) + 1e-5
    for b, row in enumerate(rows):
        grids = [(item.height, item.width) for item in row if isinstance(item, Image)]
        slow = slow_lightkv(model, part, grids if part.raster == "grid" else None)
        expected = [slow.read(family.batch([row]))[-1]]
        expected += [slow.step(token) for token in tokens[b, :-1].tolist()]
        assert (logits[b] - torch.stack(expected)).abs().max() <= limit
        for stage, kept in run.kept.items():
            whole = [list(range(item.tokens)) for item in row if isinstance(item, Image)]
            assert kept[b] == slow.kept.get(stage, whole)
        assert [layer.ends[b] - layer.starts[b] for layer in cache.layers] == [
            keys.shape[1] for keys in slow.keys
        ]
    return run.kept


@pytest.mark.parametrize("positions", ["keep", "renumber", "renumber_prompt"])
@pytest.mark.parametrize("split", ["alternating", "diverse"])
def test_stages_are_what_the_paper_says(model: Any, family: Family, split: Any, positions: Any) -> None:
    part = LightKVPrefill(
        layers=(1, 2, 4), windows=(1,), split=split, positions=positions, min_image_tokens=0
    )
    kept = compare(model, family, ROWS, part)
    assert [len(image) for image in kept[1][2]] == [8, 8]
    assert [len(image) for image in kept[2][2]] == [4, 4]
    assert 4 not in kept  # 4 tokens are fewer than 8 a window


@pytest.mark.parametrize("guidance", ["prompt", "none"])
@pytest.mark.parametrize("raster", ["square", "grid"])
@pytest.mark.parametrize("split", ["alternating", "diverse"])
def test_windows_of_images_of_any_shape(split: Any, raster: Any, guidance: Any) -> None:
    part = LightKVPrefill(
        keep=0.4375,
        ratios=(0.5, 0.125),
        layers=(1, 3),
        windows=(2, 1),
        split=split,
        raster=raster,
        guidance=guidance,
        min_image_tokens=0,
    )
    kept = compare(QWEN.build(), QWEN, LARGE, part)
    assert len(kept[1][0][0]) < 9 * 7
    assert [len(image) for image in kept[3][2]] == [16 - 2, 49 - 6]  # one window is small enough


def test_causal_guidance_is_attention_from_the_text_behind(llava: Any) -> None:
    """Its weights are those of the slow model's causal attention, from rows behind the first image."""

    class SlowCausal(SlowLightKV):
        def _score(self, weights: Tensor, segment: Any) -> Tensor:
            first = next(i for i, image in enumerate(segment) if image >= 0)
            rows = [i for i, image in enumerate(segment) if image < 0 and i > first]
            self.prefill["guidance"] = "prompt"  # use them
            return weights[:, rows].sum(dim=(0, 1))

    part = LightKVPrefill(
        layers=(1,), keep=0.5, windows=(1,), guidance="causal", positions="keep", min_image_tokens=0
    )
    with lightvlm.attach(llava, lightvlm.Plan(prefill=part)), torch.no_grad():
        found = llava(**LLAVA.batch([ROWS[0]])).logits[0]
    slow = slow_lightkv(llava, part)
    slow.__class__ = SlowCausal
    expected = slow.read(LLAVA.batch([ROWS[0]]))
    assert (found - expected).abs().max() <= 4 * noise(llava, LLAVA, ROWS) + 1e-5


SHORT = [[1, 2, Image(1), 5, 6, 7, 8, 9], [9, 8, 7]]
FEW_BEHIND = [[1, 2, 3, 4, 5, 6, 7, Image(1), 5, 6], [4, Image(2), 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("rows", [SHORT, FEW_BEHIND], ids=["a row is drafts", "drafts of some rows"])
@pytest.mark.parametrize("guidance", ["prompt", "causal"])
def test_drafts_of_some_rows(llava: Any, rows: Any, guidance: Any) -> None:
    """Rows whose text is not longer than the drafts ask with all of it, which shifts no other row's weights."""
    plan = lightvlm.LightKV(0.7, layers=(2,), windows=(1,), guidance=guidance, min_image_tokens=0)
    with torch.no_grad(), lightvlm.attach(llava, plan):
        together = llava(**LLAVA.batch(rows), logits_to_keep=4).logits
        for row, found in zip(rows, together, strict=True):
            alone = llava(**LLAVA.batch([row]), logits_to_keep=4).logits[0]
            assert (found[-len(alone) :] - alone).abs().max() <= 1e-4


@pytest.mark.parametrize("tokens", [576, 2144])
def test_published_counts(tokens: int) -> None:
    part = LightKVPrefill()
    left, counts = tokens, []
    for stage in part.stages(40):
        left = part.counts(stage, [Picture(0, 5, 5 + left, tokens, left)])[0]
        counts.append(left)
    assert counts == {576: [288, 145, 73], 2144: [1073, 537, 269]}[tokens]


@pytest.mark.parametrize(
    ("depth", "layers", "share"),
    [
        (40, (10, 20, 30), 0.469),
        (40, (15, 23, 31), 0.553),
        (40, (17, 24, 31), 0.584),
        (32, (12, 18, 24), 0.547),
        (28, (12, 17, 22), 0.589),
    ],
)
def test_published_shares_of_the_cache(depth: int, layers: tuple[int, ...], share: float) -> None:
    stages = LightKVPrefill(layers=layers).stages(depth)
    assert kept_slots(stages, depth) == pytest.approx(share, abs=5e-4)
    if depth != 40 or layers == (15, 23, 31):
        assert default_layers(depth) == layers


@pytest.mark.parametrize("depth", [4, 5, 8, 12, 24, 36, 64, 80])
@pytest.mark.parametrize("keep", [0.5, 0.125, 0.1])
def test_rule_for_any_depth(depth: int, keep: float) -> None:
    part = LightKVPrefill(keep=keep)
    if depth == 4 and keep == 0.1:
        with pytest.raises(
            ValueError, match=re.escape("keep (0.1) needs 4 stages, more than a decoder of 4 layers")
        ):
            part.stages(depth)
        return
    stages = part.stages(depth)
    at = [stage.layer for stage in stages]
    assert at == sorted(set(at))
    assert 1 <= at[0] <= max(1, round(0.4 * depth)) or depth < 8
    assert at[-1] < depth
    assert stages[-1].keep == pytest.approx(keep)
    assert all(stage.ratios[-1] <= 0.5 + 1e-9 for stage in stages)  # type: ignore[attr-defined]


def test_kept_slots_of_no_stage() -> None:
    assert kept_slots((), 8) == 1.0
    assert kept_slots((Stage(0, 0.25),), 8) == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (0.5, 0.6)}, "ratios must lie in (0, 0.5], got (0.5, 0.6)"),
        ({"ratios": (0.5,)}, "keep must be what ratios leave (0.5), got 0.125"),
        ({"windows": ()}, "windows must be at least 1 and not increase, got ()"),
        ({"windows": (2, 4)}, "windows must be at least 1 and not increase, got (2, 4)"),
        ({"windows": (6, 4, 2), "raster": "grid"}, "must each divide the ones before, got (6, 4, 2)"),
        ({"guidance": "text"}, "guidance must be one of 'prompt', 'causal', 'none', got 'text'"),
        ({"positions": "anew"}, "positions must be one of"),
        ({"keep": 0.0}, "keep must be in (0, 1]"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        lightvlm.method("lightkv", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (2, 8, 9)}, "layers must be ascending layer numbers within 0..7, got (2, 8, 9)"),
        ({"layers": (2, 3)}, "keep (0.125) needs at least 3 layers, as each at most halves, got (2, 3)"),
        (
            {"layers": (2, 3), "ratios": (0.5,), "keep": 0.5},
            "ratios must have one entry per layer (2), got 1",
        ),
    ],
)
def test_bad_schedules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LightKVPrefill(**options).stages(8)
    assert LightKVPrefill(keep=1.0).stages(8) == ()


def test_a_stage_before_the_first_layer_has_equal_weights(model: Any, family: Family) -> None:
    part = LightKVPrefill(layers=(0, 2), keep=0.25, windows=(1,), min_image_tokens=0)
    kept = compare(model, family, ROWS, part)
    assert [len(image) for image in kept[0][2]] == [8, 8]
