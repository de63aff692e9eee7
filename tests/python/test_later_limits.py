"""Later questions: what is kept for them, in which dtype and mode, and where nothing is read anew."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache, KVPages, PagedCompactCache
from lightvlm.methods import KVPrecision
from lightvlm.methods.decode_compaction import DecodeCompaction
from python.talk import ANSWER, PLANS, QUESTION, ZIPVL, Conversation, check
from python.test_decode import plan_of
from python.test_prefill import ROWS, lightvlm_plan, noise, prompt
from python.tiny import DEPTH, LLAVA, QWEN, Family, Image, extend

from lightvlm_ext import OutOfPages


def test_inputs_that_a_transcript_does_not_hold(llava: Any) -> None:
    """A decoder that is given more than embeddings and positions cannot be given it again."""
    with torch.no_grad(), lightvlm.attach(llava, PLANS["reduced"]) as run:
        talk = Conversation(llava, LLAVA, ROWS)
        talk.read(visual_features=[torch.zeros(1)])
        talk.say(QUESTION)
    reason = "the decoder was given visual_features, which cannot be given again"
    assert run.report().stepped_aside == {reason: 1}


def test_a_fixed_capacity_keeps_its_buffers(model: Any, family: Family) -> None:
    limit = 4 * noise(model, family, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(model, PLANS["compacted"]):
        talk = Conversation(model, family, ROWS)
        cache = CompactCache(model.config, capacity=80)
        talk.read(past_key_values=cache)
        buffers = [(layer.key_storage.data_ptr(), layer.value_storage.data_ptr()) for layer in cache.layers]
        talk.answer(ANSWER)
        check(talk, QUESTION, ANSWER, limit)
        found = [(layer.key_storage.data_ptr(), layer.value_storage.data_ptr()) for layer in cache.layers]
        assert found == buffers


def test_a_capacity_that_is_too_small_steps_aside(llava: Any) -> None:
    """Compacted, the conversation fits; as a whole it would not."""
    with torch.no_grad(), lightvlm.attach(llava, PLANS["every-token"]) as run:
        talk = Conversation(llava, LLAVA, ROWS[:1])
        talk.read(past_key_values=CompactCache(llava.config, capacity=22))
        talk.answer(ANSWER[:1])
        assert talk.say(QUESTION[:1]).logits.isfinite().all()
    reason = "the cache's capacity (22) is too small to read the conversation anew"
    assert run.report().stepped_aside == {reason: 1}
    assert run.report().reread == 0


@pytest.mark.parametrize("plan", ["reduced", "compacted"])
def test_a_cache_in_pages(model: Any, family: Family, plan: str) -> None:
    """Read anew in the pages that it has; a fork and taken rows ask on their own."""
    limit = 4 * noise(model, family, ROWS) + 1e-5
    pages = KVPages(model.config, pages=400, page_size=16)
    with torch.no_grad(), lightvlm.attach(model, PLANS[plan]) as run:
        talk = Conversation(model, family, ROWS)
        talk.read(past_key_values=PagedCompactCache(model.config, pages=pages))
        talk.answer(ANSWER)
        other = talk.fork()
        talk.cache.reorder_cache(torch.arange(len(ROWS)))
        check(talk, QUESTION, ANSWER, limit)
        check(other, QUESTION.flip(1), ANSWER, limit)
    assert run.report().reread == 2
    assert run.report().stepped_aside == {}


def test_too_few_pages_step_aside(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compacted, the conversation fits; as a whole it would not, not even in the pages that it has."""
    with torch.no_grad(), lightvlm.attach(llava, PLANS["every-token"]) as run:
        pages = KVPages(llava.config, pages=2 * DEPTH, page_size=16)
        talk = Conversation(llava, LLAVA, [[1, Image(0), *range(2, 8)]])  # 23 tokens
        talk.read(past_key_values=PagedCompactCache(llava.config, pages=pages))
        talk.answer(ANSWER[:1])
        wide = QUESTION[:1].repeat(1, 3)
        assert talk.say(wide).logits.isfinite().all()
        # should they run out all the same, the conversation is not taken for an empty one
        monkeypatch.setattr(PagedCompactCache, "lacks_room", lambda cache, tokens: None)
        with pytest.raises(OutOfPages):
            talk.say(wide)
        assert pages.available == pages.pages
        with pytest.raises(ValueError, match="was being read anew when a call failed; reset it"):
            talk.say(wide)
    assert run.report().stepped_aside == {"too few pages are left to read the conversation anew": 1}
    assert run.report().reread == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_that_is_returned_is_of_the_new_tokens(attention: str) -> None:
    model = LLAVA.build(attention=attention)
    with torch.no_grad(), lightvlm.attach(model, PLANS["reduced"]) as run:
        options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
        talk = Conversation(model, LLAVA, ROWS)
        talk.read()
        other = copy.deepcopy(talk.cache)
        mask = talk.mask
        out = talk.say(QUESTION, **options)
        fresh = talk.afresh()
        inputs = prompt(LLAVA, fresh.rows)
        expected = model(**inputs, **options)
        assert len(out.hidden_states) == len(expected.hidden_states)
        for found, whole in zip(out.hidden_states, expected.hidden_states, strict=True):
            assert found.shape[1] == 3
            assert torch.allclose(found, whole[:, -3:], atol=1e-4)
        if attention == "eager":
            assert torch.allclose(out.attentions[0], expected.attentions[0][:, :, -3:], atol=1e-5)
        found, _ = extend(LLAVA, model, mask, QUESTION, past_key_values=other, return_dict=False)
        assert torch.allclose(found[0], out.logits, atol=1e-5)
    assert run.report().reread == 2


def test_a_packed_cache_is_packed_anew() -> None:
    model = LLAVA.build(head_dim=32)
    rows = [[1, 2, Image(0), *range(3, 21)], [1, Image(1), 9, Image(2), *range(10, 20)]]
    plan = lightvlm.Plan(
        prefill=lightvlm_plan().prefill, precision=KVPrecision(bits=4, sinks=2, recent=6, interval=64)
    )
    limit = 4 * noise(model, LLAVA, rows) + 1e-5
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        talk = Conversation(model, LLAVA, rows)
        talk.read()
        talk.answer(ANSWER[:2])
        check(talk, QUESTION[:2], ANSWER[:2], limit)
        assert run.report().reread == 1
    with torch.no_grad(), lightvlm.attach(model, lightvlm.Plan(precision=plan.precision)) as run:
        talk = Conversation(model, LLAVA, rows)
        talk.read()
        talk.say(QUESTION[:2])  # fewer bits, but nothing dropped
        assert talk.cache.ragged
        assert talk.cache.transcript is None
    assert (run.report().reread, run.report().stepped_aside) == (0, {})


@pytest.mark.parametrize("keep", ["offload", "quantize"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype, keep: str) -> None:
    """Kept in 16 bits, the conversation is read anew as it is afresh; in 8, as far off as 8 bits of embeddings are."""
    model, exact = LLAVA.build(dtype), LLAVA.build()
    plan = lightvlm.Plan(
        cache=DecodeCompaction(keep=0.2, interval=1, sinks=0, recent=1, rows=1), keep_for_later=keep
    )
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        talk = Conversation(model, LLAVA, ROWS, dtype)
        talk.read()
        talk.answer(ANSWER)
        found = talk.say(QUESTION).logits.float()
        expected = talk.afresh().read()[:, -3:].float()
        assert run.report().reread == 1
    with torch.no_grad():
        wanted = Conversation(exact, LLAVA, talk.rows).read()[:, -3:]
    noise_of_dtype = (expected - wanted).abs().max()
    far = (found - wanted).abs().max()
    assert far <= (1.01 if keep == "offload" else 12 if dtype == torch.float16 else 3) * noise_of_dtype


def test_inputs_embeds(llava: Any) -> None:
    """Embeddings that the caller gives are kept as they are given, even if the caller writes to them afterwards."""
    limit = 4 * noise(llava, LLAVA, ROWS) + 1e-5
    table = llava.get_input_embeddings()
    with torch.no_grad(), lightvlm.attach(llava, PLANS["compacted-only"]) as run:
        found = []
        for spoil in (True, False):
            embeds = table(torch.arange(1, 31)[None])
            out = llava(inputs_embeds=embeds)
            if spoil:
                embeds.zero_()
            cache = out.past_key_values
            for token in (31, 32):
                llava(input_ids=torch.tensor([[token]]), past_key_values=cache)
            found.append(llava(inputs_embeds=table(QUESTION[:1]), past_key_values=cache).logits)
        expected = llava(input_ids=torch.tensor([[*range(1, 33), *QUESTION[0].tolist()]])).logits[:, -3:]
    assert run.report().reread == 2
    assert (torch.cat(found) - expected).abs().max() <= limit


def test_bytes_kept(llava: Any) -> None:
    """C * 2 bytes a token in 16 bits and C + 4 in 8, and ids and positions of 8 bytes each."""
    rows, tokens = 4, LLAVA.batch(ROWS)["input_ids"].numel()
    model = LLAVA.build(torch.bfloat16)
    for keep, each in (("offload", 32 * 2), ("quantize", 32 + 4), ("drop", 0)):
        plan = dataclasses.replace(PLANS["reduced"], keep_for_later=keep)
        with torch.no_grad(), lightvlm.attach(model, plan) as run:
            talk = Conversation(model, LLAVA, ROWS, torch.bfloat16)
            talk.read()
            small = run.report().later_bytes - tokens * each
            assert (small == 0) if keep == "drop" else (16 * tokens <= small <= 16 * (tokens + 128 * rows))
            talk.answer(ANSWER)
            assert run.report().later_bytes - tokens * each == small


def test_nothing_is_kept_where_nothing_can_be_dropped(llava: Any) -> None:
    keeps_all = (
        lightvlm.Plan(),
        lightvlm.LightVLM(keep=1, decode_keep=None),
        lightvlm.Plan(prefill=dataclasses.replace(ZIPVL.prefill, unimportant="keep")),  # type: ignore[type-var]
    )
    for plan in keeps_all:
        with torch.no_grad(), lightvlm.attach(llava, plan) as run:
            talk = Conversation(llava, LLAVA, ROWS)
            talk.read(past_key_values=CompactCache(llava.config))
            talk.say(QUESTION)
        assert talk.cache.transcript is None
        assert (run.report().reread, run.report().later_bytes) == (0, 0)


def test_a_cache_that_lost_nothing_is_not_read_anew(llava: Any) -> None:
    """Compaction may come, but has not yet."""
    plan = lightvlm.LightVLM(keep=1, decode_interval=50, decode_keep=0.1, decode_recent=1, decode_rows=1)
    with torch.no_grad(), lightvlm.attach(llava, plan) as run:
        talk = Conversation(llava, LLAVA, ROWS)
        talk.read()
        talk.say(QUESTION)
        assert run.report().reread == 0
        assert talk.cache.transcript.length == talk.mask.shape[1]


def test_what_was_said_unattached_is_missing(llava: Any) -> None:
    plan = lightvlm.Plan(cache=plan_of("every-token").cache)
    with torch.no_grad():
        with lightvlm.attach(llava, plan):
            talk = Conversation(llava, LLAVA, ROWS)
            talk.read()
        talk.say(QUESTION)
        with lightvlm.attach(llava, plan) as run:
            talk.answer(ANSWER)
            talk.say(QUESTION)
    reason = "a later question was asked of a cache that was filled while no run was attached, too"
    assert run.report().stepped_aside == {reason: 1}


def test_padding_among_later_tokens_is_refused(llava: Any) -> None:
    """Also where the cache is whole still: once it is compacted, nobody would know which keys to skip."""
    with torch.no_grad(), lightvlm.attach(llava, PLANS["compacted-only"]):
        talk = Conversation(llava, LLAVA, ROWS)
        talk.read()
        mask = torch.cat([talk.mask, torch.tensor([[0, 1]] + [[1, 1]] * 3)], dim=1)
        positions = LLAVA.positions(llava, mask, 2)
        new = {"input_ids": ANSWER, "attention_mask": mask, "position_ids": positions}
        with pytest.raises(ValueError, match="attention_mask has padding among the new tokens"):
            llava(**new, past_key_values=talk.cache)
        talk.say(QUESTION)


def test_a_call_that_fails_while_reading_anew(llava: Any) -> None:
    """The cache is empty by then; it says so instead of taking the next question for a prompt."""

    def fail(*_: Any) -> None:
        raise InterruptedError

    limit = 4 * noise(llava, LLAVA, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(llava, PLANS["reduced"]):
        talk = Conversation(llava, LLAVA, ROWS)
        talk.read()
        handle = llava.model.language_model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(InterruptedError):
            talk.say(QUESTION)
        handle.remove()
        with pytest.raises(ValueError, match="was being read anew when a call failed; reset it"):
            talk.say(QUESTION)
        talk.cache.reset()
        expected = Conversation(llava, LLAVA, ROWS).read()
        assert (talk.read(past_key_values=talk.cache) - expected).abs().max() <= limit


def test_rows_must_be_as_many(llava: Any) -> None:
    with torch.no_grad(), lightvlm.attach(llava, PLANS["reduced"]) as run:
        talk = Conversation(llava, LLAVA, ROWS)
        talk.read()
        with pytest.raises(ValueError, match="the call has 2 rows, the cache has 4"):
            llava(input_ids=QUESTION[:2], past_key_values=talk.cache)
        assert talk.say(QUESTION).logits.shape[:2] == (4, 3)
        assert run.report().reread == 1


def test_inference_mode(model: Any, family: Family) -> None:
    """What was noted in inference mode is read outside of it, and the other way round."""
    limit = 4 * noise(model, family, ROWS) + 1e-5
    with lightvlm.attach(model, PLANS["compacted"]):
        with torch.inference_mode():
            talk = Conversation(model, family, ROWS)
            talk.read()
            talk.answer(ANSWER)
            talk.cache.reorder_cache(torch.arange(4))
        with torch.no_grad():
            if family is QWEN:
                model.model.rope_deltas = model.model.rope_deltas.clone()
            check(talk, QUESTION, ANSWER, limit)
        with torch.inference_mode():
            check(talk, QUESTION, ANSWER, limit)


def test_another_plan_goes_on(llava: Any) -> None:
    """What a plan dropped, the next may read in whole: there is no plan to drop anything."""
    limit = 4 * noise(llava, LLAVA, ROWS) + 1e-5
    with torch.no_grad():
        with lightvlm.attach(llava, PLANS["reduced"]):
            talk = Conversation(llava, LLAVA, ROWS)
            talk.read()
            talk.answer(ANSWER)
        with lightvlm.attach(llava, lightvlm.Plan()):
            found = talk.say(QUESTION).logits
        full = talk.afresh()
        assert (full.read()[:, -3:] - found).abs().max() <= limit
        assert not talk.cache.ragged
        assert all(layer.seen == talk.mask.shape[1] for layer in talk.cache.layers)
    assert len(talk.cache.layers) == DEPTH
