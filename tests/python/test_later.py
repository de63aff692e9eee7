"""Later questions: the cache answers them as if the whole conversation had been read with the last one in mind."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache
from lightvlm.methods import KVPrecision, ZipVLPrefill
from lightvlm.methods.decode_compaction import DecodeCompaction
from python.test_decode import plan_of
from python.test_prefill import ROWS, lightvlm_plan, noise, prompt
from python.tiny import DEPTH, LLAVA, QWEN, Family, Image, extend, generate, generate_logits
from torch import Tensor

QUESTION = torch.tensor([[21, 22, 23], [24, 25, 26], [27, 28, 29], [30, 31, 32]])
ANSWER = torch.tensor([[3, 4], [4, 5], [5, 6], [6, 7]])
ZIPVL = lightvlm.Plan(
    prefill=ZipVLPrefill(tau=0.6, recent_rows=4, random_rows=2, min_tokens=1, unimportant="drop")
)
PLANS = {
    "reduced": lightvlm_plan(),
    "compacted": plan_of("usual"),
    "compacted-only": plan_of("every-token", reduce=False),
    "every-token": plan_of("every-token"),
    "zipvl-drop": ZIPVL,
}


class Conversation:
    """A batch of conversations on one cache, and what they are read afresh."""

    def __init__(self, model: Any, family: Family, rows: Any, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.family, self.rows, self.dtype = model, family, [list(row) for row in rows], dtype
        self.cache: Any = None
        self.mask = torch.empty(0)

    def read(self, **options: Any) -> Tensor:
        inputs = prompt(self.family, self.rows, self.dtype)
        out = self.model(**inputs, **options)
        self.cache, self.mask = out.past_key_values, inputs["attention_mask"]
        return out.logits

    def say(self, tokens: Tensor, **options: Any) -> Any:
        """All of the tokens (B, S) at once."""
        out, self.mask = extend(
            self.family, self.model, self.mask, tokens, past_key_values=self.cache, **options
        )
        assert out.past_key_values is self.cache
        for row, more in zip(self.rows, tokens.tolist(), strict=True):
            row += more
        return out

    def answer(self, tokens: Tensor) -> Tensor:
        """One after the other: logits (B, S, V)."""
        return torch.cat([self.say(token).logits for token in tokens.split(1, dim=1)], dim=1)

    def fork(self) -> Conversation:
        """The same conversation on a copy of the cache."""
        other = self.afresh()
        other.cache, other.mask = copy.deepcopy(self.cache), self.mask
        return other

    def afresh(self) -> Conversation:
        """The same conversation on an empty cache, nothing read yet."""
        return Conversation(self.model, self.family, self.rows, self.dtype)


def check(found: Conversation, tokens: Tensor, more: Tensor, limit: float) -> None:
    """A question, and the answer after it, are as on a cache that never held anything."""
    logits = found.say(tokens).logits
    assert logits.shape[1] == tokens.shape[1]
    expected = found.afresh()
    assert (expected.read()[:, -tokens.shape[1] :] - logits).abs().max() <= limit
    assert [layer.ends for layer in found.cache.layers] == [layer.ends for layer in expected.cache.layers]
    deltas = getattr(found.model.model, "rope_deltas", None)
    assert (expected.answer(more) - found.answer(more)).abs().max() <= limit
    assert [layer.ends for layer in found.cache.layers] == [layer.ends for layer in expected.cache.layers]
    assert found.cache.get_seq_length() == found.mask.shape[1]
    if deltas is not None:
        assert torch.equal(deltas, found.model.model.rope_deltas)


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


def test_inputs_that_a_transcript_does_not_hold(llava: Any) -> None:
    """A decoder that is given more than embeddings and positions cannot be given it again."""
    with torch.no_grad(), lightvlm.attach(llava, PLANS["reduced"]) as run:
        talk = Conversation(llava, LLAVA, ROWS)
        talk.read(visual_features=[torch.zeros(1)])
        talk.say(QUESTION)
    reason = "the decoder was given visual_features, which cannot be given again"
    assert run.report().stepped_aside == {reason: 1}


def test_a_later_image_is_reduced(llava: Any) -> None:
    """An image that comes with a later question is part of the conversation that is read anew."""
    limit = 4 * noise(llava, LLAVA, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(llava, PLANS["reduced"], trace=True) as run:
        talk = Conversation(llava, LLAVA, [ROWS[0], ROWS[2]])
        talk.read()
        talk.answer(ANSWER[:2])
        turn = LLAVA.batch([[7, Image(9), 8, 9], [5, Image(8), 8, 9]])
        out, talk.mask = extend(
            LLAVA,
            llava,
            talk.mask,
            turn["input_ids"],
            pixel_values=turn["pixel_values"],
            past_key_values=talk.cache,
            output_hidden_states=True,
        )
        for row, more in zip(talk.rows, ([7, Image(9), 8, 9], [5, Image(8), 8, 9]), strict=True):
            row += more
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
        turn = LLAVA.batch([[7, Image(9), 8, 9], [5, Image(8), 8, 9]])
        _, talk.mask = extend(
            LLAVA,
            llava,
            talk.mask,
            turn["input_ids"],
            pixel_values=turn["pixel_values"],
            past_key_values=talk.cache,
        )
        for row, more in zip(talk.rows, ([7, Image(9), 8, 9], [5, Image(8), 8, 9]), strict=True):
            row += more
        reason = "an image arrived on a cache that already holds tokens; nothing was read anew"
        assert run.report().stepped_aside == {reason: 1}
        talk.answer(ANSWER[:2])  # compacted at every token
        check(talk, QUESTION[:2], ANSWER[:2], limit)
        assert run.report().reread == 1


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


def test_padding_among_later_tokens_cannot_be_read_anew(llava: Any) -> None:
    """A whole cache takes it, but as a prompt it would be a hole."""
    with torch.no_grad(), lightvlm.attach(llava, PLANS["compacted-only"]) as run:
        talk = Conversation(llava, LLAVA, ROWS)
        talk.read()
        mask = torch.cat([talk.mask, torch.tensor([[0, 1]] + [[1, 1]] * 3)], dim=1)
        positions = LLAVA.positions(llava, mask, 2)
        llava(input_ids=ANSWER, attention_mask=mask, position_ids=positions, past_key_values=talk.cache)
        talk.mask = mask
        talk.answer(ANSWER)
        talk.say(QUESTION)
    reason = "the conversation cannot be read anew: there was padding among later tokens"
    assert run.report().stepped_aside == {reason: 1}


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
