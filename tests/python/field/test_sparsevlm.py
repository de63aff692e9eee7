"""SparseVLM against a slow transcription of its formulas."""

from __future__ import annotations

import math
import re
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods import sparsevlm
from lightvlm.methods.base import Picture, Stage
from lightvlm.methods.sparsevlm import SparseVLMPrefill
from python.field.scored import ROWS, UNEVEN, SlowScored, check
from python.slow import _segments
from python.test_prefill import noise, prompt
from python.tiny import INTERNVL, LLAVA, QWEN, Image, generate_logits
from torch import Tensor


class SlowSparseVLM(SlowScored):
    """Raters from the embeddings, their mean attention, and density peaks of the best that is dropped."""

    raters: list[int] | None = None
    """Which of the prompt's text tokens rate; None: all behind the first image."""

    def _embed(self, inputs: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
        hidden, sizes = super()._embed(inputs)
        if sizes:
            segment = _segments(inputs["input_ids"][0], sizes)
            images = [i for i, image in enumerate(segment) if image >= 0]
            text = [i for i, image in enumerate(segment) if image < 0]
            self.raters = self.rate(hidden, images, text) if text[-1] > images[-1] else None
        return hidden, sizes

    def rate(self, hidden: Tensor, images: list[int], text: list[int]) -> list[int]:
        behind = [t for t in text if t > images[-1]]
        rating = dict.fromkeys(behind, 0.0)
        for v in images:
            logits = [float(hidden[v] @ hidden[t]) for t in behind]
            total = sum(math.exp(x - max(logits)) for x in logits)
            for t, x in zip(behind, logits, strict=True):
                rating[t] += math.exp(x - max(logits)) / total / len(images)
        mean = sum(rating.values()) / len(rating)
        for t in behind:
            self.compare(rating[t], mean)
        return [number for number, t in enumerate(text) if t in rating and rating[t] > mean]

    def _score(self, weights: Tensor, segment: Any) -> Tensor:
        text = [i for i, image in enumerate(segment) if image < 0]
        if self.raters is not None:
            return weights[:, [text[number] for number in self.raters]].mean(dim=(0, 1))
        first = min(i for i, image in enumerate(segment) if image >= 0)
        rows = [i for i in text if i > first] or [len(segment) - 1]
        seen = torch.tensor([max(1, sum(row >= token for row in rows)) for token in range(len(segment))])
        return weights[:, rows].mean(dim=0).sum(dim=0) / seen

    def _choose(self, tokens: list[int], scores: Tensor, hidden: Tensor, budget: int) -> list[int]:
        self.means: dict[int, Tensor] = {}
        assert self.prefill is not None
        if not self.prefill["recycle"] or budget == len(tokens):
            return super()._choose(tokens, scores, hidden, budget)
        kept, some, centres = budget, 0, 0
        while True:
            dropped = len(tokens) - kept
            some = int(0.3 * dropped) + 1
            centres = int(some / 10) + 1
            if kept + centres <= budget or kept == 1:
                break
            kept -= 1
        centres = budget - kept  # fewer, where one token and all clusters are too many
        order = self.ordered(tokens, scores, kept, kept + some)
        recycled = sorted(order[kept : kept + some]) if centres else []
        for centre, members in self.peaks(hidden[recycled], centres).items():
            self.means[recycled[centre]] = hidden[[recycled[i] for i in members]].mean(dim=0)
        return sorted([*order[:kept], *self.means])

    def _merge(self, out: Tensor, hidden: Tensor, scores: Tensor, kept: Any, dropped: Any) -> None:
        for centre, mean in self.means.items():
            out[centre] = mean

    def peaks(self, states: Tensor, centres: int) -> dict[int, list[int]]:
        """Centre -> its cluster's tokens, by density peaks."""
        if not centres:
            return {}
        every = range(len(states))
        far = [
            [float((states[i] - states[j]).norm()) / math.sqrt(states.shape[1]) for j in every] for i in every
        ]
        density = [math.exp(-sum(d * d for d in sorted(far[i])[:centres]) / centres) for i in every]
        worth = []
        for i in every:
            for j in every:
                self.compare(density[i], density[j])
            denser = [j for j in every if (density[j], -j) > (density[i], -i)]
            worth.append(density[i] * (min(far[i][j] for j in denser) if denser else max(map(max, far))))
        order = self.ordered(list(every), torch.tensor(worth, dtype=torch.float64), centres)
        clusters: dict[int, list[int]] = {i: [i] for i in sorted(order[:centres])}
        for i in every:
            if i not in clusters:
                near = sorted(clusters, key=lambda centre: (far[i][centre], centre))
                if len(near) > 1:
                    self.compare(far[i][near[1]], far[i][near[0]])
                clusters[near[0]].append(i)
        return clusters


OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "few": {"keep": 0.05, "layers": (1, 3)},
    "version-2": {"recycle": False, "positions": "keep", "keep": 0.3},
    "one-stage": {"layers": (2,), "keep": 0.3, "positions": "renumber"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_sparsevlm_is_what_it_says(llava: Any, name: str) -> None:
    check(llava, LLAVA, SlowSparseVLM, lightvlm.SparseVLM(**OPTIONS[name], min_image_tokens=0), ROWS)


@pytest.mark.parametrize("name", OPTIONS)
def test_images_of_any_size(qwen: Any, name: str) -> None:
    check(qwen, QWEN, SlowSparseVLM, lightvlm.SparseVLM(**OPTIONS[name], min_image_tokens=0), UNEVEN)


def test_prompts_that_end_with_an_image(llava: Any) -> None:
    """There all text behind an image rates, or where there is none, the last token."""
    rows = [[1, Image(3), 2, 5, 3, Image(4)], [1, 2, Image(5)], ROWS[0]]
    check(llava, LLAVA, SlowSparseVLM, lightvlm.SparseVLM(min_image_tokens=0), rows)


@pytest.mark.parametrize("family", [LLAVA, INTERNVL, QWEN], ids=lambda family: family.name)
def test_rating_an_answer(model: Any, family: Any) -> None:
    """The question's tokens rate, not the answer's; the logits are those of generating it."""
    with torch.no_grad(), lightvlm.attach(model, lightvlm.SparseVLM(min_image_tokens=0)):
        tokens, expected = generate_logits(model, family.batch(ROWS), 5)
        answered = [[*row, *tokens[b, :-1].tolist()] for b, row in enumerate(ROWS)]
        found = model(**prompt(family, answered), logits_to_keep=5).logits
    assert (found - expected).abs().max() <= 4 * noise(model, family, ROWS) + 1e-5


@pytest.mark.parametrize("centres", [1, 2, 5, 40])
@pytest.mark.parametrize("scale", [1.0, 10.0], ids=["near", "far"])
def test_clusters_against_plain_loops(llava: Any, centres: int, scale: float) -> None:
    """Also where every density, exp(-200), is 0 in fp32."""
    states = scale * torch.randn(40, 16, generator=torch.Generator().manual_seed(4))
    slow = SlowSparseVLM(llava, None)
    expected = slow.peaks(states.double(), centres)
    # a density is exp of a number of 2 scale^2, which fp32 knows to so many roundings; sums of 16 and 40 terms
    assert slow.margin > 100 * 2 * scale**2 * torch.finfo(torch.float32).eps
    means, chosen = sparsevlm.cluster(states, centres)
    assert chosen.tolist() == list(expected)
    for mean, members in zip(means, expected.values(), strict=True):
        assert torch.allclose(
            mean.double(), states[members].double().mean(dim=0), rtol=1e-5, atol=1e-6 * scale
        )


def test_equal_tokens_are_clustered_by_their_index(llava: Any) -> None:
    """Equal densities and distances, also between centres: the lower index goes first, and no cluster is empty."""
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)).repeat(4, 1)
    for centres in range(1, 13):
        means, chosen = sparsevlm.cluster(states, centres)
        expected = SlowSparseVLM(llava, None).peaks(states.double(), centres)
        assert chosen.tolist() == list(expected)
        for mean, members in zip(means, expected.values(), strict=True):
            assert torch.allclose(mean, states[members].mean(dim=0), atol=1e-6)


def test_clusters_do_not_depend_on_the_dtype() -> None:
    states = torch.randn(30, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    means, chosen = sparsevlm.cluster(states, 4)
    assert means.dtype == torch.float32
    same, there = sparsevlm.cluster(states.float(), 4)
    assert torch.equal(means, same)
    assert torch.equal(chosen, there)


def test_kept_tokens_and_clusters_are_what_keep_says() -> None:
    for tokens in range(2, 120):
        for total in range(1, tokens):
            kept, clusters = sparsevlm.split(tokens, total)
            dropped = tokens - kept
            most = int((int(0.3 * dropped) + 1) / 10) + 1
            assert kept + clusters == total
            assert kept >= 1
            assert clusters == most or (kept == 1 and clusters < most)
            # one more would leave no room for the clusters
            assert kept + 1 + int((int(0.3 * (dropped - 1)) + 1) / 10) + 1 > total or dropped == 1


@pytest.mark.parametrize(
    ("budget", "counts", "mean"),
    [
        (192, (300, 200, 110), 192.0),
        (128, (303, 110, 36), 128.6),
        (96, (238, 48, 26), 96.9),
        (64, (66, 30, 17), 64.8),
    ],
)
def test_published_budgets(budget: int, counts: tuple[int, ...], mean: float) -> None:
    part = SparseVLMPrefill(**sparsevlm.published(budget))
    tokens, found, total = 576, [], 2 * 576
    for stage, layers in zip(part.stages(32), (4, 9, 17), strict=True):
        (count,) = part.counts(stage, [Picture(0, 0, tokens, 576, tokens)])
        found.append(sparsevlm.split(tokens, count)[0])
        tokens = count
        total += layers * count
    assert tuple(found) == counts
    assert round(total / 32, 1) == mean


def rates(hidden: Tensor, images: list[list[tuple[int, int]]], ends: list[int]) -> Tensor:
    pictures = [
        [Picture(number, start, stop, stop - start, stop - start) for number, (start, stop) in enumerate(row)]
        for row in images
    ]
    found = SparseVLMPrefill().raters(hidden, pictures, ends)
    assert found is not None
    return found


def test_raters_against_plain_loops(llava: Any) -> None:
    """Two images of which one has more tokens than are taken at a time; what stands behind the question has no say."""
    hidden = 0.5 * torch.randn(2, 400, 8, generator=torch.Generator().manual_seed(6))
    found = rates(hidden, [[(2, 300), (310, 340)], [(120, 200)]], [390, 400])
    slow = SlowSparseVLM(llava, None)
    text = [[0, 1, *range(300, 310), *range(340, 390)], [*range(100, 120), *range(200, 400)]]
    image = [[*range(2, 300), *range(310, 340)], list(range(120, 200))]
    for row in range(2):
        chosen = slow.rate(hidden[row].double(), image[row], text[row])
        assert found[row].nonzero().flatten().tolist() == [text[row][number] for number in chosen]
        assert 0 < len(chosen) < len(text[row])
    assert slow.margin > 1e-5  # 300 terms of fp32
    assert torch.equal(rates(hidden[1:, 100:], [[(20, 100)]], [300]), found[1:, 100:])


def test_equal_text_rates_in_full() -> None:
    """The mean of equal numbers may be rounded to above them."""
    for count in range(1, 30):
        hidden = torch.ones(1, 4 + count, 8)
        assert rates(hidden, [[(0, 4)]], [4 + count])[0, 4:].all()


def test_rows_without_text_behind_an_image_leave_it_to_the_probe() -> None:
    hidden = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    assert rates(hidden, [[(3, 9)], []], [9, 9]).all()


def test_published_defaults() -> None:
    part = lightvlm.SparseVLM().prefill
    assert [stage.layer for stage in part.stages(32)] == [2, 6, 15]  # type: ignore[union-attr]
    assert part.recycle  # type: ignore[union-attr]
    assert lightvlm.method("sparsevlm") == lightvlm.SparseVLM()
    assert SparseVLMPrefill(keep=1).stages(32) == ()
    assert SparseVLMPrefill(layers=(3,)).stages(32) == (Stage(3, 0.2),)


def test_bad_options() -> None:
    with pytest.raises(TypeError, match="recycle must be bool, got 1"):
        lightvlm.SparseVLM(recycle=1)
    with pytest.raises(
        ValueError, match="positions must be one of 'keep', 'renumber', 'renumber_prompt', got 'old'"
    ):
        lightvlm.SparseVLM(positions="old")
    with pytest.raises(
        ValueError, match="layers must start at 1 or later: the score comes from the layer before"
    ):
        SparseVLMPrefill(layers=(0, 3)).stages(32)
    with pytest.raises(ValueError, match=re.escape("keep must be in (0, 1], got 0")):
        lightvlm.SparseVLM(0)
    with pytest.raises(ValueError, match="budget must be one of 192, 128, 96, 64, got 100"):
        sparsevlm.published(100)
