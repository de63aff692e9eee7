"""The prefill part of one method, the cache part of another, and packed keys and values: it works, or says why not."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods import KVPrecision
from lightvlm.methods.base import AttentionPart, CachePart, PrefillPart
from python.matrix import LAYERS, Choices, held, parts, planned, rows_of, stored, text_of
from python.test_attach import snapshot
from python.tiny import INTERNVL, LLAVA, QWEN, Family, Image

PACK = KVPrecision(bits=8, sinks=2, recent=6, interval=64)
PREFILL, CACHE = {"none": None, **parts("prefill")}, {"none": None, **parts("cache")}
PRECISION = {"none": None, "8 bits": PACK, **parts("precision")}


def combinations() -> list[tuple[Family, str, str, str]]:
    """All pairs of a prefill and a cache part, as they are and in 8 bits, and other precision parts with each of
    either. One family each: every part meets all families, and no pair is run three times."""
    pairs = list(itertools.product(PREFILL, CACHE))
    found = [(QWEN, *pair, "none") for pair in pairs] + [(LLAVA, *pair, "8 bits") for pair in pairs]
    others = [pair for pair in pairs if "none" in pair]
    return found + [(INTERNVL, *pair, name) for name in parts("precision") for pair in others]


@pytest.mark.parametrize(("family", "prefill", "cache", "precision"), combinations(), indirect=["family"])
def test_parts_of_several_methods(
    small: Any, family: Family, prefill: str, cache: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = lightvlm.Plan(prefill=PREFILL[prefill], cache=CACHE[cache], precision=PRECISION[precision])
    before, rows, new = snapshot(small), rows_of(family), 12
    inputs = family.batch(rows)
    options = {
        "max_new_tokens": new,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    choices = (
        Choices(plan.cache, inputs["input_ids"].shape[1], monkeypatch)
        if isinstance(plan.cache, CachePart)
        else None
    )
    run, refusal = attach_or_reason(small, plan)
    if run is None:
        assert refusal.startswith("plan.")
        assert snapshot(small) == before
        alone = [prefill, cache, precision].count("none") == 2
        assert not alone or getattr(
            plan.precision, "separates", False
        )  # which needs a part that says what matters
        return
    with run:
        out = small.generate(**inputs, **options)
    assert snapshot(small) == before
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + new
    assert torch.stack(out.logits).isfinite().all()
    assert run.report().stepped_aside == {}
    check_counts(plan, rows, out.past_key_values, choices, run.report(), new)
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


def attach_or_reason(model: Any, plan: lightvlm.Plan) -> tuple[Any, str]:
    """A run, or None and why there is none."""
    try:
        return lightvlm.attach(model, plan), ""
    except ValueError as refusal:
        return None, str(refusal)


def check_counts(plan: Any, rows: Any, cache: Any, choices: Any, report: Any, new: int) -> None:
    """Tokens that layers computed, and those that the cache holds of them."""
    part = plan.prefill
    sizes = [[item.tokens for item in row if isinstance(item, Image)] for row in rows]
    images = planned(part, rows) if isinstance(part, PrefillPart) else [sizes] * LAYERS
    tokens = [[text_of(row) + sum(own) for row, own in zip(rows, at, strict=True)] for at in images]
    assert report.tokens_per_layer == [sum(at) / len(rows) for at in tokens]
    assert choices is None or choices.problems == []
    if type(cache).__name__ == "DynamicCache":
        assert plan.cache is None
        return
    for index, (at, layer) in enumerate(zip(tokens, cache.layers, strict=True)):
        whole = [count + new - 1 for count in at]
        chosen = choices.holds(index, layer) if choices is not None and layer.packed is None else None
        if chosen is not None:
            assert stored(layer) == chosen
        elif plan.cache is None and not (isinstance(part, AttentionPart) and part.unimportant == "drop"):
            assert held(layer) == whole
        assert all(1 <= found <= most for found, most in zip(held(layer), whole, strict=True))


def test_there_is_more_than_one_of_each() -> None:
    assert len(PREFILL) > 2
    assert len(CACHE) > 1
    for found in (PREFILL, CACHE, PRECISION):
        assert all(part is None or dataclasses.is_dataclass(part) for part in found.values())
