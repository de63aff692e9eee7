"""CDPruner, against a slow implementation."""

from __future__ import annotations

from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.base import Stage
from lightvlm.methods.cdpruner import CDPrunerPrefill, greedy_map
from python.field.against_slow import SlowMethod, check, cosine
from python.test_prefill import ROWS, UNEVEN, noise, prompt
from python.tiny import QWEN, Family, generate_logits


class Slow(SlowMethod):
    """The greedy choice by determinants themselves, with no Cholesky factor."""

    def choose(
        self, out: Any, hidden: Any, tokens: list[int], budget: int, *, segment: list[int], **_: Any
    ) -> list[int]:
        text = [i for i in range(len(segment)) if segment[i] < 0]
        raw = [sum(cosine(hidden[i], hidden[j]) for j in text) / len(text) for i in tokens]
        low, high = min(raw), max(raw)
        relevance = [(r - low) / (high - low) if high > low else 1.0 for r in raw]

        def volume(chosen: list[int]) -> float:
            kernel = [
                [relevance[i] * relevance[j] * cosine(hidden[tokens[i]], hidden[tokens[j]]) for j in chosen]
                for i in chosen
            ]
            return float(torch.tensor(kernel, dtype=torch.float64).det())

        chosen: list[int] = []
        while len(chosen) < budget:
            rest = [i for i in range(len(tokens)) if i not in chosen]
            before = volume(chosen) if chosen else 1.0
            chosen.append(rest[self.best([volume([*chosen, i]) / before for i in rest])])
        return sorted(tokens[i] for i in chosen)


@pytest.mark.parametrize("options", [{"keep": 0.3}, {"keep": 0.4, "layer": 2}], ids=["first", "later"])
def test_cdpruner_is_what_it_says(model: Any, family: Family, options: dict[str, Any]) -> None:
    rows = [*ROWS, *UNEVEN[:2]] if family is QWEN else ROWS
    check(model, family, CDPrunerPrefill(min_image_tokens=0, **options), rows, Slow)


def test_greedy_choice_of_several_problems() -> None:
    features = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(4))
    found = greedy_map(features, 4)
    for problem, chosen in zip(features.double(), found, strict=True):
        kernel = problem @ problem.T
        left: list[int] = []
        for _ in range(4):
            worth = {i: float(kernel[[*left, i]][:, [*left, i]].det()) for i in range(9) if i not in left}
            left.append(max(worth, key=worth.__getitem__))
        assert chosen.nonzero().flatten().tolist() == sorted(left)
        assert torch.equal(greedy_map(problem.float()[None], 4)[0], chosen)


def test_beyond_what_the_features_span_the_lower_index_decides() -> None:
    """Two directions only: further choices add nothing, and are no noise."""
    features = torch.tensor([[0.0, 0], [1, 0], [2, 0], [1, 2], [3, 1], [0, 0]])
    found = greedy_map(features[None], 4)
    assert found[0].tolist() == [True, True, False, True, True, False]
    assert greedy_map(features[None], 9).all()


def test_drafts_do_not_say_what_is_relevant(model: Any, family: Family) -> None:
    """Rating an answer keeps what generating it kept."""
    plan = lightvlm.Plan(prefill=CDPrunerPrefill(0.3, min_image_tokens=0))
    with torch.no_grad(), lightvlm.attach(model, plan, trace=True) as run:
        tokens, expected = generate_logits(model, family.batch(ROWS), 4)
        answered = [[*row, *tokens[b, :-1].tolist()] for b, row in enumerate(ROWS)]
        first = model(**prompt(family, ROWS)) and run.kept
        found = model(**prompt(family, answered), logits_to_keep=4).logits
        assert run.kept == first
    assert (found - expected).abs().max() <= 4 * noise(model, family, ROWS) + 1e-5


def test_options() -> None:
    assert CDPrunerPrefill().stages(8) == (Stage(0, 0.111),)
    assert CDPrunerPrefill(1).stages(8) == ()
    assert lightvlm.method("cdpruner", keep=0.2) == lightvlm.CDPruner(0.2)
    with pytest.raises(ValueError, match=r"layers must be ascending layer numbers within 0..5, got \(6,\)"):
        CDPrunerPrefill(layer=6).stages(6)
    with pytest.raises(ValueError, match="min_image_tokens must be at least 0, got -1"):
        CDPrunerPrefill(min_image_tokens=-1)
