"""What caches and their plans refuse, before anything is touched."""

from __future__ import annotations

from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.kv_precision import KVPrecision
from lightvlm.methods.zipvl import ZipVLPrefill
from python.test_precision import LONG
from python.test_prefill import prompt
from python.tiny import DEPTH, LLAVA, extend, generate
from torch import Tensor

PRECISION = KVPrecision(8, sinks=2, recent=6, interval=64)
TOKEN = torch.tensor([[3], [5]])


@pytest.fixture(scope="module")
def model() -> Any:
    """Heads of 32 channels, which a packed cache needs."""
    return LLAVA.build(head_dim=32)


def compaction(**options: Any) -> DecodeCompaction:
    return DecodeCompaction(**{"keep": 0.3, "interval": 4, "sinks": 2, "recent": 6, **options})


def content(cache: CompactCache) -> list[Any]:
    """All that a cache holds, copied."""
    found: list[Any] = [list(cache.leftpad), cache.since_compaction]
    for layer in cache.layers:
        found += [layer.seen, layer.tail, list(layer.starts), list(layer.ends), layer.is_initialized]
        if layer.is_initialized:
            used = max(layer.ends)
            found += [layer.key_storage[:, :used].clone(), layer.value_storage[:, :used].clone()]
        if layer.packed is not None:
            found.append(layer.packed.counts_by_segment)
            found += [one.key_codes.clone() for one in layer.packed.segments() if hasattr(one, "key_codes")]
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


# -- options


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (KVPrecision, {"tau": 1.5}, ValueError, r"tau must be in \(0, 1\], got 1.5"),
        (KVPrecision, {"tau": -0.1}, ValueError, r"tau must be in \(0, 1\], got -0.1"),
        (KVPrecision, {"tau": float("nan")}, ValueError, r"tau must be in \(0, 1\], got nan"),
        (KVPrecision, {"bits": 5}, ValueError, "bits must be one of 16, 8, 4, 2, got 5"),
        (KVPrecision, {"bits": 4.0}, TypeError, "bits must be int, got 4.0"),
        (KVPrecision, {"low_bits": 3}, ValueError, "low_bits must be one of None, 8, 4, 2, got 3"),
        (KVPrecision, {"edge_bits": 1}, ValueError, "edge_bits must be one of None, 16, 8, 4, 2, got 1"),
        (KVPrecision, {"interval": 0}, ValueError, "interval must be at least 64, got 0"),
        (ZipVLPrefill, {"tau": 0.0}, ValueError, r"tau must be in \(0, 1\], got 0.0"),
        (ZipVLPrefill, {"tau": 1.01}, ValueError, r"tau must be in \(0, 1\], got 1.01"),
        (DecodeCompaction, {"limit": 0}, ValueError, "limit must be at least 1, got 0"),
        (DecodeCompaction, {"limit": 2.5}, TypeError, "limit must be int, got 2.5"),
        (DecodeCompaction, {"limit": 67}, ValueError, r"limit must be at least sinks \+ recent, 68 tokens that"),
        (DecodeCompaction, {"score": "sum"}, ValueError, "score must be one of 'mass', 'queries', got 'sum'"),
        (DecodeCompaction, {"others": "merge"}, ValueError, "others must be one of 'drop', 'demote', got 'merge'"),
        (DecodeCompaction, {"others": None}, TypeError, "others must be str, got None"),
    ],
)  # fmt: skip
def test_options(make: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_a_limit_holds_whatever_the_length() -> None:
    part = DecodeCompaction(0.5, limit=100)
    assert [part.budget(tokens) for tokens in (10, 150, 190, 500, 10**6)] == [68, 75, 95, 100, 100]


# -- parts that do not go together


REFUSED = [
    (
        lightvlm.Plan(cache=compaction(others="demote")),
        r"plan.cache demotes tokens \(others='demote'\), which needs a precision part that packs them",
    ),
    (
        lightvlm.Plan(cache=compaction(score="queries"), precision=PRECISION),
        r"plan.cache must score by the attention added up while decoding \(score='mass'\)",
    ),
]


@pytest.mark.parametrize(("plan", "message"), REFUSED)
def test_parts_that_do_not_go_together(model: Any, plan: lightvlm.Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lightvlm.attach(model, plan)
    with lightvlm.attach(model, lightvlm.Plan()):  # nothing was attached before
        pass
    with pytest.raises(ValueError, match=message):
        CompactCache(model.config, plan)


def test_heads_that_cannot_be_packed(llava: Any) -> None:
    message = "model has heads of 8 channels; a packed cache needs 32, 64, 80, 96, 128, 192, 256"
    with pytest.raises(ValueError, match=message):
        CompactCache(llava.config, lightvlm.Plan(precision=PRECISION))


# -- a cache of another model


def test_a_cache_of_another_model_under_a_plan(model: Any) -> None:
    """It is refused empty and filled, packed or not, and stays as it is."""
    other = LLAVA.build(head_dim=32, num_key_value_heads=4)
    plan, inputs = lightvlm.Plan(precision=PRECISION), prompt(LLAVA, LONG)
    message = f"cache of another model: it has {DEPTH} layers of 2 heads of 32 channels, the model {DEPTH} of 4 of 32"
    with torch.no_grad():
        with lightvlm.attach(model, plan):
            cache = model(**inputs).past_key_values
        before = content(cache)
        with lightvlm.attach(other, plan):
            with pytest.raises(ValueError, match=message):
                extend(LLAVA, other, inputs["attention_mask"], TOKEN, past_key_values=cache)
            with pytest.raises(ValueError, match=message):
                other(**inputs, past_key_values=CompactCache(model.config))
        assert same(content(cache), before)


@pytest.mark.parametrize("plan", [None, lightvlm.Plan(precision=PRECISION)], ids=["whole", "packed"])
def test_a_cache_of_another_model_alone(model: Any, plan: Any) -> None:
    """Of wrong heads: at the first layer. Of too few layers: once they are used up; what they took is taken back."""
    inputs = prompt(LLAVA, LONG)
    wide, deep = (
        LLAVA.build(head_dim=32, num_key_value_heads=4),
        LLAVA.build(head_dim=32, num_hidden_layers=7),
    )
    with torch.no_grad():
        cache = CompactCache(model.config, plan)
        model(**inputs, past_key_values=cache)
        mask = inputs["attention_mask"]
        _, mask = extend(LLAVA, model, mask, TOKEN, past_key_values=cache)
        before = content(cache)
        heads = r"key_states has 4 heads of 32 channels in torch\.float32, the cache 2 of 32"
        with pytest.raises(ValueError, match=heads):
            extend(LLAVA, wide, mask, TOKEN, past_key_values=cache)
        assert same(content(cache), before)
        message = f"layer {DEPTH} was asked of a cache for {DEPTH} layers: it belongs to another model"
        with pytest.raises(ValueError, match=message):
            extend(LLAVA, deep, mask, TOKEN, past_key_values=cache)
        assert same(content(cache), before)
        empty = CompactCache(model.config, plan)
        with pytest.raises(ValueError, match=message):
            deep(**inputs, past_key_values=empty)
        assert (empty.get_seq_length(), empty.layers[0].is_initialized) == (0, False)
        model(**inputs, past_key_values=empty)


# -- capacity


@pytest.mark.parametrize("others", [None, "drop", "demote"])
def test_beyond_the_capacity_of_a_packed_cache(model: Any, others: str | None) -> None:
    part = None if others is None else compaction(others=others, keep=1.0)
    plan, inputs = lightvlm.Plan(cache=part, precision=PRECISION), prompt(LLAVA, LONG)
    cache = CompactCache(model.config, capacity=110)
    with torch.no_grad(), lightvlm.attach(model, plan):
        model(**inputs, past_key_values=cache)
        mask = inputs["attention_mask"]
        for _ in range(110 - 101):
            _, mask = extend(LLAVA, model, mask, TOKEN, past_key_values=cache)
        before = content(cache)
        with pytest.raises(ValueError, match="capacity of the cache is 110 tokens; this step needs 111"):
            extend(LLAVA, model, mask, TOKEN, past_key_values=cache)
        assert same(content(cache), before)
    with torch.no_grad():
        with pytest.raises(ValueError, match="capacity of the cache is 110 tokens; this step needs 111"):
            extend(LLAVA, model, mask, TOKEN, past_key_values=cache)
        assert same(content(cache), before)


def test_a_later_layer_that_is_full_stops_the_first(model: Any) -> None:
    """The first layer dropped tokens and has room; the others, which demote them, do not."""
    precision = KVPrecision(8, sinks=2, recent=6, interval=64, edge_bits=16)
    plan, inputs = lightvlm.Plan(cache=compaction(others="demote"), precision=precision), prompt(LLAVA, LONG)
    cache = CompactCache(model.config, capacity=110)
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        model(**inputs, past_key_values=cache)
        mask = inputs["attention_mask"]
        for _ in range(110 - 101):
            _, mask = extend(LLAVA, model, mask, TOKEN, past_key_values=cache)
        assert run.report().compactions > 0
        assert cache.layers[0].held < 60
        assert cache.layers[1].held == 110
        before = content(cache)
        with pytest.raises(ValueError, match="capacity of the cache is 110 tokens; this step needs 111"):
            extend(LLAVA, model, mask, TOKEN, past_key_values=cache)
        assert same(content(cache), before)


def test_a_budget_makes_room_in_a_packed_cache(model: Any) -> None:
    """A cache of 180 tokens generates more than that: the capacity counts what is held, not what was seen."""
    plan = lightvlm.Plan(cache=compaction(limit=40, interval=64), precision=PRECISION)
    cache = CompactCache(model.config, capacity=190)
    with lightvlm.attach(model, plan):
        assert generate(model, LLAVA.batch(LONG), 300, past_key_values=cache).shape == (2, 300)
    assert cache.get_seq_length() == 101 + 299
    assert max(layer.held for layer in cache.layers) <= 190


def test_generated_blocks_keep_their_addresses(model: Any) -> None:
    """Where a capacity is set there is room for all of them from the first one on."""
    cache = CompactCache(model.config, lightvlm.Plan(precision=PRECISION), capacity=400)
    inputs = prompt(LLAVA, LONG)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        mask, seen = inputs["attention_mask"], []
        for step in range(200):
            _, mask = extend(LLAVA, model, mask, TOKEN, past_key_values=cache)
            if step > 70:
                grown = [
                    layer.packed.generated[8].packed for layer in cache.layers if layer.packed is not None
                ]
                seen.append([one.key_codes.data_ptr() for one in grown if one is not None])
    assert all(one == seen[0] for one in seen)
    assert cache.layers[0].packed is not None
    assert cache.layers[0].packed.generated[8].used == 192


# -- rows


def test_wrong_rows_of_a_packed_cache(model: Any) -> None:
    inputs = prompt(LLAVA, LONG)
    with torch.no_grad(), lightvlm.attach(model, lightvlm.Plan(precision=PRECISION)):
        cache = model(**inputs).past_key_values
        before = content(cache)
        for rows in ([0, 2], [-1, 0], [], [[0, 1]], [0.0, 1.0]):
            indices = torch.tensor(rows, dtype=None if rows else torch.int64)
            for method in (cache.reorder_cache, cache.batch_select_indices):
                with pytest.raises(ValueError, match="indices must "):
                    method(indices)
        wrong, mask = torch.tensor([[3], [5], [7]]), inputs["attention_mask"][[0, 1, 1]]
        with pytest.raises(ValueError, match="key_states has 3 rows, the cache has 2"):
            extend(LLAVA, model, mask, wrong, past_key_values=cache)
        assert same(content(cache), before)


def test_rows_that_differ_only_in_what_was_important(model: Any) -> None:
    """Two rows of one length with different numbers of tokens in 4 and 2 bits: hosts and device must agree on them."""
    row = [1, 2, *LONG[0][2:]]
    other = [9, 8, *LONG[0][2:]]
    prefill = ZipVLPrefill(tau=0.7, recent_rows=4, random_rows=5, min_tokens=1)
    plan = lightvlm.Plan(prefill, precision=KVPrecision(4, low_bits=2, sinks=2, recent=6, interval=64))
    with torch.no_grad(), lightvlm.attach(model, plan):
        cache = model(**prompt(LLAVA, [row, other])).past_key_values
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
    differ = 0
    for layer in cache.layers:
        for one in layer.packed.prompt:
            assert one.packed.lens.tolist() == one.counts
            differ += one.counts[0] != one.counts[1]
    assert differ
