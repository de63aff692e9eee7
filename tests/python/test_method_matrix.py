"""Every registered method on every family: keeping all is the baseline, counts, bits, what is left behind, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.cli import main
from lightvlm.methods import METHODS
from lightvlm.methods.base import AttentionPart, CachePart, PrefillPart
from python.matrix import (
    EVERYTHING,
    LAYERS,
    NAMES,
    READS,
    SETTINGS,
    Choices,
    attention_is_ours,
    baseline,
    everything,
    limit_of,
    parts,
    plan_of,
    planned,
    reduces,
    rows_of,
    stored,
    text_of,
)
from python.test_attach import snapshot
from python.tiny import Family, generate_logits

each = pytest.mark.parametrize("name", NAMES)


def test_exceptions_are_of_registered_methods() -> None:
    assert {*SETTINGS, *EVERYTHING, *READS} <= {*METHODS}


@each
def test_the_matrix_has_something_to_look_at(small: Any, family: Family, name: str) -> None:
    """The other tests would pass under a plan that steps aside."""
    with lightvlm.attach(small, plan_of(name)) as run:
        generate_logits(small, family.batch(rows_of(family)), 12)
    report = run.report()
    assert report.stepped_aside == {}
    assert report.errors == []
    assert (
        report.image_keep_share < 1
        or min(report.attending_share, default=1) < 1
        or report.kv_bytes_used < report.kv_bytes_full
    )


@each
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_keeping_everything_is_the_baseline(
    request: pytest.FixtureRequest, family: Family, name: str, dtype: str
) -> None:
    """Bit for bit while the model's own attention runs; as close as a batch is to its rows where ours does."""
    model = request.getfixturevalue("small" if dtype == "fp32" else "small_bf16")
    inputs, plan = family.batch(rows_of(family), model.dtype), everything(name)
    with torch.no_grad():
        expected = model(**inputs).logits
    tokens, logits = baseline(model, family, 6)
    with lightvlm.attach(model, plan) as run:
        with torch.no_grad():
            found = model(**inputs).logits
        again, generated = generate_logits(model, inputs, 6)
    report = run.report()
    assert report.stepped_aside == {}
    assert report.image_keep_share == 1.0
    assert min(report.attending_share, default=1.0) == 1.0
    if not isinstance(plan.prefill, AttentionPart):
        assert torch.equal(found, expected)
    if not attention_is_ours(plan, report):
        assert torch.equal(generated, logits)
    valid = inputs["attention_mask"].bool()
    same = _until_they_part(again, tokens)
    assert dtype == "bf16" or bool(same.all())
    limit = limit_of(model, family)
    assert (found - expected)[valid].abs().max() <= limit
    assert ((generated - logits).abs().amax(-1) * same).max() <= limit


def _until_they_part(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Steps (B, T) up to the first token that differs, which was chosen among equals; later ones compare nothing."""
    differ = (found != expected).int().cumsum(1)
    return torch.cat([torch.zeros_like(differ[:, :1]), differ[:, :-1]], dim=1) == 0


@each
def test_counts_are_what_the_plan_says(
    small: Any, family: Family, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host, before anything runs: of each image at each stage, of each layer, and in the cache."""
    plan, rows = plan_of(name), rows_of(family)
    inputs, new = family.batch(rows), 11
    choices = (
        Choices(plan.cache, inputs["input_ids"].shape[1], monkeypatch)
        if isinstance(plan.cache, CachePart)
        else None
    )
    with lightvlm.attach(small, plan, trace=True) as run:
        out = small.generate(**inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    sizes = [[item.tokens for item in row if not isinstance(item, int)] for row in rows]
    part = plan.prefill
    counts = planned(part, rows) if isinstance(part, PrefillPart) else [sizes] * LAYERS
    for layer, kept in run.kept.items():
        assert [[len(image) for image in row] for row in kept] == counts[layer]
        for row, of in zip(kept, sizes, strict=True):
            assert all(
                image == sorted({*image} & {*range(size)}) for image, size in zip(row, of, strict=True)
            )
    if isinstance(part, PrefillPart):
        before = [sizes, *counts]
        assert set(run.kept) == {layer for layer in range(LAYERS) if counts[layer] != before[layer]}
    tokens = [[text_of(row) + sum(own) for row, own in zip(rows, at, strict=True)] for at in counts]
    report = run.report()
    assert report.tokens_per_layer == [sum(at) / len(rows) for at in tokens]
    assert report.image_tokens_kept == [
        sum(map(sum, at)) / 3 for at in counts
    ]  # of the rows that have images
    cache = out.past_key_values
    length = inputs["input_ids"].shape[1] + new - 1
    assert cache.get_seq_length() == length
    assert choices is None or choices.problems == []
    drops = isinstance(part, AttentionPart) and part.unimportant == "drop"
    if type(cache).__name__ == "DynamicCache" or plan.precision is not None or drops:
        return  # whole, packed, or counted by the device
    for index, (at, layer) in enumerate(zip(tokens, cache.layers, strict=True)):
        expected = choices.holds(index, layer) if choices is not None else None
        assert stored(layer) == (expected or [count + new - 1 for count in at])
        assert layer.seen == length


@each
def test_the_same_bits_with_any_number_of_threads(small: Any, family: Family, name: str) -> None:
    inputs, found = family.batch(rows_of(family)), []
    for threads, tokens in (
        (1, 9),
        (1, 9),
        (2, 2),
    ):  # threads that wait for each other are slow on a busy machine
        torch.set_num_threads(threads)
        with lightvlm.attach(small, plan_of(name)), _tower_on_one_thread(small, threads):
            found.append(generate_logits(small, inputs, tokens)[1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][:, :2], found[2])


@contextmanager
def _tower_on_one_thread(model: Any, threads: int) -> Iterator[None]:
    """CLIP's tower gives other bits with two threads, without a plan too; that is not what is asked here."""
    tower = getattr(model.model, "vision_tower", None)
    if tower is None:
        yield
        return
    before = tower.register_forward_pre_hook(lambda *_: torch.set_num_threads(1))
    after = tower.register_forward_hook(lambda *_: torch.set_num_threads(threads))
    try:
        yield
    finally:
        before.remove()
        after.remove()


@each
def test_detach_restores_the_model(small: Any, family: Family, name: str) -> None:
    inputs = family.batch(rows_of(family))
    expected, before = baseline(small, family, 6)[1], snapshot(small)
    with lightvlm.attach(small, plan_of(name)):
        generate_logits(small, inputs, 3)
    assert snapshot(small) == before
    handle = small.model.language_model.layers[3].register_forward_pre_hook(_stop)
    with pytest.raises(RuntimeError, match="stop here"), lightvlm.attach(small, plan_of(name)):
        generate_logits(small, inputs, 1)
    handle.remove()
    assert snapshot(small) == before
    assert torch.equal(generate_logits(small, inputs, 6)[1], expected)


def _stop(*_: Any) -> None:
    raise RuntimeError("stop here")


@each
def test_a_plan_survives_json_and_acts_the_same(small: Any, family: Family, name: str) -> None:
    found = []
    plan = plan_of(name)
    again = lightvlm.Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    default = lightvlm.method(name)
    assert lightvlm.Plan.from_json(default.to_json()) == default
    for one in (plan, again):
        with lightvlm.attach(small, one):
            found.append(generate_logits(small, family.batch(rows_of(family)), 8)[1])
    assert torch.equal(*found)


@each
def test_options_are_checked(name: str) -> None:
    """A part's options say their limits, and a value beyond one names the option."""
    for slot in ("prefill", "cache", "precision"):
        part = getattr(lightvlm.method(name), slot)
        for field in dataclasses.fields(part) if part is not None else ():
            assert field.metadata["doc"]
            for limit, step in (("low", -1), ("high", 1)):
                if limit in field.metadata:
                    beyond = field.metadata[limit] + step
                    wrong = (beyond,) if "tuple" in str(field.type) else beyond
                    with pytest.raises(ValueError, match=field.name):
                        dataclasses.replace(part, **{field.name: wrong})
            with pytest.raises((TypeError, ValueError), match=field.name):
                dataclasses.replace(part, **{field.name: object()})


def test_the_command_line_describes_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    found = {method["name"]: method for method in json.loads(capsys.readouterr().out)["methods"]}
    assert sorted(found) == NAMES
    for name, method in found.items():
        assert method["source"]
        assert method["summary"]
        assert METHODS[name].knob in [option["name"] for option in method["options"]]
        assert [option["name"] for option in method["options"] if not option["doc"]] == []


@pytest.mark.parametrize(
    "kind", [kind for kind, part in parts("prefill").items() if isinstance(part, PrefillPart)]
)
def test_a_small_prompt_is_left_alone(small: Any, family: Family, kind: str) -> None:
    """Under the least number of image tokens nothing happens, and the report says so."""
    expected = baseline(small, family, 6)[1]
    plan = lightvlm.Plan(prefill=dataclasses.replace(parts("prefill")[kind], min_image_tokens=1000))
    assert reduces(plan)
    with lightvlm.attach(small, plan) as run:
        assert torch.equal(generate_logits(small, family.batch(rows_of(family)), 6)[1], expected)
    assert list(run.report().stepped_aside) == ["fewer than min_image_tokens (1000) image tokens"]
