"""A cache that was evicted from right after its prompt: every method, in everything that a cache is used for."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache, KVPages, KVPrecision, PagedCompactCache, Plan
from lightvlm.catalogue import describe
from lightvlm.methods import METHODS
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.zipvl import ZipVLPrefill
from python.stored import bytes_alive
from python.talk import ANSWER, QUESTION, Conversation, check, stored
from python.test_host_reads import counted_reads
from python.test_prefill import ROWS, lightvlm_plan, noise, prompt
from python.tiny import DEPTH, LLAVA, Family, Image, extend, generate, generate_logits

from lightvlm_ext import ops

SMALL: dict[str, Any] = {"min_tokens": 1}
PLANS = {
    "snapkv": lightvlm.SnapKV(keep=0.4, window=3, **SMALL),
    "pyramidkv": lightvlm.PyramidKV(keep=0.3, window=2, beta=5, **SMALL),
    "h2o": lightvlm.H2O(keep=0.4, interval=4, **SMALL),
    "streaming_llm": lightvlm.StreamingLLM(keep=0.4, sinks=2, interval=4, **SMALL),
    "vl_cache": lightvlm.VLCache(keep=0.4, **SMALL),
    "look_m": lightvlm.LookM(keep=0.4, **SMALL),
}
SHARED = {
    "snapkv": lightvlm.SnapKV(keep=0.4, window=3, per_head=False, **SMALL),
    "pyramidkv": lightvlm.PyramidKV(keep=0.3, window=2, beta=5, per_head=False, **SMALL),
    "h2o": lightvlm.H2O(keep=0.4, interval=4, per_head=False, **SMALL),
    "streaming_llm": PLANS["streaming_llm"],
    "vl_cache": lightvlm.VLCache(keep=0.4, per_head=False, **SMALL),
}
PROMPT_ONLY = ["snapkv", "pyramidkv", "vl_cache", "look_m"]
DRAFTED = [*ROWS[2], 11, 12, 13, 11, 12]


@pytest.fixture(scope="module")
def wide() -> Any:
    """Heads of 32 channels, which a packed cache needs."""
    return LLAVA.build(head_dim=32)


# -- plans


@pytest.mark.parametrize("name", [*PLANS, "kivi"])
def test_registered(name: str) -> None:
    plan = lightvlm.method(name)
    assert Plan.from_json(plan.to_json()) == plan
    assert lightvlm.method(name, keep_for_later="drop").keep_for_later == "drop"
    for level in METHODS[name].levels:
        assert lightvlm.method(name, **{METHODS[name].knob: level}) != plan or level in (0.1, 0.2, 2)
    options = {option["name"]: option for option in describe(name)["options"]}
    assert METHODS[name].knob in options
    assert all(option["doc"] for option in options.values())


@pytest.mark.parametrize("name", PLANS)
def test_json_round_trip(name: str) -> None:
    assert Plan.from_json(PLANS[name].to_json(indent=2)) == PLANS[name]


# -- prompts


@pytest.mark.parametrize("name", PLANS)
def test_batches_decode_as_their_rows_do(model: Any, family: Family, name: str) -> None:
    with lightvlm.attach(model, PLANS[name]):
        together = generate(model, family.batch(ROWS), 16)
        alone = [generate(model, family.batch([row]), 16)[0] for row in ROWS]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize(
    "plan",
    [
        lightvlm.SnapKV(keep=1, window=2, min_tokens=1),
        lightvlm.PyramidKV(keep=1, window=2, min_tokens=1),
        lightvlm.SnapKV(),
        lightvlm.PyramidKV(),
        lightvlm.H2O(keep=1, min_tokens=1),
        lightvlm.StreamingLLM(),
        lightvlm.StreamingLLM(keep=1, min_tokens=1),
        lightvlm.VLCache(keep=1, min_tokens=1),
        lightvlm.LookM(keep=1, min_tokens=1),
        lightvlm.SnapKV(keep=0.1),  # of prompts this short all stays
    ],
    ids=lambda plan: plan.cache.kind,
)
def test_keeping_everything_is_the_baseline(model: Any, family: Family, plan: Plan) -> None:
    inputs = family.batch(ROWS)
    expected = generate_logits(model, inputs, 10)[1]
    with lightvlm.attach(model, plan) as run:
        found = generate_logits(model, inputs, 10)[1]
    if plan.cache.wants_mass:  # type: ignore[union-attr]  # our attention adds up what tokens receive
        assert (found - expected).abs().max() <= 4 * noise(model, family, ROWS) + 1e-5
    else:
        assert torch.equal(found, expected)
    assert run.report().compactions == 0


@pytest.mark.parametrize("name", PLANS)
def test_rooms_and_bytes(model: Any, family: Family, name: str) -> None:
    """Growing buffers give back what was evicted, fixed ones stay where they are; the report counts what is stored."""
    rows = [[*ROWS[2] * 5]]
    inputs = prompt(family, rows)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), lightvlm.attach(model, PLANS[name]) as run:
        cache = model(**inputs).past_key_values
        report = run.report()
        fixed = CompactCache(model.config, PLANS[name], capacity=length + 4)
        model(**inputs, past_key_values=fixed)
    heads, width = cache.heads
    token = 2 * heads * width * 4
    assert stored(cache) == stored(fixed)
    held = [layer.ends[0] for layer in cache.layers]
    assert max(held) < length
    assert report.kv_bytes_used == cache.kv_bytes_used == sum(held) * token
    assert report.kv_bytes_full == DEPTH * length * token
    assert report.kv_bytes_allocated == cache.kv_bytes_allocated == bytes_alive(cache)
    assert report.compactions == 0  # those while decoding
    assert [layer.key_storage.shape[1] for layer in cache.layers] == [
        min(end + 128, length + 128) for end in held
    ]
    assert all(layer.key_storage.shape[1] == length + 4 for layer in fixed.layers)


@pytest.mark.parametrize("name", PLANS)
def test_drafts_have_no_say(model: Any, family: Family, name: str) -> None:
    """A prompt whose last tokens may be cropped again, and the same without them."""
    row, drafts = ROWS[2], [11, 12, 13]
    with torch.no_grad(), lightvlm.attach(model, PLANS[name]):
        plain = model(**prompt(family, [row]), past_key_values=CompactCache(model.config)).past_key_values
        inputs = prompt(family, [[*row, *drafts]])
        drafted = model(
            **inputs, past_key_values=CompactCache(model.config), logits_to_keep=4
        ).past_key_values
        assert [layer.ends for layer in drafted.layers] == [[layer.ends[0] + 3] for layer in plain.layers]
        drafted.crop(-3)
        for one, other in zip(drafted.layers, plain.layers, strict=True):
            # longer products are summed in another order
            assert torch.allclose(one.keys, other.keys, atol=1e-5)
            assert torch.allclose(one.values, other.values, atol=1e-5)


@pytest.mark.parametrize("name", PROMPT_ONLY)
def test_assisted_decoding(model: Any, family: Family, name: str) -> None:
    inputs = family.batch([DRAFTED])
    with lightvlm.attach(model, PLANS[name]):
        expected = generate(model, inputs, 16)
        assert torch.equal(generate(model, inputs, 16, prompt_lookup_num_tokens=3), expected)


def test_the_first_chunk_is_a_prompt(model: Any, family: Family) -> None:
    """Chunked prefill: the first chunk is evicted from, the others are appended."""
    row, first = [1, Image(0), *range(2, 21)], 30
    length = family.batch([row])["input_ids"].shape[1]
    cache = CompactCache(model.config)
    with lightvlm.attach(model, PLANS["snapkv"]) as run:
        generate(model, family.batch([row]), 4, past_key_values=cache, prefill_chunk_size=first)
    assert stored(cache) == [[12 + length - first + 3]] * DEPTH  # 0.4 of 30
    assert run.report().stepped_aside == {}
    assert run.report().reread == 0


@pytest.mark.parametrize("name", PLANS)
def test_one_read_at_most(model: Any, family: Family, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """VL-Cache's budgets depend on what the device found; nobody else asks it."""
    with lightvlm.attach(model, PLANS[name]), counted_reads(model, monkeypatch) as found:
        generate(model, family.batch(ROWS), 10)
    assert found == (["tolist"] if name == "vl_cache" else [])


# -- what follows


@pytest.mark.parametrize("name", PLANS)
def test_later_questions(model: Any, family: Family, name: str) -> None:
    limit = 4 * noise(model, family, ROWS) + 1e-5
    with torch.no_grad(), lightvlm.attach(model, PLANS[name]) as run:
        talk = Conversation(model, family, ROWS)
        talk.read()
        talk.answer(ANSWER)
        check(talk, QUESTION, ANSWER.flip(1), limit)
        report = run.report()
    assert report.reread == 1
    assert report.stepped_aside == {}


@pytest.mark.parametrize("name", PLANS)
def test_a_later_question_to_what_is_left(model: Any, family: Family, name: str) -> None:
    """With keep_for_later="drop" it is appended, and evicts nothing but what decoding would."""
    plan = dataclasses.replace(PLANS[name], keep_for_later="drop")
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        talk = Conversation(model, family, ROWS)
        talk.read()
        before = stored(talk.cache)
        talk.say(QUESTION)
        assert [[count - 3 for count in layer] for layer in stored(talk.cache)] == before
    assert run.report().reread == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    ],
    ids=["beams", "return-two", "samples"],
)
@pytest.mark.parametrize("name", PLANS)
def test_rows_that_change_places(llava: Any, name: str, options: dict[str, Any]) -> None:
    """A cache that moves rows in its buffers, and one of fixed buffers."""
    found = []
    for capacity in (None, 90):
        torch.manual_seed(7)
        cache = CompactCache(llava.config, capacity=capacity)
        with lightvlm.attach(llava, PLANS[name]):
            found.append(generate(llava, LLAVA.batch(ROWS), 10, past_key_values=cache, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", PLANS)
def test_beams_are_those_of_rows_alone(llava: Any, name: str) -> None:
    with lightvlm.attach(llava, PLANS[name]):
        together = generate(llava, LLAVA.batch(ROWS), 10, num_beams=3)
        alone = [generate(llava, LLAVA.batch([row]), 10, num_beams=3)[0] for row in ROWS]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("name", PLANS)
def test_reset_and_again(model: Any, family: Family, name: str) -> None:
    inputs, cache = family.batch(ROWS), CompactCache(model.config, PLANS[name], capacity=80)
    with lightvlm.attach(model, PLANS[name]):
        first = generate(model, inputs, 10, past_key_values=cache)
        held = stored(cache)
        cache.reset()
        assert torch.equal(generate(model, inputs, 10, past_key_values=cache), first)
        assert stored(cache) == held
        assert torch.equal(generate(model, inputs, 10), first)


@pytest.mark.parametrize("name", PLANS)
def test_crop_stops_where_tokens_are_missing(llava: Any, name: str) -> None:
    with torch.no_grad(), lightvlm.attach(llava, PLANS[name]):
        inputs = prompt(LLAVA, [ROWS[2]])
        cache = llava(**inputs).past_key_values
        tail = min(layer.tail for layer in cache.layers)
        assert 0 < tail < inputs["input_ids"].shape[1]
        with pytest.raises(ValueError, match=f"only the last {tail} are all still in the cache"):
            cache.crop(-tail - 1)
        cache.crop(-tail)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] - tail


@pytest.mark.parametrize(
    ("name", "paged"), [*((name, False) for name in PLANS), *((name, True) for name in SHARED)]
)
def test_files(llava: Any, name: str, paged: bool, tmp_path: Path) -> None:
    plan = SHARED[name] if paged else PLANS[name]
    inputs = prompt(LLAVA, ROWS)
    mask, tokens = inputs["attention_mask"], torch.tensor([[3], [4], [5], [6]])
    with torch.no_grad(), lightvlm.attach(llava, plan):
        cache = llava(**inputs, past_key_values=CompactCache(llava.config, plan)).past_key_values
        cache.save(tmp_path / "cache.safetensors")
        if paged:
            pages = KVPages(llava.config, pages=200, page_size=16)
            other = PagedCompactCache.load(tmp_path / "cache.safetensors", llava.config, pages=pages)
        else:
            other = CompactCache.load(tmp_path / "cache.safetensors", llava.config)
        assert other.plan == plan
        for _ in range(9):
            first, longer = extend(LLAVA, llava, mask, tokens, past_key_values=cache)
            second, mask = extend(LLAVA, llava, mask, tokens, past_key_values=other)
            assert torch.allclose(first.logits, second.logits, atol=1e-5)
            assert torch.equal(longer, mask)
        assert stored(other) == stored(cache)


@pytest.mark.parametrize("name", PLANS)
def test_the_decode_loop(wide: Any, name: str) -> None:
    """Steps that ask the host for nothing, with evictions between them."""
    inputs, found = LLAVA.batch(ROWS), []
    with lightvlm.attach(wide, PLANS[name]) as run:
        for call in (wide.generate, functools.partial(lightvlm.generate, wide)):
            found.append(call(**inputs, max_new_tokens=20, do_sample=False))
    assert torch.equal(*found)
    assert run.report().stepped_aside == {}


@pytest.mark.parametrize("name", PLANS)
def test_sixteen_bits(name: str) -> None:
    model = LLAVA.build(torch.bfloat16)
    with lightvlm.attach(model, PLANS[name]):
        cache = CompactCache(model.config)
        _, logits = generate_logits(model, LLAVA.batch(ROWS, torch.bfloat16), 10, past_key_values=cache)
    assert logits.isfinite().all()
    assert all(layer.dropped for layer in cache.layers)


# -- pages


@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("name", SHARED)
def test_pages(model: Any, family: Family, name: str, page_size: int) -> None:
    """What all heads keep alike, pages can hold; what is evicted is free for others."""
    rows = [[*row, *row] for row in ROWS]
    inputs, plan = family.batch(rows), SHARED[name]
    pages = KVPages(model.config, pages=400, page_size=page_size)
    dense, paged = CompactCache(model.config), PagedCompactCache(model.config, pages=pages)
    with lightvlm.attach(model, plan):
        expected = generate(model, inputs, 12, past_key_values=dense)
        assert torch.equal(generate(model, inputs, 12, past_key_values=paged), expected)
    assert stored(paged) == stored(dense)
    held = sum(-(-count // page_size) for layer in stored(paged) for count in layer)
    assert pages.pages - pages.available == held


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "h2o", "vl_cache", "look_m"])
def test_pages_hold_all_heads_of_a_token(llava: Any, name: str) -> None:
    pages = KVPages(llava.config, pages=20, page_size=16)
    message = "plan.cache keeps other tokens in every head, and a page holds all heads of its tokens"
    with pytest.raises(ValueError, match=message):
        PagedCompactCache(llava.config, PLANS[name], pages=pages)
    cache = PagedCompactCache(llava.config, pages=pages)
    with lightvlm.attach(llava, PLANS[name]), pytest.raises(ValueError, match=message):
        generate(llava, LLAVA.batch(ROWS), 2, past_key_values=cache)
    assert pages.available == pages.pages


# -- with other parts


@pytest.mark.parametrize("prefill", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize("name", PROMPT_ONLY)
def test_what_is_left_is_packed(wide: Any, name: str, prefill: bool) -> None:
    """Eight bits, whose logits are close to those of 16; only what was kept is stored."""
    precision = KVPrecision(bits=8, sinks=1, recent=3)
    cache_part = PLANS[name].cache
    first = lightvlm_plan().prefill if prefill else None
    inputs, found, caches = prompt(LLAVA, ROWS), [], []
    for plan in (Plan(first, cache_part), Plan(first, cache_part, precision)):
        with torch.no_grad(), lightvlm.attach(wide, plan):
            out = wide(**inputs)
            caches.append(out.past_key_values)
            step, _ = extend(
                LLAVA,
                wide,
                inputs["attention_mask"],
                torch.tensor([[3], [4], [5], [6]]),
                past_key_values=out.past_key_values,
            )
            found.append(step.logits)
    for layer, packed in zip(*(cache.layers for cache in caches), strict=True):
        if packed.packed is None:  # in no row so much is left that it would be worth it
            assert max(packed.ends) <= 1 + 3 + 1  # the token after the prompt
            assert packed.ends == layer.ends
            continue
        counts = [sum(pair) for pair in zip(packed.packed.counts, packed.ends, strict=True)]
        assert counts == [end - start for start, end in zip(layer.starts, layer.ends, strict=True)]
        assert [one.packed.bits for one in packed.packed.prompt] == [8]
    assert caches[1].kv_bytes_used < caches[0].kv_bytes_used
    distance = (found[0] - found[1]).abs().max()
    assert 0 < distance < 0.1 * found[0].std()


@pytest.mark.parametrize("name", PROMPT_ONLY)
def test_three_parts(wide: Any, name: str) -> None:
    """A batch is the same as its rows, with a prefill part, this, and four bits; past a packing of generated tokens."""
    plan = Plan(
        lightvlm_plan().prefill, PLANS[name].cache, KVPrecision(bits=4, sinks=1, recent=2, interval=64)
    )
    rows = ROWS[2:]
    with lightvlm.attach(wide, plan) as run:
        together = generate(wide, LLAVA.batch(rows), 80)
        alone = [generate(wide, LLAVA.batch([row]), 80)[0] for row in rows]
    assert torch.equal(together, torch.stack(alone))
    assert run.report().stepped_aside == {}
    assert run.report().kv_compression > 2


def test_heavy_hitters_on_a_packed_cache(wide: Any) -> None:
    """Shared by all heads, what the prompt's tokens have received goes with them into the packed storage."""
    plan = Plan(
        cache=lightvlm.H2O(keep=0.3, interval=32, per_head=False, **SMALL).cache,
        precision=KVPrecision(bits=8, sinks=1, recent=2, interval=64),
    )
    cache, inputs = CompactCache(wide.config), LLAVA.batch([DRAFTED * 3])
    prompt_tokens = inputs["input_ids"].shape[1]
    with lightvlm.attach(wide, plan) as run:
        _, logits = generate_logits(wide, inputs, 100, past_key_values=cache)
    assert logits.isfinite().all()
    assert run.report().compactions > 0
    for layer in cache.layers:
        assert layer.packed is not None
        # of the prompt's tokens more went than when it was read; blocks of generated ones stay whole
        assert 0 < sum(one.counts[0] for one in layer.packed.prompt) < 0.3 * prompt_tokens - 3


def test_kivi_is_a_preset(wide: Any) -> None:
    plan = lightvlm.KIVI(recent=8)
    blocks = {"interval": 64, "prompt_block": 64}
    assert plan == Plan(precision=KVPrecision(bits=2, sinks=0, recent=8, **blocks))
    assert lightvlm.KIVI() == Plan(precision=KVPrecision(bits=2, sinks=0, recent=128, **blocks))
    assert lightvlm.KIVI(4, sinks=3).precision == KVPrecision(bits=4, sinks=3, recent=128, **blocks)


def test_blocks_of_a_prompt(wide: Any) -> None:
    """Each 64 tokens of a row are stored as if they were all there is."""
    rows, whole, cache = [ROWS[2] * 4, ROWS[0] * 2], CompactCache(wide.config), CompactCache(wide.config)
    inputs = prompt(LLAVA, rows)
    with torch.no_grad():
        with lightvlm.attach(wide, Plan()):
            wide(**inputs, past_key_values=whole)
        with lightvlm.attach(wide, lightvlm.KIVI(recent=5)):
            wide(**inputs, past_key_values=cache)
    for layer, full in zip(cache.layers, whole.layers, strict=True):
        (stored_,) = layer.packed.prompt
        assert stored_.packed.bits == 2
        key, value = ops.dequantize_kv(stored_.packed, torch.float32)
        for row, (start, end) in enumerate(zip(full.starts, full.ends, strict=True)):
            assert stored_.counts[row] == end - start - 5
            places = range(start, end - 5, 64)
            assert len(places) > 1 or row
            for number, at in enumerate(places):
                own = slice(at, min(at + 64, end - 5))
                alone = ops.quantize_kv(
                    full.key_storage[row : row + 1, own], full.value_storage[row : row + 1, own], bits=2
                )
                wanted = ops.dequantize_kv(alone, torch.float32)
                here = slice(64 * number, 64 * number + own.stop - own.start)
                assert torch.equal(key[row, here], wanted[0][0])
                assert torch.equal(value[row, here], wanted[1][0])
    scales = sum(-(-count // 64) for count in stored_.counts)
    tokens = sum(stored_.counts)
    heads, width = cache.heads
    each = heads * (tokens * (2 * width // 4 + 4) + scales * 12 * width)
    assert cache.layers[-1].packed.bytes_used == each
    assert whole.layers[-1].bytes_used() > each


def test_kivi_with_eviction_and_a_later_block(wide: Any, tmp_path: Path) -> None:
    """From the prompt before it is stored; generated tokens are packed, rows change places, a file holds it."""
    plan = Plan(None, PLANS["snapkv"].cache, lightvlm.KIVI(recent=4).precision)
    rows = [ROWS[2] * 6, ROWS[2] * 5]
    cache = CompactCache(wide.config)
    with lightvlm.attach(wide, plan):
        found = generate(wide, LLAVA.batch(rows), 75, past_key_values=cache)
        alone = [generate(wide, LLAVA.batch([row]), 75)[0] for row in rows]
        assert torch.equal(found, torch.stack(alone))
        assert all(layer.packed.generated for layer in cache.layers)  # type: ignore[union-attr]
        cache.save(tmp_path / "cache.safetensors")
        other = CompactCache.load(tmp_path / "cache.safetensors", wide.config)
        assert other.kv_bytes_used == cache.kv_bytes_used
        generate(wide, LLAVA.batch(rows), 4, num_beams=2)


EVICTS = lightvlm.SnapKV(keep=0.5).cache
ZIPVL = ZipVLPrefill(min_tokens=1)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            Plan(dataclasses.replace(ZIPVL, unimportant="drop"), EVICTS),
            "plan.prefill drops the keys of tokens that did not attend (unimportant='drop'), and plan.cache evicts "
            "from the prompt, too; use one of the two",
        ),
        (
            Plan(ZIPVL, EVICTS, KVPrecision(bits=4, low_bits=2)),
            "plan.precision has low_bits for tokens of the prompt, from which plan.cache evicts; use one of the two",
        ),
        (
            Plan(None, EVICTS, KVPrecision(keep_text=True)),
            "plan.precision has keep_text, but which of the text is left is for plan.cache to choose",
        ),
        (
            Plan(None, lightvlm.H2O().cache, KVPrecision()),
            "plan.cache evicts per head while decoding, and packed tokens are all heads' together; use per_head=False",
        ),
        (
            Plan(None, DecodeCompaction(), KVPrecision(prompt_block=64)),
            "plan.precision has prompt_block, and plan.cache evicts single tokens of the prompt while decoding",
        ),
        (
            Plan(None, lightvlm.StreamingLLM().cache, KVPrecision()),
            "plan.cache must score by the attention added up while decoding",
        ),
    ],
)
def test_what_does_not_go_together(wide: Any, plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        lightvlm.attach(wide, plan)


def test_a_cache_with_a_plan_of_its_own(llava: Any) -> None:
    """It is the cache's plan that evicts; where the run's prefill part drops keys itself, it steps aside."""
    inputs = LLAVA.batch(ROWS)
    cache = CompactCache(llava.config, PLANS["snapkv"])
    with lightvlm.attach(llava, Plan(cache=DecodeCompaction())):
        generate(llava, inputs, 2, past_key_values=cache)
    assert all(layer.dropped for layer in cache.layers)
    cache = CompactCache(llava.config, PLANS["snapkv"])
    drops = ZipVLPrefill(tau=0.7, recent_rows=4, random_rows=5, min_tokens=1, unimportant="drop")
    with lightvlm.attach(llava, Plan(drops)) as run:
        generate(llava, inputs, 2, past_key_values=cache)
    assert run.report().stepped_aside == {
        "the cache's plan evicts from a prompt whose tokens the run's plan drops": 1
    }


@pytest.mark.parametrize("name", PROMPT_ONLY)
def test_sparse_attention_is_no_obstacle(llava: Any, name: str) -> None:
    """Where some tokens do not attend but all stay, what is evicted is this part's choice."""
    prefill = ZipVLPrefill(tau=0.7, recent_rows=4, random_rows=5, min_tokens=1)
    cache = CompactCache(llava.config)
    with lightvlm.attach(llava, Plan(prefill, PLANS[name].cache)) as run:
        together = generate(llava, LLAVA.batch(ROWS), 8, past_key_values=cache)
        alone = [generate(llava, LLAVA.batch([row]), 8)[0] for row in ROWS]
    assert torch.equal(together, torch.stack(alone))
    assert run.report().stepped_aside == {}
    assert all(layer.dropped for layer in cache.layers)
