"""DivPrune, against a slow implementation."""

from __future__ import annotations

from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods import divprune
from lightvlm.methods.base import Picture, Stage, StageInput
from lightvlm.methods.divprune import DivPrunePrefill
from python.field.against_slow import SlowMethod, check, cosine
from python.test_prefill import ROWS, UNEVEN
from python.tiny import QWEN, Family


class Slow(SlowMethod):
    def choose(self, out: Any, hidden: Any, tokens: list[int], budget: int, **_: Any) -> list[int]:
        def distance(i: int, others: list[int]) -> float:
            return min([2.0, *(1 - cosine(hidden[i], hidden[j]) for j in others)])

        # two that are each other's nearest tie
        alone = [distance(i, [j for j in tokens if j != i]) for i in tokens]
        chosen = [tokens[self.best(alone, ties=True)]]
        while len(chosen) < budget:
            rest = [i for i in tokens if i not in chosen]
            chosen.append(rest[self.best([distance(i, chosen) for i in rest])])
        return sorted(chosen)


@pytest.mark.parametrize("options", [{"keep": 0.3}, {"keep": 0.5, "layer": 2}], ids=["first", "later"])
def test_divprune_is_what_it_says(
    model: Any, family: Family, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divprune, "_ROWS", 5)  # blocks that do not divide an image
    rows = [*ROWS, *UNEVEN[:2]] if family is QWEN else ROWS
    check(model, family, DivPrunePrefill(min_image_tokens=0, **options), rows, Slow)


def test_opposite_tokens_are_farther_than_orthogonal_ones() -> None:
    """Negative cosines count: the op alone would take token 1 for as far as token 2."""
    angles = torch.tensor([0.0, 100.0, 170.0, 10.0, 0.0]).deg2rad()
    stage = StageInput(
        hidden=torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
        * torch.tensor([3.0, 1, 2, 5, 1])[:, None],
        scores=None,
        segment=torch.tensor([[0, 0, 0, 0, -1]], dtype=torch.int32),
        within=torch.tensor([[0, 1, 2, 3, 0]], dtype=torch.int32),
        text=torch.tensor([[False, False, False, False, True]]),
        keep=torch.tensor([[2]], dtype=torch.int32),
        capacity=3,
        stage=Stage(0, 0.5),
        pictures=((Picture(0, 0, 4, 4, 2),),),
    )
    reduced = DivPrunePrefill(0.5).reduce(stage)
    # 1 and 2 are both 70 degrees from their nearest: the first of them; then 0, 100 degrees from it, before 3 (90)
    assert reduced.selection.index.tolist() == [[0, 1, 4]]
    assert torch.equal(reduced.hidden, stage.hidden[:, [0, 1, 4]])


def test_options() -> None:
    assert DivPrunePrefill().stages(8) == (Stage(0, 0.098),)
    assert DivPrunePrefill(1).stages(8) == ()
    assert lightvlm.method("divprune", keep=0.2) == lightvlm.DivPrune(0.2)
    with pytest.raises(ValueError, match=r"layers must be ascending layer numbers within 0..5, got \(6,\)"):
        DivPrunePrefill(layer=6).stages(6)
    with pytest.raises(TypeError, match="keep must be a number"):
        DivPrunePrefill("0.1")  # type: ignore[arg-type]
