"""A decoding step's token is written by the attention that reads it: as if it had been written before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache, KVPages, PagedCompactCache, decoder_attention, stored_attention
from lightvlm.cache_layer import CompactLayer
from lightvlm.decode_step import DecodeStep
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.paged_layer import PagedLayer
from python.recorded import record
from python.test_decode import COMPACTION, plan_of
from python.test_decode_loop import PACKED
from python.test_prefill import ROWS
from python.tiny import DEPTH, LLAVA, QWEN, Family, extend, generate_logits
from torch import Tensor

FAMILIES = {"llava": LLAVA, "qwen": QWEN}
PLANS: dict[str, lightvlm.Plan] = {
    **{name: plan_of(name) for name in COMPACTION},
    "whole prompts": plan_of("usual", reduce=False),
    "no cache method": lightvlm.LightVLM(keep=0.3, decode_keep=1.0),
}
STEPS = 21
CACHES: dict[str, Callable[[Any], CompactCache]] = {
    "growing": lambda model: CompactCache(model.config),
    "fixed": lambda model: CompactCache(model.config, capacity=120),
    "paged": lambda model: PagedCompactCache(
        model.config, pages=KVPages(model.config, pages=200, page_size=16, dtype=model.dtype)
    ),
}


@functools.cache
def wide(name: str, dtype: torch.dtype) -> Any:
    """Heads of 32 channels, which the op takes."""
    heads: dict[str, Any] = {"head_dim": 32}
    if name == "qwen":
        sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
        heads = {"hidden_size": 128, "rope_parameters": sections, "tower": {"out_hidden_size": 128}}
    return FAMILIES[name].build(dtype, **heads)


def stored(cache: CompactCache) -> list[Tensor]:
    """All valid tokens, and what they have received."""
    found = []
    for layer in cache.layers:
        keys, values = layer.buffer()
        for row, (start, end) in enumerate(zip(layer.starts, layer.ends, strict=True)):
            found += [keys[row, start:end], values[row, start:end]]
            if layer.mass is not None:
                found.append(layer.mass[row, :, start:end])
    return found


def one_way_and_the_other(
    call: Callable[[], tuple[Tensor, CompactCache, lightvlm.Run]], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, int], dict[str, int]]:
    """Asserts that results and caches are the same to the bit where layers write at once; op calls of both."""
    found, cache, run = call()
    with monkeypatch.context() as patch:
        patch.setattr(decoder_attention, "writes", lambda *args: False)
        wanted, other, before = call()
    assert torch.equal(found, wanted)
    assert all(torch.equal(*pair) for pair in zip(stored(cache), stored(other), strict=True))
    assert [layer.seen for layer in cache.layers] == [layer.seen for layer in other.layers]
    assert [layer.tail for layer in cache.layers] == [layer.tail for layer in other.layers]
    assert all(layer.waiting is None for layer in cache.layers)
    return run.report().op_calls, before.report().op_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", FAMILIES)
def test_generate(
    name: str, plan: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A padded batch of prompts with one image, several and none."""
    family: Family = FAMILIES[name]
    model = wide(name, dtype)

    def call() -> tuple[Tensor, CompactCache, lightvlm.Run]:
        cache = CACHES[kind](model)
        with lightvlm.attach(model, PLANS[plan]) as run:
            logits = generate_logits(model, family.batch(ROWS, dtype), STEPS, past_key_values=cache)[1]
        return logits, cache, run

    now, before = one_way_and_the_other(call, monkeypatch)
    # Where a layer is whole and nothing watches it, transformers' own attention reads it.
    assert now.get("append_attend_", 0) == before["decode_attention"] > 0
    assert "append_attend_" not in before
    assert "decode_attention" not in now


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_the_decode_loop(plan: str, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends are on the device; captured steps are replayed without their Python."""
    model = wide("llava", torch.float32)
    if captured:
        monkeypatch.setattr("lightvlm.decode_loop.capture_on", lambda device: record)

    def call() -> tuple[Tensor, CompactCache, lightvlm.Run]:
        cache = CompactCache(model.config)
        with lightvlm.attach(model, PLANS[plan]) as run:
            tokens = lightvlm.generate(
                model, **LLAVA.batch(ROWS), max_new_tokens=STEPS, do_sample=False, past_key_values=cache
            )
        return tokens, cache, run

    now, before = one_way_and_the_other(call, monkeypatch)
    assert now["append_attend_"] == before["decode_attention"] == DEPTH * (STEPS - 1)


@pytest.mark.parametrize("plan", PACKED)
def test_layers_that_are_packed_write_at_once(plan: str) -> None:
    model = wide("llava", torch.float32)
    with lightvlm.attach(model, PACKED[plan]) as run:
        generate_logits(model, LLAVA.batch(ROWS), 6)
    assert run.report().op_calls["decode_attention"] > 0


def test_beams_and_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are reordered between steps; drafts of several tokens are written at once, single ones wait."""
    model = wide("llava", torch.float32)
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        rows = ROWS if "num_beams" in options else [[*ROWS[2], 11, 12, 13, 11, 12]]

        def call(rows: Any = rows, options: Any = options) -> tuple[Tensor, CompactCache, lightvlm.Run]:
            cache = CompactCache(model.config)
            with lightvlm.attach(model, PLANS["usual"]) as run, torch.no_grad():
                out = model.generate(
                    **LLAVA.batch(rows),
                    max_new_tokens=STEPS,
                    do_sample=False,
                    past_key_values=cache,
                    **options,
                )
            return out, cache, run

        one_way_and_the_other(call, monkeypatch)


@pytest.mark.parametrize("crop", [False, True], ids=["goes-on", "crops"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_step_that_is_interrupted(kind: str, crop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the last layer's attention. What was counted is written by whoever comes next, unless it is cropped."""
    model, inputs = wide("llava", torch.float32), LLAVA.batch(ROWS)
    token = torch.tensor([[3]] * len(ROWS))

    def call() -> tuple[Tensor, CompactCache, lightvlm.Run]:
        cache = CACHES[kind](model)
        interrupted = {cache.layers[-1]}

        def once(function: Any) -> Any:
            def attend(query: Tensor, layer: CompactLayer, scale: float | None) -> Tensor:
                if layer in interrupted:
                    interrupted.clear()
                    raise KeyboardInterrupt
                return function(query, layer, scale)

            return attend

        with torch.no_grad(), lightvlm.attach(model, PLANS["no cache method"]) as run:
            model(**inputs, past_key_values=cache)
            _, mask = extend(LLAVA, model, inputs["attention_mask"], token, past_key_values=cache)
            with monkeypatch.context() as patch:
                for name in ("attend_new", "attend_stored"):
                    patch.setattr(decoder_attention, name, once(getattr(decoder_attention, name)))
                with pytest.raises(KeyboardInterrupt):
                    extend(LLAVA, model, mask, token + 1, past_key_values=cache)
            if crop:
                cache.crop(-1)
            else:
                mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            out, _ = extend(LLAVA, model, mask, token + 2, past_key_values=cache)
        return out.logits, cache, run

    one_way_and_the_other(call, monkeypatch)


def test_another_call_between_the_steps_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wide("llava", torch.float32), LLAVA.batch(ROWS)
    token = torch.tensor([[3]] * len(ROWS))

    def call() -> tuple[Tensor, CompactCache, lightvlm.Run]:
        cache, found = CompactCache(model.config), []
        with torch.no_grad(), lightvlm.attach(model, PLANS["usual"]) as run:
            model(**inputs, past_key_values=cache)
            with DecodeStep(run, cache) as decode:
                found.append(decode.step(token).clone())
                mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
                extend(LLAVA, model, mask, token + 1, past_key_values=cache)
                found.append(decode.step(token + 2).clone())
        return torch.stack(found), cache, run

    one_way_and_the_other(call, monkeypatch)


@pytest.mark.parametrize("plan", ["usual", "no cache method"])
def test_autocast(plan: str) -> None:
    """Values of another dtype than keys and queries, which the op does not take."""
    model = wide("llava", torch.float32)
    with lightvlm.attach(model, PLANS[plan]) as run, torch.autocast("cpu", torch.bfloat16):
        logits = generate_logits(model, LLAVA.batch(ROWS), 6)[1]
    assert logits.isfinite().all()
    assert {"append_attend_", "decode_attention"}.isdisjoint(run.report().op_calls)


def test_a_step_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token is not written into what the cache holds later."""
    model = wide("llava", torch.float32)
    inputs = LLAVA.batch(ROWS)

    def fails(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    with lightvlm.attach(model, PLANS["usual"]):
        expected = generate_logits(model, inputs, STEPS)[1]
        cache = CompactCache(model.config)
        with monkeypatch.context() as patch:
            patch.setattr(stored_attention, "append_attend_checked", fails)
            with pytest.raises(RuntimeError, match="out of memory"):
                generate_logits(model, inputs, STEPS, past_key_values=cache)
        assert cache.layers[0].waiting is None  # it was on its way
        cache.reset()
        assert torch.equal(generate_logits(model, inputs, STEPS, past_key_values=cache)[1], expected)


def test_a_capacity_that_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is counted or written where there is no room for the step."""
    model = wide("llava", torch.float32)
    inputs = LLAVA.batch(ROWS)
    length = inputs["input_ids"].shape[1]
    plan = lightvlm.Plan(cache=DecodeCompaction(keep=1.0, interval=1000, score="mass"))
    cache = CompactCache(model.config, capacity=length + 3)
    with lightvlm.attach(model, plan), pytest.raises(ValueError, match="capacity of the cache is"):
        generate_logits(model, inputs, STEPS, past_key_values=cache)
    assert [layer.seen for layer in cache.layers] == [length + 3] * DEPTH
    assert all(layer.waiting is None for layer in cache.layers)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_token_that_attention_cannot_write_is_written_as_ever(ragged: bool) -> None:
    states = [torch.randn(2, 2, tokens, 32) for tokens in (7, 7, 1, 1)]
    layers = CompactLayer(), CompactLayer()
    for layer in layers:
        layer.update(states[0], states[1])
        if ragged:
            layer.compacted([5, 3], 3)
        layer.bounds()
    found, wanted = layers[0].announce(states[2], states[3]), layers[1].update(states[2], states[3])
    assert found[0] is states[2]
    assert layers[0].waiting is not None
    assert all(torch.equal(*pair) for pair in zip(layers[0].write_waiting(), wanted, strict=True))
    assert layers[0].waiting is None
    assert all(torch.equal(*pair) for pair in zip(layers[0].bounds(), layers[1].bounds(), strict=True))
    assert layers[0].seen == layers[1].seen == 8


def test_a_token_of_a_paged_layer_is_written_as_ever() -> None:
    model = wide("llava", torch.float32)
    pages = KVPages(model.config, pages=8, page_size=16)
    states = [torch.randn(2, 2, tokens, 32) for tokens in (16, 16, 1, 1)]  # the token begins a page
    layers = PagedLayer(pages), PagedLayer(pages)
    for layer in layers:
        layer.update(states[0], states[1])
    layers[0].announce(states[2], states[3])
    layers[1].update(states[2], states[3])
    assert torch.equal(layers[0].write_waiting()[0], states[2])
    for found, wanted in zip(layers[0].buffer(), layers[1].buffer(), strict=True):
        assert torch.equal(found, wanted)
    assert layers[0].ends == layers[1].ends == [17, 17]
