"""Every registered method on every family: a batch is its rows one by one, and what has no image is left alone."""

from __future__ import annotations

from typing import Any

import lightvlm
import pytest
import torch
from python.matrix import LAYERS, NAMES, baseline, kept_of, limit_of, only_shortens, plan_of, rows_of
from python.test_prefill import prompt
from python.tiny import Family, generate_logits

each = pytest.mark.parametrize("name", NAMES)


@each
def test_a_batch_is_its_rows_one_by_one(small: Any, family: Family, name: str) -> None:
    """Padded rows of one, no and two images: tokens, logits, and which image tokens were kept."""
    rows, plan, limit = rows_of(family), plan_of(name), limit_of(small, family)
    whole = baseline(small, family, 12)[1]
    with lightvlm.attach(small, plan, trace=True) as run:
        tokens, logits = generate_logits(small, family.batch(rows), 12)
        kept = run.kept
        for b, row in enumerate(rows):
            own, expected = generate_logits(small, family.batch([row]), 12)
            assert torch.equal(tokens[b], own[0])
            assert (logits[b] - expected[0]).abs().max() <= limit
            assert kept_of(run.kept, 0, row) == kept_of(kept, b, row)
    assert (logits - whole).abs().max() > 100 * limit  # the plan did something
    if only_shortens(plan):
        assert (logits[1] - whole[1]).abs().max() <= limit  # and nothing to the row without an image


@each
def test_more_padding_changes_nothing(small: Any, family: Family, name: str) -> None:
    """A row behind its own padding, and beside a long row of text; through forward()."""
    rows, limit = rows_of(family), limit_of(small, family)
    with torch.no_grad(), lightvlm.attach(small, plan_of(name), trace=True) as run:
        expected = small(**prompt(family, [rows[0]])).logits[0, -1]
        kept = kept_of(run.kept, 0, rows[0])
        found = small(**prompt(family, [rows[0], [*range(1, 51)]])).logits[0, -1]
        assert kept_of(run.kept, 0, rows[0]) == kept
        assert (found - expected).abs().max() <= limit
        alone = {key: value[:1] if len(value) == 2 else value for key, value in _padded(family, rows).items()}
        assert (small(**alone).logits[0, -1] - expected).abs().max() <= limit
        assert kept_of(run.kept, 0, rows[0]) == kept


def _padded(family: Family, rows: Any) -> dict[str, torch.Tensor]:
    """A batch whose second row, of text alone, is longer by ten tokens."""
    inputs = prompt(family, [rows[0], [*range(1, 36)]])
    if inputs.get("position_ids") is not None and inputs["position_ids"].dim() == 3:
        inputs["position_ids"] = inputs["position_ids"][:, :1]
    return inputs


@each
def test_the_place_in_a_batch_does_not_matter(small: Any, family: Family, name: str) -> None:
    rows, limit = rows_of(family), limit_of(small, family)
    order = [2, 3, 0, 1]
    with lightvlm.attach(small, plan_of(name), trace=True) as run:
        tokens, logits = generate_logits(small, family.batch(rows), 4)
        kept = run.kept
        moved = generate_logits(small, family.batch([rows[b] for b in order]), 4)
        assert {layer: [found[b] for b in order] for layer, found in kept.items()} == run.kept
    assert torch.equal(moved[0], tokens[order])
    assert (moved[1] - logits[order]).abs().max() <= limit


@pytest.mark.parametrize("name", [name for name in NAMES if only_shortens(plan_of(name))])
def test_text_alone_is_bitwise_the_baseline(small: Any, family: Family, name: str) -> None:
    """What a method does to attention or to the cache, it does to text as well; the others leave it alone."""
    inputs = family.batch([[1, 2, 3], [4, 5, 6, 7, 8]])
    expected = generate_logits(small, inputs, 6)[1]
    with lightvlm.attach(small, plan_of(name)) as run:
        assert torch.equal(generate_logits(small, inputs, 6)[1], expected)
    assert run.report().tokens_per_layer == [4.0] * LAYERS


@each
def test_bf16_is_finite_and_as_close_as_it_can_be(
    small: Any, small_bf16: Any, family: Family, name: str
) -> None:
    """A batch in 16 bit against its rows: at most what 16 bit costs, as choices among near equals are noise."""
    rows, plan = rows_of(family), plan_of(name)
    with lightvlm.attach(small, plan):
        exact = generate_logits(small, family.batch(rows), 1)[1]
    with lightvlm.attach(small_bf16, plan):
        logits = generate_logits(small_bf16, family.batch(rows, torch.bfloat16), 12)[1]
        alone = [generate_logits(small_bf16, family.batch([row], torch.bfloat16), 1)[1] for row in rows]
    assert logits.isfinite().all()
    cost = (logits[:, :1].float() - exact).abs().max()
    assert cost > 0
    for b, own in enumerate(alone):
        assert own.isfinite().all()
        assert (own.float()[0] - logits[b, :1].float()).abs().max() <= max(
            2 * cost, limit_of(small_bf16, family)
        )
