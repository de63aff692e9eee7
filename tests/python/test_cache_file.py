"""Saving and loading a CompactCache: what was read goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache, KVPrecision
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.zipvl import ZipVLPrefill
from python.test_precision import LONG
from python.test_prefill import lightvlm_plan, prompt
from python.tiny import LLAVA, extend
from safetensors.torch import save_file

COMPACTION = DecodeCompaction(keep=0.3, interval=8, sinks=2, recent=6)
FEW_BITS = KVPrecision(sinks=2, recent=6, interval=64)
ZIPVL = ZipVLPrefill(tau=0.7, recent_rows=4, random_rows=5, min_tokens=1)
PLANS = {
    "whole": lightvlm.Plan(),
    "reduced": lightvlm_plan(),
    "renumbered": lightvlm.LightKV(layers=(1, 2, 3), windows=(1,), positions="renumber", min_image_tokens=0),
    "compacted": lightvlm.Plan(cache=COMPACTION),
    "queries": lightvlm.Plan(
        cache=DecodeCompaction(keep=0.3, interval=8, sinks=2, recent=6, score="queries")
    ),
    "packed": lightvlm.Plan(precision=FEW_BITS),
    "zipvl": lightvlm.Plan(prefill=ZIPVL, precision=KVPrecision(low_bits=2, sinks=2, recent=6, interval=64)),
    "packed-compacted": lightvlm.Plan(cache=COMPACTION, precision=FEW_BITS),
}


@pytest.fixture(scope="module")
def model() -> Any:
    """Heads of 32 channels, which a packed cache needs."""
    return LLAVA.build(head_dim=32)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("capacity", [None, 400])
def test_a_loaded_cache_goes_on(model: Any, name: str, capacity: int | None, tmp_path: Path) -> None:
    """Saved after 90 tokens of two rows of different length; 40 more, past another packing, in both."""
    inputs = prompt(LLAVA, LONG)
    mask = inputs["attention_mask"]
    with torch.no_grad(), lightvlm.attach(model, PLANS[name]):
        cache = model(**inputs, past_key_values=CompactCache(model.config, PLANS[name])).past_key_values
        for step in range(90):
            _, mask = extend(LLAVA, model, mask, torch.tensor([[3 + step % 30], [4]]), past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        other = CompactCache.load(tmp_path / "cache.safetensors", model.config, capacity=capacity)
        assert other.plan == cache.plan
        assert other.kv_bytes_full == cache.kv_bytes_full
        assert other.get_seq_length() == cache.get_seq_length()
        for step in range(40):
            tokens = torch.tensor([[5 + step % 20], [6]])
            first, longer = extend(LLAVA, model, mask, tokens, past_key_values=cache)
            second, mask = extend(LLAVA, model, mask, tokens, past_key_values=other)
            assert torch.allclose(first.logits, second.logits, atol=1e-5)
            assert torch.equal(longer, mask)


@pytest.mark.parametrize("keep", ["offload", "quantize", "drop"])
@pytest.mark.parametrize("paged", [False, True])
def test_a_later_question_to_a_loaded_cache(model: Any, keep: str, paged: bool, tmp_path: Path) -> None:
    """What was dropped is read anew as if the conversation had never been a file; with "drop" the report says so."""
    from python.talk import ANSWER, QUESTION, Conversation
    from python.test_prefill import ROWS

    plan = lightvlm.Plan(lightvlm_plan().prefill, COMPACTION, keep_for_later=keep)  # type: ignore[arg-type]
    path = tmp_path / "cache.safetensors"
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        talk = Conversation(model, LLAVA, ROWS)
        talk.read()
        talk.answer(ANSWER)
        talk.cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
        talk.cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
        talk.cache.save(path)
        expected = talk.fork().say(QUESTION).logits
        if paged:
            pages = lightvlm.KVPages(model.config, pages=300, page_size=16)
            talk.cache = lightvlm.PagedCompactCache.load(path, model.config, pages=pages)
        else:
            talk.cache = CompactCache.load(path, model.config)
        found = talk.say(QUESTION).logits
    assert (found - expected).abs().max() <= (1e-4 if keep != "quantize" else 1e-3)
    if keep == "drop":
        assert run.report().reread == 0
        assert any("keep_for_later='drop'" in reason for reason in run.report().stepped_aside)
    else:
        assert run.report().reread == 2


def test_an_empty_cache(model: Any, tmp_path: Path) -> None:
    CompactCache(model.config).save(tmp_path / "cache.safetensors")
    cache = CompactCache.load(tmp_path / "cache.safetensors", model.config)
    assert cache.get_seq_length() == 0
    assert not cache.layers[0].is_initialized


def test_bad_files(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a cache of lightvlm in format 2, got format None"):
        CompactCache.load(path, model.config)
    with torch.no_grad():
        cache = model(**prompt(LLAVA, LONG), past_key_values=CompactCache(model.config)).past_key_values
    cache.save(path)
    with pytest.raises(
        ValueError, match="is a cache of another model: it has 5 layers of 2 heads of 32 channels"
    ):
        CompactCache.load(path, LLAVA.build().config)
    held = cache.get_seq_length()
    with pytest.raises(
        ValueError, match=f"capacity of the cache is {held - 1} tokens; the file holds {held}"
    ):
        CompactCache.load(path, model.config, capacity=held - 1)
    with pytest.raises(OSError, match="nowhere"):
        CompactCache.load(tmp_path / "nowhere", model.config)


def test_what_a_failed_reading_left_is_not_saved(model: Any, tmp_path: Path) -> None:
    from lightvlm.transcript import Transcript

    cache = CompactCache(model.config)
    cache.transcript = Transcript("offload")
    cache.transcript.unfinished = True
    with pytest.raises(ValueError, match="conversation was being read anew when a call failed; reset it"):
        cache.save(tmp_path / "cache.safetensors")


def test_loading_in_inference_mode_and_into_too_little_room(model: Any, tmp_path: Path) -> None:
    path, inputs = tmp_path / "cache.safetensors", prompt(LLAVA, LONG)
    plan = PLANS["packed-compacted"]
    with torch.no_grad(), lightvlm.attach(model, plan):
        cache = model(**inputs).past_key_values
        cache.save(path)
        held = cache.layers[0].held
        with pytest.raises(ValueError, match=f"capacity of the cache is 8 tokens; the file holds {held}"):
            CompactCache.load(path, model.config, capacity=8)
        with torch.inference_mode():
            loaded = CompactCache.load(path, model.config)
        mask = inputs["attention_mask"]
        for step in range(80):
            tokens = torch.tensor([[5 + step % 20], [6]])
            out, mask = extend(LLAVA, model, mask, tokens, past_key_values=loaded)
        assert out.logits.isfinite().all()
