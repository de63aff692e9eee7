"""Later questions: the cache answers them as if the whole conversation had been read with the last one in mind."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.decode_compaction import DecodeCompaction
from python.talk import ANSWER, PLANS, QUESTION, Conversation, check
from python.test_decode import plan_of
from python.test_prefill import ROWS, lightvlm_plan, noise, prompt
from python.tiny import LLAVA, QWEN, Family, Image, generate, generate_logits


@pytest.mark.parametrize("name", PLANS)
def test_a_second_and_a_third_question(model: Any, family: Family, name: str) -> None:
    """A padded batch: one image, none, two, and an image almost last; through forward()."""
    limit = 4 * noise(model, family, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(model, PLANS[name]) as run:
        talk = Conversation(model, family, ROWS)
        talk.read()
        talk.answer(ANSWER)
        check(talk, QUESTION, ANSWER.flip(1), limit)
        check(talk, QUESTION.flip(0, 1), ANSWER, limit)
        report = run.report()
    assert report.reread == 2
    assert report.stepped_aside == {}
    assert report.prefills == 5 * len(ROWS)  # the first, and twice anew and afresh


def test_what_was_dropped_changes_answers(model: Any, family: Family) -> None:
    """The tests above could not fail if a cache that lacks tokens gave the same logits."""
    limit = 4 * noise(model, family, ROWS) + 1e-5
    plan = dataclasses.replace(PLANS["reduced"], keep_for_later="drop")
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        talk = Conversation(model, family, ROWS)
        talk.read()
        talk.answer(ANSWER)
        found = talk.say(QUESTION).logits
        expected = talk.afresh().read()[:, -3:]
    far = (expected - found).abs().amax((1, 2))
    assert far[0] > 100 * limit
    assert far[1] <= limit  # a row without an image
    assert run.report().reread == 0


@pytest.mark.parametrize("name", ["reduced", "compacted"])
def test_generate_goes_on(model: Any, family: Family, name: str) -> None:
    """generate() gets the whole conversation as ids, and passes on what the cache has not seen."""
    row, more, limit = ROWS[2], [40, 41, 42, 43], 4 * noise(model, family, ROWS) + 1e-5
    with lightvlm.attach(model, PLANS[name]) as run:
        out = model.generate(
            **family.batch([row]), max_new_tokens=9, do_sample=False, return_dict_in_generate=True
        )
        cache = out.past_key_values
        rows = [[*row, *out.sequences[0, -9:].tolist(), *more]]
        for turn in (1, 2):
            whole = family.batch(rows)
            ids = whole["input_ids"]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            tokens, logits = generate_logits(model, inputs, 12, past_key_values=cache)
            deltas = getattr(model.model, "rope_deltas", None)
            assert run.report().reread == turn
            expected = generate_logits(model, whole, 12)
            assert torch.equal(tokens, expected[0])
            assert (logits - expected[1]).abs().max() <= limit
            assert deltas is None or torch.equal(deltas, model.model.rope_deltas)
            rows = [[*rows[0], *tokens[0].tolist(), *more]]
    assert run.report().stepped_aside == {}


@pytest.mark.parametrize("name", ["reduced", "compacted"])
def test_what_the_decode_loop_said_is_remembered(model: Any, family: Family, name: str) -> None:
    """lightvlm.generate() goes around the model while it decodes; a question afterwards has it all read anew."""
    with lightvlm.attach(model, PLANS[name]) as run:
        prompt_ = family.batch([ROWS[2]])
        out = lightvlm.generate(
            model, **prompt_, max_new_tokens=9, do_sample=False, return_dict_in_generate=True
        )
        new = len(out.sequences[0]) - prompt_["input_ids"].shape[1]
        whole = family.batch([[*ROWS[2], *out.sequences[0, -new:].tolist(), 40, 41, 42]])
        ids = whole["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = lightvlm.generate(
            model, **inputs, max_new_tokens=9, do_sample=False, past_key_values=out.past_key_values
        )
        assert run.report().reread == 1
        assert run.report().stepped_aside == {}
        assert torch.equal(found[:, -9:], generate(model, whole, 9))


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str
)
def test_several_continuations_of_a_later_question(llava: Any, options: dict[str, Any]) -> None:
    """Beams that change places while a later question is answered, and are then asked one more."""
    with lightvlm.attach(llava, PLANS["compacted"]) as run:
        out = llava.generate(
            **LLAVA.batch([ROWS[2]]), max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
        cache, more = out.past_key_values, [40, 41, 42]
        cache.batch_repeat_interleave(3)
        rows = [[*ROWS[2], *out.sequences[0, -5:].tolist(), *more]]
        whole = LLAVA.batch(rows)
        inputs = {key: whole[key] for key in ("input_ids", "attention_mask")}
        torch.manual_seed(1)
        found = generate(llava, inputs, 8, past_key_values=cache, **options)
        torch.manual_seed(1)
        assert torch.equal(found, generate(llava, whole, 8, **options))
        assert run.report().reread == 1


@pytest.mark.parametrize("change", ["select", "repeat", "reorder"])
def test_rows_that_change_places(model: Any, family: Family, change: str) -> None:
    """Rows of different length, with other answers: what was said goes where the row goes."""
    limit = 4 * noise(model, family, ROWS) + 1e-5
    order = {"select": [2, 0], "repeat": [0, 0, 1, 1, 2, 2, 3, 3], "reorder": [3, 1, 0, 2]}[change]
    with torch.no_grad(), lightvlm.attach(model, PLANS["compacted"]) as run:
        talk = Conversation(model, family, ROWS)
        talk.read()
        talk.answer(ANSWER)
        if change == "repeat":
            talk.cache.batch_repeat_interleave(2)
        else:
            getattr(talk.cache, "reorder_cache" if change == "reorder" else "batch_select_indices")(
                torch.tensor(order)
            )
        talk.rows, talk.mask = [list(talk.rows[row]) for row in order], talk.mask[order]
        if family is QWEN:
            model.model.rope_deltas = model.model.rope_deltas[order]
        question = torch.arange(10, 10 + 3 * len(order)).reshape(-1, 3)
        found = talk.say(question).logits
        assert run.report().reread == 1
        pad = min(talk.cache.leftpad)
        assert pad == (0 if 2 in order else pad)
        for b, row in enumerate(talk.rows):
            alone = Conversation(model, family, [row])
            assert (alone.read()[:, -3:] - found[b]).abs().max() <= limit
        assert run.report().stepped_aside == {}


def test_a_prefix_is_shared(model: Any, family: Family) -> None:
    """An image is read once, with no question; copies of its cache get one each, and leave it as it was."""
    limit = 4 * noise(model, family, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(model, PLANS["reduced"]) as run:
        talk = Conversation(model, family, [[1, 2, Image(0)], [1, Image(4)]])
        talk.read()
        one, two = talk.fork(), talk.fork()
        before = talk.cache.transcript.nbytes
        check(one, QUESTION[:2], ANSWER[:2], limit)
        check(two, QUESTION[2:], ANSWER[2:], limit)
        held = [each.cache.transcript._held[0].states.data_ptr() for each in (talk, one, two)]
        assert len(set(held)) == 1
        assert (talk.cache.transcript.length, talk.cache.transcript.nbytes) == (talk.mask.shape[1], before)
        assert run.report().reread == 2


def test_crop(model: Any, family: Family) -> None:
    """What was taken back was not said."""
    limit = 4 * noise(model, family, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(model, PLANS["reduced"]):
        talk = Conversation(model, family, ROWS)
        talk.read()
        talk.answer(QUESTION)
        talk.cache.crop(-2)
        talk.rows, talk.mask = [row[:-2] for row in talk.rows], talk.mask[:, :-2]
        check(talk, QUESTION.flip(0), ANSWER, limit)


def test_drafts_are_no_question(model: Any, family: Family) -> None:
    """Assisted decoding verifies several tokens at once: neither they nor crops have anything read anew. A question
    that is answered that way is answered as ever."""
    row = [*ROWS[2], 11, 12, 13, 11, 12]
    with lightvlm.attach(model, PLANS["reduced"]) as run:
        options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
        out = model.generate(**family.batch([row]), **options, prompt_lookup_num_tokens=3)
        assert run.report().reread == 0
        rows = [[*row, *out.sequences[0, -12:].tolist(), 13, 11, 12, 13, 11]]
        whole = family.batch(rows)
        # with assistance transformers takes what it is given for new
        inputs = {
            "input_ids": whole["input_ids"][:, out.past_key_values.get_seq_length() :],
            "attention_mask": whole["attention_mask"],
        }
        out = model.generate(
            **inputs, **options, past_key_values=out.past_key_values, prompt_lookup_num_tokens=3
        )
        assert run.report().reread == 1
        assert torch.equal(out.sequences[:, -12:], generate(model, whole, 12))


def test_one_token_is_decoding(llava: Any) -> None:
    with torch.no_grad(), lightvlm.attach(llava, PLANS["reduced"]) as run:
        talk = Conversation(llava, LLAVA, ROWS)
        talk.read()
        talk.say(QUESTION[:, :1])
        talk.say(QUESTION, logits_to_keep=3)  # drafts are told by the logits that are asked for
        assert run.report().reread == 0


def test_chunks_of_a_prompt_are_no_question(model: Any, family: Family) -> None:
    """generate(prefill_chunk_size=...): the first chunk alone is reduced, as without a transcript; a later question has
    the whole read as one, in chunks itself or not."""
    row, limit = [1, Image(0), *range(2, 21)], 4 * noise(model, family, ROWS) + 1e-5
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    found, caches = [], []
    for keep in ("drop", "offload"):
        plan = dataclasses.replace(PLANS["reduced"], keep_for_later=keep)
        with lightvlm.attach(model, plan) as run:
            out = model.generate(**family.batch([row]), **options, prefill_chunk_size=20)
            found.append(out.sequences)
            caches.append(out.past_key_values)
            assert run.report().reread == 0
            assert run.report().stepped_aside == {}
    assert torch.equal(*found)
    whole = family.batch([[*row, *found[0][0, -6:].tolist(), *range(30, 40)]])
    inputs = {key: whole[key] for key in ("input_ids", "attention_mask")}
    with lightvlm.attach(model, PLANS["reduced"]) as run:
        chunked = copy.deepcopy(caches[1])
        expected = generate_logits(model, whole, 6)
        tokens, logits = generate_logits(model, inputs, 6, past_key_values=caches[1])
        assert run.report().reread == 1
        # the first chunk of a later question is a question of its own; the next go on with what it found
        generate(model, inputs, 6, past_key_values=chunked, prefill_chunk_size=4)
        assert run.report().reread == 2
    assert torch.equal(tokens, expected[0])
    assert (logits - expected[1]).abs().max() <= limit


@pytest.mark.parametrize("first", [0, 1])
def test_a_question_right_after_a_prompt(model: Any, family: Family, first: int) -> None:
    """No token was decoded between, as between chunks: the prompt came through forward(), or generate() stopped at its
    first token, which the cache does not hold yet."""
    row, limit = ROWS[0], 4 * noise(model, family, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(model, PLANS["reduced"]) as run:
        if first:
            options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
            out = model.generate(**family.batch([row]), **options)
            said = out.sequences[0, -1:].tolist()
        else:
            out, said = model(**prompt(family, [row]), logits_to_keep=1), []
        whole = family.batch([[*row, *said, 40, 41, 42]])
        inputs = {key: whole[key] for key in ("input_ids", "attention_mask")}
        tokens, logits = generate_logits(model, inputs, 6, past_key_values=out.past_key_values)
        assert run.report().reread == 1
        expected = generate_logits(model, whole, 6)
    assert torch.equal(tokens, expected[0])
    assert (logits - expected[1]).abs().max() <= limit


def test_a_later_image_is_reduced(llava: Any) -> None:
    """An image that comes with a later question is part of the conversation that is read anew."""
    limit = 4 * noise(llava, LLAVA, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(llava, PLANS["reduced"], trace=True) as run:
        talk = Conversation(llava, LLAVA, [ROWS[0], ROWS[2]])
        talk.read()
        talk.answer(ANSWER[:2])
        out = talk.show([[7, Image(9), 8, 9], [5, Image(8), 8, 9]], output_hidden_states=True)
        kept = run.kept
        expected = talk.afresh()
        logits = expected.read()
        new = 3 + 5  # of 16 tokens of the image, 30 % stay
        assert out.logits.shape[1] == new
        assert (out.logits - logits[:, -new:]).abs().max() <= limit
        assert [x.shape[1] for x in out.hidden_states] == [19, 19, 3 + 11, 3 + 7, 3 + 5, 3 + 5]
        assert run.kept == kept
        check(talk, QUESTION[:2], ANSWER[:2], limit)
    assert run.report().stepped_aside == {}


def test_an_image_after_text_is_remembered(llava: Any) -> None:
    """Nothing was dropped when it came, so it was not reduced; later questions find it all the same."""
    limit = 4 * noise(llava, LLAVA, ROWS) + 1e-5
    plan = dataclasses.replace(plan_of("every-token"), prefill=lightvlm_plan().prefill)
    with torch.no_grad(), lightvlm.attach(llava, plan) as run:
        talk = Conversation(llava, LLAVA, [[1, 2, 3], [4, 5]])
        talk.read()
        talk.show([[7, Image(9), 8, 9], [5, Image(8), 8, 9]])
        reason = "an image arrived on a cache that already holds tokens; nothing was read anew"
        assert run.report().stepped_aside == {reason: 1}
        talk.answer(ANSWER[:2])  # compacted at every token
        check(talk, QUESTION[:2], ANSWER[:2], limit)
        assert run.report().reread == 1


def test_a_question_after_drafts(llava: Any) -> None:
    """What drafts set off waits for the next call; where that is a question, it is dropped before the question asks."""
    cache_part = DecodeCompaction(keep=0.3, interval=4, sinks=1, recent=8)
    with torch.no_grad(), lightvlm.attach(llava, lightvlm.Plan(cache=cache_part)) as run:
        talk = Conversation(llava, LLAVA, ROWS[2:3])
        talk.read()
        talk.say(torch.arange(10, 15)[None], logits_to_keep=5)
        assert talk.cache.waits
        found = talk.say(torch.tensor([[20, 21, 22]])).logits
        assert run.report().reread == 1
        expected = Conversation(llava, LLAVA, talk.rows).read()
    assert (found - expected[:, -3:]).abs().max() <= 4 * noise(llava, LLAVA, ROWS) + 1e-5
