"""A packed CompactCache on a model that is not attached, in every kind of generation."""

from __future__ import annotations

import copy
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.kv_precision import KVPrecision
from python.test_precision import LONG, ZIPVL, plan_of
from python.test_prefill import noise, prompt
from python.tiny import DEPTH, LLAVA, Image, extend, generate, generate_logits
from torch import Tensor

PLAN = plan_of(bits=8)
ONE = [[1, 2, *(Image(seed) for seed in range(6)), 3, 4, 11, 12, 13, 11, 12]]
EQUAL = [*ONE, [7, 8, *(Image(seed) for seed in range(9, 15)), 9, 4, 21, 22, 23, 21, 22]]


@pytest.fixture(scope="module")
def model() -> Any:
    """Heads of 32 channels, which a packed cache needs."""
    return LLAVA.build(head_dim=32)


def packed(model: Any, plan: lightvlm.Plan = PLAN, capacity: int | None = None) -> CompactCache:
    return CompactCache(model.config, plan, capacity=capacity)


def attached(model: Any, run: Any, plan: lightvlm.Plan = PLAN) -> Any:
    with lightvlm.attach(model, plan):
        return run()


def check_logits(model: Any, found: Tensor, expected: Tensor, first: int = 60, share: int = 10) -> None:
    """Logits (B, T, V) of the same tokens.

    Those before anything generated is packed, ``first`` of them, differ by noise; later ones by less than a ``share``
    of what packing does to logits, as a code that noise rounds the other way is one step off.
    """
    inputs = LLAVA.batch(EQUAL)
    limit = 4 * noise(model, LLAVA, EQUAL) + 1e-5
    token, full = generate_logits(model, inputs, 2)
    token_packed, kept = attached(model, lambda: generate_logits(model, inputs, 2))
    assert torch.equal(token[:, :1], token_packed[:, :1])
    packing = (full - kept).abs().max()
    assert limit < packing / 50
    if first:
        assert (found - expected)[:, :first].abs().max() <= limit
    assert (found - expected).abs().max() <= packing / share


@pytest.mark.parametrize("capacity", [None, 300])
@pytest.mark.parametrize("rows", [ONE, EQUAL], ids=["one", "two"])
def test_logits_are_those_of_an_attached_model(model: Any, rows: Any, capacity: int | None) -> None:
    """Rows without padding are stored alike; past two packings of generated tokens."""
    inputs = LLAVA.batch(rows)
    tokens, expected = attached(model, lambda: generate_logits(model, inputs, 140))
    cache = packed(model, capacity=capacity)
    found = generate_logits(model, inputs, 140, past_key_values=cache)
    assert torch.equal(found[0], tokens)
    check_logits(model, found[1], expected)
    for layer in cache.layers:
        assert layer.packed is not None
        assert layer.packed.counts == [inputs["input_ids"].shape[1] - 6 + 128] * len(rows)
    assert cache.complete
    assert cache.kv_bytes_used < cache.kv_bytes_full / 2
    assert cache.kv_bytes_used < cache.kv_bytes_allocated
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 139


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "samples": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "beams": {"num_beams": 3},
    "sampled-beams": {"num_beams": 2, "do_sample": True, "top_k": 5},
    "return-two": {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.1},
    "samples-of-one": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_generation(model: Any, name: str) -> None:
    """76 tokens: one packing of generated ones, in whatever order the rows are by then."""
    inputs, found = LLAVA.batch(EQUAL), []

    def run(**cache: Any) -> Tensor:
        torch.manual_seed(7)
        return generate(model, inputs, 76, **KINDS[name], **cache)

    expected = attached(model, run)
    for capacity in (None, 300):
        cache = packed(model, capacity=capacity)
        found.append(run(past_key_values=cache))
        assert cache.layers[0].packed is not None
        assert cache.layers[0].packed.generated[8].used == 64
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": 2}], ids=["lookup", "draft"]
)
def test_assisted_decoding(model: Any, options: dict[str, Any]) -> None:
    """Drafts that were wrong are cropped, from the buffer; what is packed stays."""
    inputs = LLAVA.batch(ONE)
    if "assistant_model" in options:
        options = {"assistant_model": LLAVA.build(num_hidden_layers=2, head_dim=32)}
    expected = generate(model, inputs, 40, past_key_values=packed(model))
    cache = packed(model)
    assert torch.equal(generate(model, inputs, 40, past_key_values=cache, **options), expected)
    assert torch.equal(attached(model, lambda: generate(model, inputs, 40, **options)), expected)
    long = packed(model)  # past a packing, which drafts may bring forward
    assert generate(model, inputs, 90, past_key_values=long, **options).shape == (1, 90)
    assert long.layers[0].packed is not None
    assert long.layers[0].packed.generated[8].used == 64


def test_streaming(model: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    inputs, one, other = LLAVA.batch(ONE), Streamer(), Streamer()
    tokens = generate(model, inputs, 76, past_key_values=packed(model), streamer=one)
    attached(model, lambda: generate(model, inputs, 76, streamer=other))
    assert one.ended
    assert one.tokens[-76:] == other.tokens[-76:] == tokens[0].tolist()


def test_a_prompt_in_chunks(model: Any) -> None:
    """The first chunk is packed as a prompt, the others as generated tokens are: by 64."""
    inputs = LLAVA.batch(EQUAL)
    full = generate_logits(model, inputs, 8)[1]
    whole = generate_logits(model, inputs, 8, past_key_values=packed(model))[1]
    cache = packed(model)
    found = generate_logits(model, inputs, 8, past_key_values=cache, prefill_chunk_size=30)[1]
    assert (found - full).abs().max() <= 4 * (whole - full).abs().max()
    store = cache.layers[0].packed
    assert store is not None
    assert (store.prompt[0].counts, store.generated[8].used) == ([30 - 8] * 2, 64)
    assert cache.complete


def test_a_second_turn(model: Any) -> None:
    inputs, more = LLAVA.batch(EQUAL), torch.tensor([[40, 41, 42], [43, 44, 45]])

    def turns(**cache: Any) -> tuple[Tensor, Tensor]:
        first = model.generate(
            **inputs, max_new_tokens=70, do_sample=False, return_dict_in_generate=True, **cache
        )
        ids = torch.cat([first.sequences, more], dim=1)
        follow = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate_logits(model, follow, 70, past_key_values=first.past_key_values)

    tokens, expected = attached(model, turns)
    cache = packed(model)
    found = turns(past_key_values=cache)
    assert torch.equal(found[0], tokens)
    check_logits(model, found[1], expected, first=0)
    assert cache.layers[0].packed is not None
    assert cache.layers[0].packed.generated[8].used == 128
    cache.reset()
    again = turns(past_key_values=cache)
    assert torch.equal(again[1], found[1])


def test_contrastive_search_is_no_longer_part_of_transformers(model: Any) -> None:
    with pytest.raises(ValueError, match="Contrastive Search requires"):
        generate(model, LLAVA.batch(ONE), 4, past_key_values=packed(model), penalty_alpha=0.6, top_k=4)


def test_padding_is_stored_and_masked(model: Any) -> None:
    """Alone, a cache does not know of padding: the model masks it, wherever it is stored."""
    inputs = LLAVA.batch(LONG)
    full = generate_logits(model, inputs, 8)[1]
    found = generate_logits(model, inputs, 8, past_key_values=packed(model))[1]
    other = attached(model, lambda: generate_logits(model, inputs, 8))[1]
    assert (found - full).abs().max() <= 4 * (other - full).abs().max()


def test_a_short_prompt_is_packed_later(model: Any) -> None:
    inputs = LLAVA.batch([[1, 2, 3], [4, 5, 6]])
    expected = attached(model, lambda: generate_logits(model, inputs, 150))[1]
    cache = packed(model)
    found = generate_logits(model, inputs, 150, past_key_values=cache)[1]
    # the attached model reads its buffer with another kernel all the while, so more codes are rounded the other way
    check_logits(model, found, expected, first=0, share=5)
    store = cache.layers[0].packed
    assert store is not None
    assert (store.prompt[0].counts, store.generated[8].used) == ([64, 64], 64)


def test_first_and_last_layers_in_16_bits(model: Any) -> None:
    plan, inputs = plan_of(bits=8, edge_bits=16), LLAVA.batch(EQUAL)
    expected = attached(model, lambda: generate_logits(model, inputs, 80), plan)[1]
    cache = packed(model, plan)
    found = generate_logits(model, inputs, 80, past_key_values=cache)[1]
    check_logits(model, found, expected)
    assert [layer.packed is None for layer in cache.layers] == [True, *[False] * (DEPTH - 2), True]


# -- filled under a run, and read without one


def test_a_complete_cache_goes_on_without_its_run(model: Any) -> None:
    """A padded batch; 80 more tokens, which are packed in their turn; and back to an attached model."""
    inputs = prompt(LLAVA, LONG)
    with torch.no_grad():
        with lightvlm.attach(model, PLAN):
            cache = model(**inputs).past_key_values
            other = copy.deepcopy(cache)
            expected, mask = [], inputs["attention_mask"]
            for at in range(80):
                out, mask = extend(
                    LLAVA, model, mask, torch.tensor([[3 + at % 40], [5]]), past_key_values=other
                )
                expected.append(out.logits)
        found, mask = [], inputs["attention_mask"]
        for at in range(75):
            out, mask = extend(LLAVA, model, mask, torch.tensor([[3 + at % 40], [5]]), past_key_values=cache)
            found.append(out.logits)
        with lightvlm.attach(model, lightvlm.Plan()):
            for at in range(75, 80):
                out, mask = extend(
                    LLAVA, model, mask, torch.tensor([[3 + at % 40], [5]]), past_key_values=cache
                )
                found.append(out.logits)
    check_logits(model, torch.cat(found, dim=1), torch.cat(expected, dim=1))
    assert cache.layers[0].packed is not None
    assert cache.layers[0].packed.generated[8].used == 64


BUDGET = lightvlm.Plan(
    cache=DecodeCompaction(keep=0.3, interval=2, sinks=2, recent=6),
    precision=KVPrecision(8, sinks=2, recent=6),
)


@pytest.mark.parametrize("plan", [plan_of(ZIPVL, low_bits=2), BUDGET], ids=["low-bits", "evicted"])
def test_others_are_refused_without_it(model: Any, plan: lightvlm.Plan) -> None:
    inputs = prompt(LLAVA, LONG)
    token = torch.tensor([[3], [5]])
    with torch.no_grad():
        with lightvlm.attach(model, plan):
            cache, mask = model(**inputs).past_key_values, inputs["attention_mask"]
            for _ in range(2):
                _, mask = extend(LLAVA, model, mask, token, past_key_values=cache)
        before = [(layer.seen, layer.ends) for layer in cache.layers]
        with pytest.raises(ValueError, match="shortened by a plan and only an attached model can read it"):
            extend(LLAVA, model, mask, token, past_key_values=cache)
        assert [(layer.seen, layer.ends) for layer in cache.layers] == before


def test_a_cache_is_read_by_another_model_while_its_run_is_attached(model: Any) -> None:
    """Not by the run's rules: this model is none of its business."""
    twin, inputs = LLAVA.build(head_dim=32), prompt(LLAVA, LONG)
    token = torch.tensor([[3], [5]])
    with torch.no_grad(), lightvlm.attach(model, PLAN):
        cache = model(**inputs).past_key_values
        expected, _ = extend(
            LLAVA, model, inputs["attention_mask"], token, past_key_values=copy.deepcopy(cache)
        )
        found, _ = extend(LLAVA, twin, inputs["attention_mask"], token, past_key_values=cache)
    assert (found.logits - expected.logits).abs().max() <= 4 * noise(model, LLAVA, LONG) + 1e-5
    with torch.no_grad(), lightvlm.attach(model, BUDGET):
        cache, mask = model(**inputs).past_key_values, inputs["attention_mask"]
        for _ in range(2):
            _, mask = extend(LLAVA, model, mask, token, past_key_values=cache)
        with pytest.raises(ValueError, match="shortened by a plan and only an attached model can read it"):
            extend(LLAVA, twin, mask, token, past_key_values=cache)
