"""Every registered method on every family, once the prompt is read: long answers, beams, drafts, later questions."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightvlm
import pytest
import torch
from python.matrix import NAMES, READS, limit_of, only_shortens, plan_of, reduces, rows_of
from python.talk import QUESTION, Conversation
from python.test_host_reads import counted_reads
from python.tiny import Family, generate, generate_logits

each = pytest.mark.parametrize("name", NAMES)


@each
def test_an_answer_of_many_tokens(small: Any, family: Family, name: str) -> None:
    """Past several compactions; and the run's second prompt is read as its first."""
    inputs, new = family.batch(rows_of(family)), 42
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with lightvlm.attach(small, plan_of(name)) as run:
        out = small.generate(**inputs, **options, max_new_tokens=new)
        again = generate_logits(small, inputs, 8)[1]
    length = inputs["input_ids"].shape[1] + new
    assert out.sequences.shape == (4, length)
    assert out.past_key_values.get_seq_length() == length - 1
    logits = torch.stack(out.logits, dim=1)
    assert logits.isfinite().all()
    assert torch.equal(again, logits[:, :8])
    assert run.report().prefills == 8
    assert run.report().stepped_aside == {}


@each
def test_beams_of_a_batch_are_those_of_its_rows(small: Any, family: Family, name: str) -> None:
    rows = rows_of(family)[1:3]
    options = {"num_beams": 2, "num_return_sequences": 2}
    with lightvlm.attach(small, plan_of(name)):
        together = generate(small, family.batch(rows), 8, **options).reshape(2, 2, 8)
        alone = [generate(small, family.batch([row]), 8, **options) for row in rows]
    assert torch.equal(together, torch.stack(alone))


@each
def test_drafts_that_are_verified_several_at_once(small: Any, family: Family, name: str) -> None:
    """Assisted decoding crops what was wrong. Where plans only shorten the prompt it gives the greedy tokens; by drafts
    a cache is compacted at other tokens, and tokens whose logits are asked for always attend and are packed later."""
    inputs, plan = family.batch([[*rows_of(family)[2], 11, 12, 13, 11, 12]]), plan_of(name)
    with lightvlm.attach(small, plan) as run:
        found = generate(small, inputs, 16, prompt_lookup_num_tokens=3)
        expected = generate(small, inputs, 16) if only_shortens(plan) else None
        again = generate(small, inputs, 16, prompt_lookup_num_tokens=3) if expected is None else expected
    assert found.shape == (1, 16)
    assert torch.equal(found, again)
    assert run.report().reread == 0
    assert run.report().stepped_aside == {}
    if reduces(plan) and expected is None:  # without the rest of its plan
        with lightvlm.attach(small, lightvlm.Plan(prefill=plan.prefill)):
            expected = generate(small, inputs, 16)
            assert torch.equal(generate(small, inputs, 16, prompt_lookup_num_tokens=3), expected)


@each
@pytest.mark.parametrize("keep", ["offload", "quantize", "drop"])
def test_a_later_question(small: Any, family: Family, name: str, keep: Any) -> None:
    """Three tokens more after an answer, then one more answer: as on a fresh cache, if what was dropped is kept."""
    plan = dataclasses.replace(plan_of(name), keep_for_later=keep)
    with torch.no_grad(), lightvlm.attach(small, plan) as run:
        talk = Conversation(small, family, rows_of(family))
        talk.read()
        talk.answer(torch.arange(3, 11).expand(4, -1))
        logits = talk.say(QUESTION).logits
        assert logits.isfinite().all()
        report = run.report()
        afresh = talk.afresh()
        expected = afresh.read()[:, -3:]
        assert talk.answer(QUESTION[:, :2]).isfinite().all()
        assert talk.cache.get_seq_length() == talk.mask.shape[1]
    assert report.reread <= (keep != "drop")
    if reduces(plan) and keep != "drop":
        assert report.reread == 1
    if report.reread and keep == "offload":
        assert (logits - expected).abs().max() <= limit_of(small, family)


@each
def test_no_host_read_between_layers(
    small: Any, family: Family, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lightvlm.attach(small, plan_of(name)), counted_reads(small, monkeypatch) as found:
        generate(small, family.batch(rows_of(family)), 10)
    assert found == ["tolist"] * READS.get(name, 0)


@each
def test_without_a_cache_the_first_token_is_the_same(small: Any, family: Family, name: str) -> None:
    inputs = family.batch(rows_of(family))
    with lightvlm.attach(small, plan_of(name)):
        expected = generate_logits(small, inputs, 1)[1]
        found = generate_logits(small, inputs, 3, use_cache=False)[1]
    assert (found[:, :1] - expected).abs().max() <= limit_of(small, family)
    assert found.isfinite().all()
