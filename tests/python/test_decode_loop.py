"""lightvlm.generate: model.generate's tokens, with all that belongs to greedy search and sampling."""

from __future__ import annotations

import functools
import string
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache, decode_loop
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.kv_precision import KVPrecision
from python.recorded import record
from python.test_precision import LONG, UNIFORM, ZIPVL
from python.test_prefill import ROWS, lightvlm_plan
from python.tiny import DEPTH, LLAVA, QWEN, VOCABULARY, Family, Image, take_decoding
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, StaticCache, StoppingCriteria

STEPS = 40
EVICTION: dict[str, Any] = {"keep": 0.3, "sinks": 2, "recent": 8}
PREFILL = lightvlm_plan().prefill
PLANS = {
    "none": lightvlm.Plan(),
    "lightvlm": lightvlm_plan(),
    "every-token": lightvlm.Plan(PREFILL, DecodeCompaction(**{**EVICTION, "interval": 1})),
    "every-eight": lightvlm.Plan(None, DecodeCompaction(**EVICTION, interval=8)),
    "queries": lightvlm.Plan(PREFILL, DecodeCompaction(**EVICTION, interval=8, score="queries", rows=6)),
    "one-query": lightvlm.Plan(None, DecodeCompaction(**EVICTION, interval=3, score="queries", rows=1)),
    "zipvl": lightvlm.Plan(ZIPVL),
}
PACKED = {
    "packed": lightvlm.Plan(precision=KVPrecision(**UNIFORM)),
    "zipvl": lightvlm.Plan(ZIPVL, precision=KVPrecision(**{**UNIFORM, "low_bits": 2, "interval": 128})),
    "some-layers": lightvlm.Plan(precision=KVPrecision(**UNIFORM, edge_bits=16)),
    "packed-budget": lightvlm.Plan(PREFILL, DecodeCompaction(**EVICTION, interval=8), KVPrecision(**UNIFORM)),
    "demoted": lightvlm.Plan(
        None, DecodeCompaction(**EVICTION, interval=8, others="demote"), KVPrecision(**UNIFORM)
    ),
}


@pytest.fixture(params=[False, True], ids=["as-it-is", "captured"])
def captures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether steps are captured, and replayed without their Python."""
    if request.param:
        monkeypatch.setattr(decode_loop, "capture_on", lambda device: record)
    return request.param


def both(model: Any, inputs: dict[str, Any], tokens: int = STEPS, **options: Any) -> tuple[Any, Any]:
    """What model.generate and lightvlm.generate return."""
    found = []
    for call in (model.generate, functools.partial(lightvlm.generate, model)):
        torch.manual_seed(7)
        found.append(call(**{"max_new_tokens": tokens, "do_sample": False, **inputs, **options}))
    return found[0], found[1]


def same_calls(run: lightvlm.Run, model: Any, inputs: dict[str, Any], tokens: int) -> None:
    """The same tokens, op calls, compactions and bytes from both."""
    wanted, reports = [], []
    for call in (model.generate, functools.partial(lightvlm.generate, model)):
        wanted.append(call(**inputs, max_new_tokens=tokens, do_sample=False))
        reports.append(run.report())
    assert torch.equal(*wanted)
    first, second = reports
    assert second.stepped_aside == {}
    # transformers' own attention reads whole layers where the model is called
    assert take_decoding(second.op_calls) == take_decoding(first.op_calls) + DEPTH * (tokens - 1)
    assert second.op_calls == {name: 2 * calls for name, calls in first.op_calls.items()}
    assert second.compactions == 2 * first.compactions
    assert second.kv_bytes_used == first.kv_bytes_used


@pytest.mark.parametrize("name", PLANS)
def test_the_same_tokens(model: Any, family: Family, name: str, captures: bool) -> None:
    """Padded batches of heads that decode_attention does not take."""
    with lightvlm.attach(model, PLANS[name]) as run:
        expected, found = both(model, family.batch(ROWS))
    assert torch.equal(found, expected)
    report = run.report()
    assert report.stepped_aside == {}
    assert report.graph == ({"captures": 1, "replays": STEPS - 2} if captures else {})


@pytest.mark.parametrize("name", [*PACKED, "every-eight", "queries"])
@pytest.mark.parametrize("rows", [[*ROWS, *LONG], LONG[:1]], ids=["batch", "row"])
def test_the_same_tokens_and_calls(name: str, rows: Any, captures: bool) -> None:
    """Heads that it takes: past two packings, and many compactions of packed segments."""
    model = LLAVA.build(head_dim=32)
    with lightvlm.attach(model, {**PLANS, **PACKED}[name]) as run:
        same_calls(run, model, LLAVA.batch(rows), 150)
    report = run.report()
    if captures:
        assert report.graph["captures"] + report.graph["replays"] > 140


def test_a_model_that_is_not_attached(model: Any, family: Family) -> None:
    inputs, plan = family.batch(ROWS), PLANS["every-eight"]
    expected = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    assert torch.equal(lightvlm.generate(model, **inputs, max_new_tokens=9, do_sample=False), expected)
    with lightvlm.attach(model, plan):
        expected = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    found = lightvlm.generate(model, plan=plan, **inputs, max_new_tokens=30, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": 5, "temperature": 0.7, "num_return_sequences": 3},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "eos_token_id": 7},
        {"eos_token_id": list(range(10, 30)), "pad_token_id": 3},
        {"max_new_tokens": 1},
        {"max_new_tokens": None, "max_length": 50},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_generate(llava: Any, options: dict[str, Any], captures: bool) -> None:
    with lightvlm.attach(llava, PLANS["every-eight"]) as run:
        expected, found = both(llava, LLAVA.batch(ROWS), 25, **options)
    assert torch.equal(found, expected)
    assert run.report().stepped_aside == {}


def test_scores_logits_and_cache(model: Any, family: Family, captures: bool) -> None:
    options = {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "temperature": 0.5,
        "do_sample": True,
    }  # fmt: skip
    with lightvlm.attach(model, PLANS["every-eight"]):
        expected, found = both(model, family.batch(ROWS), 20, **options)
        more = torch.full((len(ROWS), 1), 9)
        again = [
            model.generate(
                input_ids=torch.cat([out.sequences, more], dim=1),
                attention_mask=torch.cat(
                    [family.batch(ROWS)["attention_mask"], torch.ones(len(ROWS), 21, dtype=torch.long)], dim=1
                ),
                past_key_values=out.past_key_values,
                max_new_tokens=12,
                do_sample=False,
            )
            for out in (expected, found)
        ]
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        ours, theirs = torch.stack(found[name]), torch.stack(expected[name])
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert type(found) is type(expected)
    assert [layer.ends for layer in found.past_key_values.layers] == [
        layer.ends for layer in expected.past_key_values.layers
    ]
    assert torch.equal(*again)


class _Streamer:
    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ended = 0

    def put(self, tokens: Tensor) -> None:
        self.tokens.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_every_token(llava: Any, captures: bool) -> None:
    streamer, inputs = _Streamer(), LLAVA.batch(ROWS[:1])
    out = lightvlm.generate(llava, **inputs, max_new_tokens=8, do_sample=False, streamer=streamer)
    prompt = inputs["input_ids"].shape[1]
    assert streamer.tokens == [out[0, :prompt].tolist(), *([token] for token in out[0, prompt:].tolist())]
    assert streamer.ended == 1


class _Add(LogitsProcessor):
    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.arange(VOCABULARY) * 0.1 * (ids[:, -1:] % 3)


class _Sevens(StoppingCriteria):
    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return ids[:, -1] % 7 == 0


def test_processors_and_criteria_of_ones_own(llava: Any, captures: bool) -> None:
    with lightvlm.attach(llava, PLANS["lightvlm"]):
        expected, found = both(
            llava, LLAVA.batch(ROWS), logits_processor=[_Add()], stopping_criteria=[_Sevens()]
        )
    assert torch.equal(found, expected)
    assert found.shape[1] < LLAVA.batch(ROWS)["input_ids"].shape[1] + STEPS


def test_stop_strings(llava: Any) -> None:
    """A letter a token; the string is two tokens that greedy search gives one after the other."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = {letter: n for n, letter in enumerate(string.ascii_letters + string.digits + "-+")}
    backend = Tokenizer(BPE(letters, []))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    inputs = LLAVA.batch(ROWS[:1])
    prompt = inputs["input_ids"].shape[1]
    tokens = llava.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[0, prompt:].tolist()
    stop = "".join([*letters][token] for token in tokens[9:11])
    expected, found = both(llava, inputs, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(found, expected)
    assert found.shape[1] <= prompt + 11


def test_embeddings_for_a_prompt(llava: Any, captures: bool) -> None:
    inputs = LLAVA.batch([[1, 2, 3, 4, 5]])
    embeds = llava.get_input_embeddings()(inputs.pop("input_ids")).detach()
    expected, found = both(llava, {**inputs, "inputs_embeds": embeds})
    assert found.shape == (1, STEPS)
    assert torch.equal(found, expected)


def test_a_cache_of_ones_own(model: Any, family: Family, captures: bool) -> None:
    """An empty dynamic cache, or one of fixed capacity, holds the tokens afterwards; a second turn goes on with it."""
    plan, question = PLANS["every-eight"], torch.full((len(ROWS), 3), 11)
    found = []
    for call in (model.generate, functools.partial(lightvlm.generate, model)):
        for cache in (DynamicCache(), CompactCache(model.config, capacity=80)):
            with lightvlm.attach(model, plan):
                inputs = family.batch(ROWS)
                out = call(**inputs, max_new_tokens=9, do_sample=False, past_key_values=cache)
                assert isinstance(cache, CompactCache)
                assert cache.get_seq_length() == out.shape[1] - 1
                ids = torch.cat([out, question], dim=1)
                mask = torch.cat(
                    [inputs["attention_mask"], torch.ones(len(ROWS), 12, dtype=torch.long)], dim=1
                )
                found.append(
                    call(
                        input_ids=ids,
                        attention_mask=mask,
                        max_new_tokens=9,
                        do_sample=False,
                        past_key_values=cache,
                    )
                )
    assert all(torch.equal(one, found[0]) for one in found[1:])


def test_a_capacity_that_is_used_up(llava: Any) -> None:
    inputs = LLAVA.batch(ROWS[:1])
    cache = CompactCache(llava.config, capacity=inputs["input_ids"].shape[1] + 5)
    with (
        lightvlm.attach(llava, lightvlm.Plan()),
        pytest.raises(ValueError, match="capacity of the cache is 26 tokens; this step needs 27"),
    ):
        lightvlm.generate(llava, **inputs, max_new_tokens=9, do_sample=False, past_key_values=cache)
    assert [layer.ends for layer in cache.layers] == [[26]] * len(cache.layers)
    assert all(layer.live is None for layer in cache.layers)


def asides(model: Any) -> dict[str, tuple[dict[str, Any], str]]:
    """name -> arguments with which the model is called for every token, and why."""
    inputs = LLAVA.batch(ROWS)
    hole = inputs["attention_mask"].clone()
    hole[:, 12] = 0
    return {
        "static": (
            {"past_key_values": StaticCache(model.config.text_config, max_cache_len=90)},
            "a StaticCache holds the keys, not a CompactCache",
        ),
        "no-cache": ({"use_cache": False}, "a NoneType holds the keys"),
        "hole": ({"attention_mask": hole}, "another run filled it, or none"),
        "hidden": (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "attentions or hidden states are asked for",
        ),
    }


@pytest.mark.parametrize("name", ["static", "no-cache", "hole", "hidden"])
def test_where_the_model_is_called_for_every_token(llava: Any, name: str) -> None:
    options, reason = asides(llava)[name]
    found = []
    for call in (llava.generate, functools.partial(lightvlm.generate, llava)):
        with lightvlm.attach(llava, lightvlm.Plan()) as run:
            options = asides(llava)[name][0]  # a cache is filled but once
            found.append(call(**{**LLAVA.batch(ROWS), **options}, max_new_tokens=8, do_sample=False))
    reasons = [why for why in run.report().stepped_aside if "calls the model for every token" in why]
    assert len(reasons) == 1
    assert reason in reasons[0]
    if name == "hidden":
        found = [out.sequences for out in found]
    assert torch.equal(*found)


def test_padding_among_later_tokens(llava: Any) -> None:
    """A mask that a whole cache would follow and a live one cannot."""
    inputs = LLAVA.batch(ROWS)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ROWS), 7, dtype=torch.long)], dim=1)
    mask[0, -3] = 0
    found = []
    for call in (llava.generate, functools.partial(lightvlm.generate, llava)):
        cache = CompactCache(llava.config)
        with lightvlm.attach(llava, lightvlm.Plan()) as run:
            out = llava.generate(**inputs, max_new_tokens=5, do_sample=False, past_key_values=cache)
            ids = torch.cat([out, torch.full((len(ROWS), 2), 9)], dim=1)
            found.append(
                call(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=8,
                    do_sample=False,
                    past_key_values=cache,
                )
            )
    assert torch.equal(*found)
    assert any("the attention mask has holes" in reason for reason in run.report().stepped_aside)


def test_a_graph_that_is_asked_for_and_not_to_be_had(llava: Any) -> None:
    inputs = LLAVA.batch(ROWS[:1])
    with lightvlm.attach(llava, lightvlm.Plan()) as run:
        lightvlm.generate(llava, graph=True, **inputs, max_new_tokens=4, do_sample=False)
    assert run.report().stepped_aside == {"no CUDA graph on a device of type cpu": 1}


def test_no_graph_where_none_is_wanted(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "capture_on", lambda device: record)
    with lightvlm.attach(llava, lightvlm.Plan()) as run:
        lightvlm.generate(llava, graph=False, **LLAVA.batch(ROWS[:1]), max_new_tokens=4, do_sample=False)
    assert run.report().graph == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_beams": 2}, ValueError, "does greedy search and sampling, not beam_search"),
        (
            {"prompt_lookup_num_tokens": 3},
            ValueError,
            "does greedy search and sampling, not assisted_generation",
        ),
        ({"assistant_model": True}, ValueError, "takes no assistant_model; use model.generate"),
        ({"custom_generate": "a/b"}, ValueError, "takes no custom_generate"),
        ({"graph": "yes"}, TypeError, "graph must be \"auto\", True or False, got 'yes'"),
        ({"plan": {}}, TypeError, "plan must be None or a lightvlm.Plan, got dict"),
    ],
)
def test_refused(llava: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lightvlm.generate(llava, **LLAVA.batch(ROWS[:1]), max_new_tokens=4, **options)


def test_two_plans(llava: Any) -> None:
    with (
        lightvlm.attach(llava, lightvlm.Plan()),
        pytest.raises(ValueError, match="model is attached already; leave plan out"),
    ):
        lightvlm.generate(llava, plan=lightvlm.Plan(), **LLAVA.batch(ROWS[:1]))


def test_images_of_any_size(qwen: Any, captures: bool) -> None:
    """Positions with three axes that differ from the tokens' number."""
    rows = [[1, Image(0, 3, 5), 2, Image(1, 1, 4), 3], [4, 5], [6, Image(2, 6, 2), 7, 8, 9]]
    for plan in (PLANS["none"], PLANS["every-token"]):
        with lightvlm.attach(qwen, plan) as run:
            expected, found = both(qwen, QWEN.batch(rows))
        assert torch.equal(found, expected)
        assert run.report().stepped_aside == {}


def test_pages_are_decoded_by_the_model(llava: Any) -> None:
    """A paged cache takes pages as it grows, which a live step cannot: the model is called, and the report says so."""
    inputs = LLAVA.batch(ROWS)
    with lightvlm.attach(llava, PLANS["none"]) as run:
        caches = [
            lightvlm.PagedCompactCache(
                llava.config, pages=lightvlm.KVPages(llava.config, pages=200, page_size=16)
            )
            for _ in range(2)
        ]
        options = {"max_new_tokens": 8, "do_sample": False}
        wanted = llava.generate(**inputs, **options, past_key_values=caches[0])
        found = lightvlm.generate(llava, **inputs, **options, past_key_values=caches[1])
    assert torch.equal(found, wanted)
    (reason,) = run.report().stepped_aside
    assert "its keys are in pages" in reason
