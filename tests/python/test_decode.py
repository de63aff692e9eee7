"""Decoding on a shortened cache: compaction against a slow model of it, several turns, beams, assisted decoding."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache
from lightvlm.methods.decode_compaction import DecodeCompaction
from python.slow import SlowDecoder
from python.test_prefill import ROWS, lightvlm_plan, noise, prompt, slow_options
from python.tiny import (
    DEPTH,
    LLAVA,
    QWEN,
    Family,
    Image,
    extend,
    generate,
    generate_logits,
    require_same,
    take_decoding,
)

COMPACTION: dict[str, dict[str, Any]] = {
    "usual": {"keep": 0.3, "interval": 8, "sinks": 2, "recent": 8, "score": "mass"},
    "every-token": {"keep": 0.2, "interval": 1, "sinks": 0, "recent": 1, "score": "mass"},
    "queries": {"keep": 0.3, "interval": 8, "sinks": 2, "recent": 8, "score": "queries", "rows": 8},
    "one-query": {"keep": 0.2, "interval": 1, "sinks": 0, "recent": 1, "score": "queries", "rows": 1},
    "more-rows-than-window": {
        "keep": 0.4, "interval": 5, "sinks": 1, "recent": 3, "score": "queries", "rows": 16
    },
    "more-rows-than-interval": {
        "keep": 0.4, "interval": 2, "sinks": 0, "recent": 9, "score": "queries", "rows": 7
    },
}  # fmt: skip

FORGOTTEN = "a later question was asked of a cache from which tokens were dropped (keep_for_later='drop')"


def plan_of(name: str, reduce: bool = True) -> lightvlm.Plan:
    prefill = lightvlm_plan().prefill if reduce else None
    return lightvlm.Plan(prefill=prefill, cache=DecodeCompaction(**COMPACTION[name]))


def forgetful(plan: lightvlm.Plan) -> lightvlm.Plan:
    """The plan, under which later tokens find what is left; test_later.py has the others."""
    return dataclasses.replace(plan, keep_for_later="drop")


@pytest.mark.parametrize("reduce", [True, False], ids=["reduced", "whole"])
@pytest.mark.parametrize("name", COMPACTION)
def test_compaction_is_what_it_says(model: Any, family: Family, name: str, reduce: bool) -> None:
    """A padded batch; every step's logits, and how much each layer holds at the end."""
    plan, steps = plan_of(name, reduce), 27
    cache = CompactCache(model.config)
    with lightvlm.attach(model, plan) as run:
        tokens, logits = generate_logits(model, family.batch(ROWS), steps, past_key_values=cache)
    limit = 4 * noise(model, family, ROWS) + 1e-5
    prefill = slow_options(plan.prefill) if reduce else None
    for b, row in enumerate(ROWS):
        slow = SlowDecoder(model, prefill, COMPACTION[name])
        expected = [slow.read(family.batch([row]))[-1]]
        expected += [slow.step(token) for token in tokens[b, :-1].tolist()]
        assert (logits[b] - torch.stack(expected)).abs().max() <= limit
        for index, layer in enumerate(cache.layers):
            stored = slow.keys[index].shape[1]
            assert layer.ends[b] - layer.starts[b] == stored
            keys = layer.keys[b, :, layer.starts[b] : layer.ends[b]]
            assert (keys - slow.keys[index]).abs().max() <= limit
    assert run.report().compactions == (steps - 1) // COMPACTION[name]["interval"] - _idle(name, reduce)
    assert cache.get_seq_length() == family.batch(ROWS)["input_ids"].shape[1] + steps - 1


def _idle(name: str, reduce: bool) -> int:
    """Times that the plan says to compact and every layer of every row is below its budget."""
    return 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_a_width_that_decode_attention_takes(dtype: torch.dtype) -> None:
    """Real decoders' heads: one launch reads each key once for all heads of its group, in padded batches too."""
    model, plan, steps = LLAVA.build(dtype, head_dim=32), plan_of("usual"), 19
    with lightvlm.attach(model, plan) as run:
        tokens, logits = generate_logits(model, LLAVA.batch(ROWS, dtype), steps)
        alone = [generate(model, LLAVA.batch([row], dtype), steps)[0] for row in ROWS]
    assert take_decoding(run.report().op_calls) > DEPTH * steps
    if dtype != torch.float32:
        assert logits.isfinite().all()
        return
    assert torch.equal(tokens, torch.stack(alone))
    limit = 4 * noise(model, LLAVA, ROWS) + 1e-5
    for b, row in enumerate(ROWS):
        slow = SlowDecoder(model, slow_options(plan.prefill), COMPACTION["usual"])
        expected = [slow.read(LLAVA.batch([row]))[-1]]
        expected += [slow.step(token) for token in tokens[b, :-1].tolist()]
        assert (logits[b] - torch.stack(expected)).abs().max() <= limit


def test_generated_tokens_are_evicted_too(llava: Any) -> None:
    """A prompt of three tokens, and a cache that may hold ten: most that it loses was generated."""
    cache = CompactCache(llava.config)
    options = {"keep": 0.01, "interval": 4, "sinks": 2, "recent": 6, "rows": 4}
    with lightvlm.attach(llava, lightvlm.Plan(cache=DecodeCompaction(**options))):
        generate(llava, LLAVA.batch([[1, 2, 3]]), 30, past_key_values=cache)
    # 29 tokens went through the model after the prompt, the last compaction came after 28 of them
    assert [layer.ends for layer in cache.layers] == [[8 + 1]] * DEPTH
    assert [layer.seen for layer in cache.layers] == [3 + 29] * DEPTH


def test_a_budget_that_is_never_reached(model: Any, family: Family) -> None:
    inputs = family.batch(ROWS)
    expected = generate_logits(model, inputs, 10)[1]
    with lightvlm.attach(model, lightvlm.LightVLM(keep=1, decode_interval=2, decode_recent=500)) as run:
        require_same(generate_logits(model, inputs, 10)[1], expected)
    assert run.report().compactions == 0


@pytest.mark.parametrize("name", ["usual", "every-token"])
def test_batches_decode_as_their_rows_do(model: Any, family: Family, name: str) -> None:
    with lightvlm.attach(model, plan_of(name)):
        together = generate(model, family.batch(ROWS), 20)
        alone = [generate(model, family.batch([row]), 20)[0] for row in ROWS]
    assert torch.equal(together, torch.stack(alone))


# -- several turns


@pytest.mark.parametrize("name", ["usual", "every-token"])
def test_a_second_question(model: Any, family: Family, name: str) -> None:
    """Text on the cache of the first turn, through forward(); a padded batch."""
    plan = forgetful(plan_of(name))
    question = torch.tensor([[21, 22, 23], [24, 25, 26], [27, 28, 29], [30, 31, 32]])
    inputs = prompt(family, ROWS)
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        out = model(**inputs)
        cache, mask = out.past_key_values, inputs["attention_mask"]
        found = [out.logits[:, -1:]]
        for tokens in (torch.tensor([[3], [4], [5], [6]]), question, question[:, :1]):
            out, mask = extend(family, model, mask, tokens, past_key_values=cache)
            assert out.past_key_values is cache
            found.append(out.logits)
    limit = 4 * noise(model, family, ROWS) + 1e-5
    for b, row in enumerate(ROWS):
        slow = SlowDecoder(model, slow_options(plan.prefill), COMPACTION[name])
        expected = [slow.read(family.batch([row]))[-1:], slow.step(3 + b)[None]]
        expected += [
            slow.extend({"input_ids": tokens}) for tokens in (question[b : b + 1], question[b : b + 1, :1])
        ]
        assert (torch.cat(found, dim=1)[b] - torch.cat(expected)).abs().max() <= limit
    report = run.report()
    assert report.prefills == len(ROWS)
    assert report.stepped_aside == {FORGOTTEN: 1}
    assert (report.reread, report.later_bytes) == (0, 0)


def test_generate_goes_on_with_the_cache(model: Any, family: Family) -> None:
    plan, row, more = forgetful(plan_of("usual")), ROWS[2], torch.tensor([[40, 41, 42, 43]])
    with lightvlm.attach(model, plan):
        out = model.generate(
            **family.batch([row]), max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
        ids = torch.cat([out.sequences, more], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tokens, logits = generate_logits(model, inputs, 12, past_key_values=out.past_key_values)
    slow = SlowDecoder(model, slow_options(plan.prefill), COMPACTION["usual"])
    slow.read(family.batch([row]))
    for token in out.sequences[0, -5:-1].tolist():
        slow.step(token)
    expected = [slow.extend({"input_ids": ids[:, -5:]})[-1]]
    expected += [slow.step(token) for token in tokens[0, :-1].tolist()]
    assert (logits[0] - torch.stack(expected)).abs().max() <= 4 * noise(model, family, [row]) + 1e-5


def test_a_new_image_on_a_filled_cache_is_not_reduced(llava: Any) -> None:
    plan, row, turn = forgetful(lightvlm_plan()), ROWS[0], [[7, Image(9), 8, 9]]
    with torch.no_grad(), lightvlm.attach(llava, plan) as run:
        first = llava(**LLAVA.batch([row]))
        new = LLAVA.batch(turn)
        more, _ = extend(
            LLAVA,
            llava,
            LLAVA.batch([row])["attention_mask"],
            new["input_ids"],
            pixel_values=new["pixel_values"],
            past_key_values=first.past_key_values,
        )
    slow = SlowDecoder(llava, slow_options(plan.prefill))
    slow.read(LLAVA.batch([row]))
    expected = slow.extend(new)
    assert (more.logits[0] - expected).abs().max() <= 4 * noise(llava, LLAVA, [row]) + 1e-5
    image = "an image arrived on a cache that already holds tokens; nothing was read anew"
    assert run.report().stepped_aside == {FORGOTTEN: 1, image: 1}


def test_padding_among_new_tokens_is_refused(model: Any, family: Family) -> None:
    """A shortened cache knows where each row's keys stand, and cannot skip some in the middle."""
    inputs = prompt(family, ROWS)
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan()):
        cache = model(**inputs).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.tensor([[0, 1]] + [[1, 1]] * 3)], dim=1)
        tokens = torch.tensor([[0, 5]] + [[6, 7]] * 3)
        positions = family.positions(model, mask, 2)
        with pytest.raises(ValueError, match="attention_mask has padding among the new tokens"):
            model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        square = torch.ones(4, 1, 2, mask.shape[1], dtype=torch.bool)
        with pytest.raises(ValueError, match="attention_mask must be a 2-D padding mask"):
            model(input_ids=tokens, attention_mask=square, position_ids=positions, past_key_values=cache)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        out, _ = extend(family, model, inputs["attention_mask"], tokens, past_key_values=cache)
        assert out.logits.shape[:2] == (4, 2)


def test_a_dynamic_cache_that_the_caller_holds_is_filled(model: Any, family: Family) -> None:
    from transformers import DynamicCache

    inputs = prompt(family, ROWS)
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan()):
        expected = model(**inputs)
        held = DynamicCache(config=model.config)
        out = model(**inputs, past_key_values=held)
        assert out.past_key_values is held
        assert isinstance(held, CompactCache)
        assert torch.equal(out.logits, expected.logits)
        token = torch.tensor([[3]] * 4)
        found, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=held)
        again, _ = extend(
            family, model, inputs["attention_mask"], token, past_key_values=expected.past_key_values
        )
        assert torch.equal(found.logits, again.logits)


def test_a_filled_dynamic_cache_stays_what_it_is(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    token = torch.tensor([[3]] * 4)
    with torch.no_grad():
        first, second = (model(**inputs).past_key_values for _ in range(2))
        expected, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=first)
        with lightvlm.attach(model, plan_of("every-token")) as run:
            found, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=second)
    assert torch.equal(found.logits, expected.logits)
    assert type(second).__name__ == "DynamicCache"
    assert run.report().prefills == 0


def test_a_static_cache_steps_aside(model: Any, family: Family) -> None:
    from transformers import StaticCache

    inputs = family.batch(ROWS)
    expected = generate(model, inputs, 6, past_key_values=StaticCache(model.config, max_cache_len=64))
    with lightvlm.attach(model, plan_of("every-token")) as run:
        cache = StaticCache(model.config, max_cache_len=64)
        assert torch.equal(generate(model, inputs, 6, past_key_values=cache), expected)
        assert torch.equal(generate(model, inputs, 6, cache_implementation="static"), expected)
    reason = "a StaticCache was given; leave it out or pass a CompactCache"
    assert run.report().stepped_aside == {reason: 2}
    assert run.report().flops_share == 1.0


# -- more than one continuation


@pytest.mark.parametrize("name", ["usual", "every-token"])
def test_beams_of_a_batch_are_those_of_its_rows(model: Any, family: Family, name: str) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2}
    with lightvlm.attach(model, plan_of(name)):
        together = generate(model, family.batch(ROWS), 12, **options).reshape(len(ROWS), 2, 12)
        alone = [generate(model, family.batch([row]), 12, **options) for row in ROWS]
    assert torch.equal(together, torch.stack(alone))


def test_beams_with_a_cache_are_those_without(model: Any, family: Family) -> None:
    """Random dropping does not depend on the text: reading everything anew must give the same beams, as far as it does
    without a plan (with transformers 5.0 it does not)."""
    inputs = family.batch(ROWS[2:3])
    full = [generate(model, inputs, 6, num_beams=3, use_cache=use_cache) for use_cache in (False, True)]
    with lightvlm.attach(model, lightvlm.Random(keep=0.2, min_image_tokens=0)):
        expected = generate(model, inputs, 6, num_beams=3, use_cache=False)
        found = generate(model, inputs, 6, num_beams=3)
    assert torch.equal(found, expected) or not torch.equal(*full)
    assert not torch.equal(found, full[1])


def test_sampled_continuations(model: Any, family: Family) -> None:
    """num_return_sequences is the prompt given so many times, with the same random numbers, as far as it is without a
    plan (with transformers 5.0 it is not)."""

    def sample(copies: int, sequences: int) -> torch.Tensor:
        torch.manual_seed(5)
        options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": sequences}
        return generate(model, family.batch([ROWS[2]] * copies), 20, **options)

    full = [sample(3, 1), sample(1, 3)]
    with lightvlm.attach(model, plan_of("usual")):
        found = [sample(3, 1), sample(1, 3)]
        assert torch.equal(sample(1, 3), found[1])
    assert torch.equal(*found) or not torch.equal(*full)
    assert len({tuple(row) for row in found[1].tolist()}) == 3


@pytest.mark.parametrize("row", [0, 2])
def test_prompt_lookup_gives_the_greedy_tokens(model: Any, family: Family, row: int) -> None:
    """Assisted decoding verifies several tokens at once, and crops what was wrong."""
    prompt_with_repeats = [*ROWS[row], 11, 12, 13, 11, 12]
    inputs = family.batch([prompt_with_repeats])
    with lightvlm.attach(model, lightvlm_plan()) as run:
        expected = generate(model, inputs, 16)
        found = generate(model, inputs, 16, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)
    assert run.report().prefills == 2
    assert run.report().stepped_aside == {}


def test_prompt_lookup_while_compacting(model: Any, family: Family) -> None:
    inputs = family.batch([[*ROWS[2], 11, 12, 13, 11, 12]])
    plan = lightvlm.LightVLM(
        keep=0.3, min_image_tokens=0, decode_keep=0.3, decode_interval=3, decode_recent=6, decode_sinks=1
    )
    with lightvlm.attach(model, plan) as run:
        found = generate(model, inputs, 20, prompt_lookup_num_tokens=3)
    assert found.shape == (1, 20)
    assert run.report().compactions > 1


# -- other uses


@pytest.mark.parametrize("copies", ["deepcopy", "repeat"])
def test_a_prefix_is_shared(model: Any, family: Family, copies: str) -> None:
    """One read of an image, several questions about it."""
    import copy

    inputs = prompt(family, [ROWS[0]])
    with torch.no_grad(), lightvlm.attach(model, plan_of("every-token")):
        cache = model(**inputs).past_key_values
        expected = []
        for token in (11, 12, 13):
            one = copy.deepcopy(cache)
            out, mask = extend(
                family, model, inputs["attention_mask"], torch.tensor([[token]]), past_key_values=one
            )
            out, _ = extend(family, model, mask, torch.tensor([[14]]), past_key_values=one)
            expected.append(out.logits[0])
        if copies == "repeat":
            cache.batch_repeat_interleave(3)
            mask = inputs["attention_mask"].repeat(3, 1)
            out, mask = extend(family, model, mask, torch.tensor([[11], [12], [13]]), past_key_values=cache)
            out, _ = extend(family, model, mask, torch.tensor([[14]] * 3), past_key_values=cache)
            assert torch.allclose(out.logits, torch.stack(expected), atol=1e-4)
        else:
            assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_rows_are_taken_out_of_a_padded_cache(model: Any, family: Family) -> None:
    """Rows of different length: the ones that stay go on as they would have in the whole batch."""
    inputs = prompt(family, ROWS)
    tokens = torch.tensor([[3], [4], [5], [6]])
    with torch.no_grad(), lightvlm.attach(model, plan_of("every-token")):
        whole, part = (model(**inputs).past_key_values for _ in range(2))
        _out, mask = extend(family, model, inputs["attention_mask"], tokens, past_key_values=whole)
        extend(family, model, inputs["attention_mask"], tokens, past_key_values=part)
        expected, _ = extend(family, model, mask, tokens, past_key_values=whole)
        order = torch.tensor([2, 0])
        part.batch_select_indices(order)
        if family is QWEN:
            model.model.rope_deltas = model.model.rope_deltas[order]
        found, _ = extend(family, model, mask[order], tokens[order], past_key_values=part)
    assert part.leftpad == [whole.leftpad[2], whole.leftpad[0]]
    assert [layer.ends for layer in part.layers] == [[layer.ends[2], layer.ends[0]] for layer in whole.layers]
    assert torch.allclose(found.logits, expected.logits[order], atol=1e-4)
