"""A cache that is packed and has a budget, on an attached model: what stays, and what generation makes of it."""

from __future__ import annotations

from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.kv_precision import KVPrecision
from python.test_precision import LONG, content
from python.test_prefill import ROWS, noise, prompt
from python.tiny import DEPTH, LLAVA, extend, generate
from torch import Tensor

SINKS, RECENT, KEEP, BLOCK = 2, 6, 0.3, 64
ROW = [[*LONG[0], 11, 12, 13, 11, 12]]


@pytest.fixture(scope="module")
def model() -> Any:
    """Heads of 32 channels, which a packed cache needs."""
    return LLAVA.build(head_dim=32)


def plan_of(others: str = "drop", interval: int = 8, bits: int = 8, **options: Any) -> lightvlm.Plan:
    cache = DecodeCompaction(KEEP, interval=interval, sinks=SINKS, recent=RECENT, others=others, **options)  # type: ignore[arg-type]
    return lightvlm.Plan(cache=cache, precision=KVPrecision(bits, sinks=SINKS, recent=RECENT, interval=64))


def counts(layer: Any, b: int) -> dict[Any, int]:
    """Tokens of a row by the bits they are stored in; of the prompt, generated, and those in 16 bits."""
    store = layer.packed
    found: dict[Any, int] = {}
    for one in store.prompt:
        key = ("prompt", one.packed.bits)
        found[key] = found.get(key, 0) + one.counts[b]
    for bits, storage in store.generated.items():
        found["generated", bits] = storage.used
    found["whole"] = store.sink_counts[b] + layer.ends[b] - layer.starts[b]
    return found


@pytest.mark.parametrize("others", ["drop", "demote"])
@pytest.mark.parametrize("limit", [None, 40])
@pytest.mark.parametrize("rows", [ROW, LONG], ids=["one", "two"])
def test_the_budget(model: Any, others: str, limit: int | None, rows: Any) -> None:
    """After every compaction, over 210 tokens; what attention makes of it is what it makes of the stored content."""
    plan, inputs = plan_of(others, limit=limit), prompt(LLAVA, rows)
    assert isinstance(plan.cache, DecodeCompaction)
    tokens = torch.tensor([[3], [5]])[: len(rows)]
    demotes, lengths, compactions = (
        others == "demote",
        [int(row.sum()) for row in inputs["attention_mask"]],
        0,
    )
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        cache, mask = model(**inputs).past_key_values, inputs["attention_mask"]
        for step in range(1, 211):
            _, mask = extend(LLAVA, model, mask, (tokens + 7 * step) % 40 + 3, past_key_values=cache)
            if run.report().compactions == compactions:
                continue
            compactions += 1
            for layer in cache.layers:
                for b, length in enumerate(lengths):
                    found = counts(layer, b)
                    low = found.pop(("generated", 2), 0)
                    budget = plan.cache.budget(length + step)
                    # blocks, and what is demoted of a prompt, are whole
                    spare = 2 * (BLOCK - 1) if demotes else BLOCK - 1
                    if len(rows) == 1:
                        assert sum(found.values()) <= max(budget, found["whole"]) + spare
                    if demotes:
                        assert low % BLOCK == 0
                        assert sum(found.values()) + low == length + step
                    key, value = content(layer, b)
                    assert key.isfinite().all()
                    assert value.isfinite().all()
                    assert key.shape[1] == sum(found.values()) + low
    assert compactions >= 3
    last = [counts(layer, 0) for layer in cache.layers]
    assert all(("generated", 2) in one for one in last) is demotes
    if limit is not None and len(rows) == 1:
        bound = SINKS + RECENT + 64 + 2 * BLOCK
        assert all(sum(one.values()) - one.get(("generated", 2), 0) <= bound for one in last)
    assert cache.kv_bytes_used < cache.kv_bytes_full / 3


def test_rows_of_a_batch_that_drops_from_the_prompt(model: Any) -> None:
    """Until a generated token is packed, every row keeps what it keeps alone, but for one of three tokens, which alone
    would not be packed yet."""
    rows = [*ROWS, *LONG]
    short = 1
    with lightvlm.attach(model, plan_of()) as run:
        together = generate(model, LLAVA.batch(rows), 60)
        many = run.report().compactions
        alone = [generate(model, LLAVA.batch([row]), 60)[0] for row in rows]
    assert many == 4
    same = [torch.equal(one, other) for one, other in zip(together, alone, strict=True)]
    assert [b for b in range(len(rows)) if not same[b]] in ([], [short])


@pytest.mark.parametrize("others", ["drop", "demote"])
def test_rows_of_a_batch_with_blocks_keep_no_less_than_alone(model: Any, others: str) -> None:
    """The exception: all rows have the same number of blocks, as many as the one that needs most."""
    tokens = torch.randint(3, 50, (150, 2))

    def read(rows: list[int]) -> list[list[dict[Any, int]]]:
        inputs = prompt(LLAVA, [LONG[row] for row in rows])
        cache, mask = model(**inputs).past_key_values, inputs["attention_mask"]
        for step in tokens[:, rows]:
            _, mask = extend(LLAVA, model, mask, step[:, None], past_key_values=cache)
        return [[counts(layer, b) for layer in cache.layers] for b in range(len(rows))]

    with torch.no_grad(), lightvlm.attach(model, plan_of(others, interval=74)):
        together, alone = read([0, 1]), [read([0])[0], read([1])[0]]
    for index in range(DEPTH):
        for b in range(2):
            mine, own = together[b][index], alone[b][index]
            assert mine["whole"] == own["whole"]
            assert mine["generated", 8] >= own["generated", 8]
        assert together[0][index]["generated", 8] == together[1][index]["generated", 8]
        assert together[0][index].get(("generated", 2)) == together[1][index].get(("generated", 2))


OPTIONS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "return-two": {"num_beams": 3, "num_return_sequences": 2},
    "greedy": {},
}


@pytest.mark.parametrize("others", ["drop", "demote"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_of_equal_rows(model: Any, name: str, others: str) -> None:
    """Rows that are alike keep alike, past packings of generated tokens and compactions of blocks: each is as alone."""
    options = OPTIONS[name]
    with lightvlm.attach(model, plan_of(others)) as run:
        alone = generate(model, LLAVA.batch(ROW), 100, **options)
        many = run.report().compactions
        together = generate(model, LLAVA.batch(ROW * 2), 100, **options)
    assert many >= 4
    assert torch.equal(together, torch.cat([alone, alone]))


@pytest.mark.parametrize("others", ["drop", "demote"])
def test_beams_of_a_batch(model: Any, others: str) -> None:
    """Masses and packed tokens follow the beams; before the first generated token is packed."""
    rows = LONG if others == "drop" else ROW
    options = {"num_beams": 3, "num_return_sequences": 2}
    with lightvlm.attach(model, plan_of(others)) as run:
        together = generate(model, LLAVA.batch(rows), 40, **options)
        assert run.report().compactions >= (4 if others == "drop" else 1)
        alone = [generate(model, LLAVA.batch([row]), 40, **options) for row in rows]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("others", ["drop", "demote"])
def test_assisted_decoding(model: Any, others: str) -> None:
    with lightvlm.attach(model, plan_of(others)) as run:
        cache = CompactCache(model.config)
        tokens = generate(model, LLAVA.batch(ROW), 100, prompt_lookup_num_tokens=3, past_key_values=cache)
        assert run.report().compactions >= 3
    assert tokens.shape == (1, 100)
    # until something is evicted, they are the greedy ones
    with lightvlm.attach(model, plan_of(others, interval=50)):
        greedy = generate(model, LLAVA.batch(ROW), 40)
        assert torch.equal(generate(model, LLAVA.batch(ROW), 40, prompt_lookup_num_tokens=3), greedy)


@pytest.mark.parametrize("interval", [1, 8])
@pytest.mark.parametrize("stored", [True, False], ids=["packed", "whole"])
def test_more_drafts_than_recent_tokens(model: Any, stored: bool, interval: int) -> None:
    """Compaction and packing wait until it is known which drafts were right: a crop never meets what they moved."""
    cache = DecodeCompaction(KEEP, interval=interval, sinks=0, recent=1)
    precision = KVPrecision(8, sinks=0, recent=1, interval=64) if stored else None
    kept = CompactCache(model.config)
    with lightvlm.attach(model, lightvlm.Plan(cache=cache, precision=precision)) as run:
        tokens = generate(model, LLAVA.batch(ROW), 150, prompt_lookup_num_tokens=12, past_key_values=kept)
        assert run.report().compactions >= 2
    assert tokens.shape == (1, 150)
    assert kept.kv_bytes_used < 0.7 * kept.kv_bytes_full


@pytest.mark.parametrize("others", ["drop", "demote"])
def test_samples(model: Any, others: str) -> None:
    """num_return_sequences, twice in one run: the same seed, the same tokens."""

    def sample() -> Tensor:
        torch.manual_seed(5)
        return generate(model, LLAVA.batch(LONG), 80, do_sample=True, top_k=0, num_return_sequences=3)

    with lightvlm.attach(model, plan_of(others)) as run:
        first, many = sample(), run.report().compactions
        second = sample()
        assert run.report().compactions == 2 * many > 0
    assert torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) == 6


def test_streaming(model: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    streamer = Streamer()
    with lightvlm.attach(model, plan_of()):
        tokens = generate(model, LLAVA.batch(ROW), 90)
        generate(model, LLAVA.batch(ROW), 90, streamer=streamer)
    assert streamer.tokens[-91:] == [*tokens[0].tolist(), -1]


@pytest.mark.parametrize("others", ["drop", "demote"])
def test_crop_stops_at_what_is_packed(model: Any, others: str) -> None:
    inputs, token = prompt(LLAVA, LONG if others == "drop" else ROW * 2), torch.tensor([[3], [5]])
    with torch.no_grad(), lightvlm.attach(model, plan_of(others, interval=4)) as run:
        cache, mask = model(**inputs).past_key_values, inputs["attention_mask"]
        for _ in range(4):
            _, mask = extend(LLAVA, model, mask, token, past_key_values=cache)
        assert run.report().compactions == 1
        before = [(layer.seen, layer.ends, layer.packed.counts) for layer in cache.layers]
        with pytest.raises(
            ValueError, match="cannot crop 11 tokens: only the last 10 are all still in the cache"
        ):
            cache.crop(-11)
        assert [(layer.seen, layer.ends, layer.packed.counts) for layer in cache.layers] == before
        expected, after = extend(LLAVA, model, mask, token, past_key_values=cache)
        cache.crop(-1)
        found, _ = extend(LLAVA, model, mask, token, past_key_values=cache)
        assert torch.equal(found.logits, expected.logits)
        assert after.shape == (2, mask.shape[1] + 1)


def test_a_second_turn(model: Any) -> None:
    """A question of 12 tokens on a cache that has been compacted, and more generation."""
    with lightvlm.attach(model, plan_of()) as run:
        out = model.generate(
            **LLAVA.batch(ROW), max_new_tokens=80, do_sample=False, return_dict_in_generate=True
        )
        ids = torch.cat([out.sequences, torch.arange(20, 32)[None]], dim=1)
        cache, first = out.past_key_values, run.report().compactions
        follow = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tokens = generate(model, follow, 80, past_key_values=cache)
        assert run.report().compactions > first >= 5
    assert tokens.shape == (1, 80)
    assert cache.get_seq_length() == ids.shape[1] + 79


def test_layers_that_wait_to_be_packed_lose_nothing_when_demoting(model: Any) -> None:
    """A prompt of three tokens is packed once 64 wait between its sinks and its last ones."""
    for others, kept in (("drop", False), ("demote", True)):
        cache = CompactCache(model.config)
        with lightvlm.attach(model, plan_of(others, interval=8)):
            generate(model, LLAVA.batch([[1, 2, 3]]), 60, past_key_values=cache)
        assert [layer.packed is None for layer in cache.layers] == [True] * DEPTH
        assert [layer.held == 62 for layer in cache.layers] == [kept] * DEPTH
        assert cache.complete is kept


def test_demoted_tokens_do_not_count(model: Any) -> None:
    """A compaction that finds no more than the budget in 8 bits demotes none of them."""
    inputs, token = prompt(LLAVA, ROW), torch.tensor([[3]])
    with torch.no_grad(), lightvlm.attach(model, plan_of("demote", interval=1)) as run:
        cache, mask = model(**inputs).past_key_values, inputs["attention_mask"]
        _, mask = extend(LLAVA, model, mask, token, past_key_values=cache)
        before = [counts(layer, 0) for layer in cache.layers]
        for _ in range(9):
            _, mask = extend(LLAVA, model, mask, token, past_key_values=cache)
        assert run.report().compactions == 1
    assert [one["generated", 2] for one in before] == [64] * DEPTH
    assert [counts(layer, 0)["prompt", 8] for layer in cache.layers] == [one["prompt", 8] for one in before]


def test_a_budget_that_is_never_reached(model: Any) -> None:
    """The cache stays complete, and the tokens are those of a packed cache without a budget."""
    plan = plan_of()
    wide = lightvlm.Plan(cache=DecodeCompaction(1.0, interval=4, sinks=2, recent=6), precision=plan.precision)
    only = lightvlm.Plan(precision=plan.precision)
    with lightvlm.attach(model, only):
        expected = generate(model, LLAVA.batch(LONG), 80)
    cache = CompactCache(model.config)
    with lightvlm.attach(model, wide) as run:
        assert torch.equal(generate(model, LLAVA.batch(LONG), 80, past_key_values=cache), expected)
    assert run.report().compactions == 0
    assert cache.complete


def test_mass_is_what_tokens_received(model: Any) -> None:
    """Against weights computed from the stored content, over padded rows, from every token but those in the sinks."""
    inputs, token = prompt(LLAVA, LONG), torch.tensor([[3], [5]])
    queries: list[Tensor] = []
    attention = model.model.language_model.layers[0].self_attn
    limit = noise(model, LLAVA, LONG) + 1e-5
    with torch.no_grad(), lightvlm.attach(model, plan_of(interval=1000)) as run:
        original = run.attend

        def attend(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            if module is attention:
                queries.append(query)
            return original(module, query, *args, **kwargs)

        run.attend = attend  # type: ignore[method-assign]
        cache, mask = model(**inputs).past_key_values, inputs["attention_mask"]
        queries.clear()
        for _ in range(3):
            _, mask = extend(LLAVA, model, mask, token, past_key_values=cache)
        _, mask = extend(LLAVA, model, mask, torch.tensor([[6, 7, 8], [9, 10, 11]]), past_key_values=cache)
    layer = cache.layers[0]
    every = torch.cat(queries, dim=2)
    new = every.shape[2]
    for b in range(2):
        key, _ = content(layer, b)
        logits = torch.stack([every[b, h].double() @ key[h // 2].T for h in range(4)]) * attention.scaling
        stored = key.shape[1]
        hidden = torch.arange(stored)[None] > torch.arange(stored - new, stored)[:, None]
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1).unflatten(0, (2, 2)).mean(1).sum(1)
        parts = [one.mass[b, :, : one.counts[b]] for one in layer.packed.prompt]
        found = torch.cat([*parts, layer.mass[b, :, layer.starts[b] : layer.ends[b]]], dim=1)
        assert (found.double() - weights[:, SINKS:]).abs().max() <= limit
