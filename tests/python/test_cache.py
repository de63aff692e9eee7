"""CompactCache: alone, as a cache like any other; its capacity, its limits and its errors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache
from lightvlm.cache_layer import CompactLayer
from lightvlm.methods.decode_compaction import DecodeCompaction
from python.stored import bytes_alive
from python.test_prefill import ROWS, lightvlm_plan, prompt
from python.tiny import DEPTH, LLAVA, QWEN, Family, extend, generate, generate_logits
from torch import Tensor

EVERY_TOKEN = lightvlm.Plan(cache=DecodeCompaction(keep=0.2, interval=1, sinks=1, recent=3, rows=2))


def states(batch: int, tokens: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values (B, 2, S, 4) that tell which token they are."""
    numbers = torch.arange(start, start + tokens, dtype=torch.float32)
    keys = (
        numbers[None, None, :, None]
        + 100 * torch.arange(batch)[:, None, None, None]
        + torch.zeros(1, 2, 1, 4)
    )
    return keys, -keys


# -- alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capacity", [None, 60])
def test_alone_it_is_a_dynamic_cache(family: Family, dtype: torch.dtype, capacity: int | None) -> None:
    model = family.build(dtype)
    inputs = family.batch(ROWS, dtype)
    expected = generate_logits(model, inputs, 8)[1]
    cache = CompactCache(model.config, capacity=capacity)
    assert torch.equal(generate_logits(model, inputs, 8, past_key_values=cache)[1], expected)
    length = inputs["input_ids"].shape[1]
    assert cache.get_seq_length() == length + 7
    assert cache.kv_bytes_used == cache.kv_bytes_full <= cache.kv_bytes_allocated


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.1},
        {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5, "num_beams": 2},
    ],
    ids=["beams", "return-two", "samples", "sampled-beams"],
)
def test_alone_in_other_kinds_of_generation(model: Any, family: Family, options: dict[str, Any]) -> None:
    inputs = family.batch(ROWS)
    found = []
    for cache in (None, CompactCache(model.config), CompactCache(model.config, capacity=80)):
        torch.manual_seed(7)
        given = {} if cache is None else {"past_key_values": cache}
        found.append(generate(model, inputs, 8, **options, **given))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_alone_in_assisted_decoding(model: Any, family: Family) -> None:
    inputs = family.batch([[*ROWS[2], 11, 12, 13, 11, 12]])
    expected = generate(model, inputs, 16, prompt_lookup_num_tokens=3)
    cache = CompactCache(model.config)
    assert torch.equal(
        generate(model, inputs, 16, prompt_lookup_num_tokens=3, past_key_values=cache), expected
    )
    assert len(cache) == DEPTH
    assert not cache.is_compileable
    assert cache.layers[0].batch_size == 1


def test_a_draft_model(llava: Any) -> None:
    """The caches of both models may be compact ones."""
    draft = LLAVA.build(num_hidden_layers=2)
    inputs = LLAVA.batch([[*ROWS[0], 11, 12]])
    expected = generate(llava, inputs, 12, assistant_model=draft)
    cache = CompactCache(llava.config)
    assert torch.equal(generate(llava, inputs, 12, assistant_model=draft, past_key_values=cache), expected)


def test_a_copy_goes_its_own_way(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    token = torch.tensor([[3]] * len(ROWS))
    with torch.no_grad():
        cache = model(**inputs, past_key_values=CompactCache(model.config)).past_key_values
        other = copy.deepcopy(cache)
        first, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=other)
        assert cache.get_seq_length() == other.get_seq_length() - 1
        second, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=cache)
    assert torch.equal(first.logits, second.logits)


# -- what it refuses


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("config",), {}, TypeError, "config must be a configuration of transformers, got str"),
        ((None, "plan"), {}, TypeError, "plan must be a lightvlm.Plan, got str"),
        ((None, DecodeCompaction()), {}, TypeError, "plan must be a lightvlm.Plan, got DecodeCompaction"),
        ((None,), {"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ((None,), {"capacity": -3}, ValueError, "capacity must be at least 1, got -3"),
        ((None,), {"capacity": 8.0}, TypeError, "capacity must be None or an int, got float"),
        ((None,), {"capacity": True}, TypeError, "capacity must be None or an int, got bool"),
    ],
)
def test_bad_arguments(
    llava: Any, arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    arguments = tuple(llava.config if argument is None else argument for argument in arguments)
    with pytest.raises(error, match=message):
        CompactCache(*arguments, **options)


def test_windows_are_refused() -> None:
    from transformers import MistralConfig

    with pytest.raises(ValueError, match="config has layers that are not full attention: sliding_attention"):
        CompactCache(MistralConfig(sliding_window=16))
    assert len(CompactCache(MistralConfig(sliding_window=None, num_hidden_layers=3))) == 3


def test_either_configuration_will_do(llava: Any) -> None:
    assert len(CompactCache(llava.config)) == len(CompactCache(llava.config.text_config)) == DEPTH


# -- capacity


def test_growing() -> None:
    layer = CompactLayer()
    layer.update(*states(2, 5))
    room = layer.key_storage.shape[1]
    assert room >= 5
    for number in range(5, room):
        layer.update(*states(2, 1, number))
    assert layer.key_storage.shape[1] == room
    keys, values = layer.update(*states(2, 3, room))
    assert layer.key_storage.shape[1] == 2 * room
    assert torch.equal(keys, states(2, room + 3)[0])
    assert torch.equal(values, states(2, room + 3)[1])
    layer.update(*states(2, 5 * room, room + 3))
    assert torch.equal(layer.keys, states(2, 6 * room + 3)[0])


def test_shrinking(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    token = torch.tensor([[3]] * len(ROWS))
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan()):
        cache, other = (model(**inputs).past_key_values for _ in range(2))
        cache.shrink()
        assert cache.kv_bytes_allocated == sum(2 * layer.keys.nbytes for layer in cache.layers)
        assert cache.kv_bytes_allocated < other.kv_bytes_allocated
        for _ in range(2):
            found, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=cache)
            expected, mask = extend(family, model, inputs["attention_mask"], token, past_key_values=other)
            assert torch.equal(found.logits, expected.logits)
            inputs["attention_mask"] = mask
    fixed = CompactCache(model.config, capacity=64)
    fixed.layers[0].update(*states(1, 3))
    allocated, address = fixed.kv_bytes_allocated, fixed.layers[0].key_storage.data_ptr()
    fixed.shrink()
    assert (fixed.kv_bytes_allocated, fixed.layers[0].key_storage.data_ptr()) == (allocated, address)


def addresses(cache: CompactCache) -> list[int]:
    return [x.data_ptr() for layer in cache.layers for x in (layer.key_storage, layer.value_storage)]


def test_a_fixed_capacity_keeps_its_addresses(model: Any, family: Family) -> None:
    """Over tokens, compactions, reordered beams, crops and resets."""
    plan = lightvlm.Plan(prefill=lightvlm_plan().prefill, cache=EVERY_TOKEN.cache)
    inputs = prompt(family, ROWS)
    cache = CompactCache(model.config, capacity=64)
    with torch.no_grad(), lightvlm.attach(model, plan):
        expected = generate(model, family.batch(ROWS), 8)
        model(**inputs, past_key_values=cache)
        fixed = addresses(cache)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0, 2, 2]))
        cache.reset()
        assert cache.get_seq_length() == 0
        for _ in range(2):
            assert torch.equal(generate(model, family.batch(ROWS), 8, past_key_values=cache), expected)
            assert addresses(cache) == fixed
            cache.reset()
    assert cache.kv_bytes_used == cache.kv_bytes_full == 0
    assert cache.kv_bytes_allocated == bytes_alive(cache) > 0


def test_what_a_reset_leaves_behind_does_no_harm() -> None:
    """Masked keys meet weights of 0, but 0 times NaN is NaN."""
    layer = CompactLayer(capacity=8)
    layer.update(*states(2, 3))
    layer.key_storage.fill_(float("nan"))
    layer.value_storage.fill_(float("inf"))
    layer.reset()
    layer.update(*states(2, 3))
    assert torch.equal(layer.keys, states(2, 3)[0])
    assert layer.key_storage.isfinite().all()
    assert layer.value_storage.isfinite().all()


def test_beyond_the_capacity(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    length = inputs["input_ids"].shape[1]
    token = torch.tensor([[3]] * len(ROWS))
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan()):
        small = CompactCache(model.config, capacity=length - 1)
        with pytest.raises(
            ValueError, match=f"capacity of the cache is {length - 1} tokens; this step needs {length}"
        ):
            model(**inputs, past_key_values=small)
        assert small.get_seq_length() == 0
        assert not any(layer.is_initialized for layer in small.layers)

        cache = CompactCache(model.config, capacity=length + 1)
        model(**inputs, past_key_values=cache)
        _, mask = extend(family, model, inputs["attention_mask"], token, past_key_values=cache)
        before = [(layer.seen, layer.ends, layer.key_storage.clone()) for layer in cache.layers]
        with pytest.raises(
            ValueError, match=f"capacity of the cache is {length + 1} tokens; this step needs"
        ):
            extend(family, model, mask, token, past_key_values=cache)
        for layer, (seen, ends, keys) in zip(cache.layers, before, strict=True):
            assert (layer.seen, layer.ends) == (seen, ends)
            assert torch.equal(layer.key_storage, keys)
        cache.crop(-1)  # makes room again
        out, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=cache)
        assert out.logits.isfinite().all()


def test_compaction_makes_room(llava: Any) -> None:
    """A cache of 24 tokens generates more than that."""
    plan = lightvlm.Plan(cache=DecodeCompaction(keep=0.1, interval=4, sinks=2, recent=8, rows=4))
    cache = CompactCache(llava.config, capacity=24)
    with lightvlm.attach(llava, plan):
        assert generate(llava, LLAVA.batch([[1, 2, 3]]), 60, past_key_values=cache).shape == (1, 60)
    assert cache.get_seq_length() == 62


# -- plans


def test_without_an_attached_model_nothing_is_evicted(llava: Any) -> None:
    inputs = LLAVA.batch(ROWS)
    expected = generate(llava, inputs, 6)
    cache = CompactCache(llava.config, EVERY_TOKEN)
    with pytest.warns(UserWarning, match="CompactCache evicts nothing on a model that is not attached"):
        assert torch.equal(generate(llava, inputs, 6, past_key_values=cache), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(llava, inputs, 2, past_key_values=CompactCache(llava.config))


def test_a_cache_with_a_plan_of_its_own(llava: Any) -> None:
    """Its plan says what is evicted, the run's what is reduced; one without a plan follows the run."""
    inputs = LLAVA.batch(ROWS)
    reduce, both = lightvlm_plan(), lightvlm.Plan(prefill=lightvlm_plan().prefill, cache=EVERY_TOKEN.cache)
    with lightvlm.attach(llava, both):
        expected = generate(llava, inputs, 8)
        assert torch.equal(generate(llava, inputs, 8, past_key_values=CompactCache(llava.config)), expected)
        kept = CompactCache(llava.config, lightvlm.Plan())
        unlike = generate(llava, inputs, 8, past_key_values=kept)
    with lightvlm.attach(llava, reduce) as run:
        own = CompactCache(llava.config, EVERY_TOKEN)
        assert torch.equal(generate(llava, inputs, 8, past_key_values=own), expected)
        assert run.report().compactions == 7
        assert torch.equal(generate(llava, inputs, 8), unlike)
        assert run.report().compactions == 7
    assert not torch.equal(unlike, expected)
    with lightvlm.attach(llava, lightvlm.Plan()) as run:
        generate(llava, inputs, 8, past_key_values=CompactCache(llava.config, EVERY_TOKEN))
    assert run.report().compactions == 7


def test_a_shortened_cache_needs_the_attached_model(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    token = torch.tensor([[3]] * len(ROWS))
    mask = inputs["attention_mask"]
    with torch.no_grad():
        with lightvlm.attach(model, lightvlm_plan()):
            cache, other = (model(**inputs).past_key_values for _ in range(2))
            expected, _ = extend(family, model, mask, token, past_key_values=other)
        for _ in range(2):
            with pytest.raises(
                ValueError, match="shortened by a plan and only an attached model can read it"
            ):
                extend(family, model, mask, token, past_key_values=cache)
        assert [layer.seen for layer in cache.layers] == [mask.shape[1]] * DEPTH  # not the first one either
        with lightvlm.attach(model, lightvlm.Plan()):  # any plan will do to read it
            found, _ = extend(family, model, mask, token, past_key_values=cache)
    assert torch.equal(found.logits, expected.logits)


def test_a_whole_cache_does_not(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS[:1])
    token = torch.tensor([[3]])
    with torch.no_grad():
        plain = model(**inputs).past_key_values
        with lightvlm.attach(model, lightvlm.LightVLM(keep=1)):
            cache = model(**inputs).past_key_values
        assert isinstance(cache, CompactCache)
        found, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=cache)
        expected, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=plain)
    assert torch.equal(found.logits, expected.logits)


# -- crop


def test_crop() -> None:
    layer = CompactLayer()
    layer.crop(-1)  # nothing stored, nothing to do
    layer.update(*states(2, 9))
    layer.crop(0)
    layer.crop(-2)
    assert torch.equal(layer.keys, states(2, 7)[0])
    assert layer.get_seq_length() == 7
    layer.update(*states(2, 2, 50))
    assert layer.keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 50, 51]
    layer.crop(4)  # older transformers: the length that shall be left
    assert torch.equal(layer.values, states(2, 4)[1])
    layer.crop(10)
    assert layer.get_seq_length() == 4
    with pytest.raises(ValueError, match="cannot crop 5 tokens: only the last 4 are all still in the cache"):
        layer.crop(-5)
    layer.crop(-4)
    assert layer.get_seq_length() == 0


def test_crop_stops_where_tokens_are_missing(model: Any, family: Family) -> None:
    """In a reduced layer, tokens are consecutive only behind the last image."""
    rows = [ROWS[0], ROWS[2]]  # 3 and 10 text tokens behind the last image
    inputs = prompt(family, rows)
    token = torch.tensor([[3], [4]])
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan()):
        cache = model(**inputs).past_key_values
        mask = inputs["attention_mask"]
        expected, mask = extend(family, model, mask, token, past_key_values=cache)
        extend(family, model, mask, token, past_key_values=cache)
        before = [(layer.seen, layer.ends) for layer in cache.layers]
        with pytest.raises(
            ValueError, match="cannot crop 6 tokens: only the last 5 are all still in the cache"
        ):
            cache.crop(-6)
        assert [(layer.seen, layer.ends) for layer in cache.layers] == before
        cache.crop(-2)
        found, _ = extend(family, model, inputs["attention_mask"], token, past_key_values=cache)
        assert torch.equal(found.logits, expected.logits)
        cache.crop(-4)
        with pytest.raises(ValueError, match="cannot crop 1 tokens: only the last 0 are"):
            cache.crop(-1)


def test_crop_after_a_compaction(llava: Any) -> None:
    """The window of recent tokens is longer than what was decoded: image tokens are not consecutive for that."""
    plan = lightvlm.Plan(
        prefill=lightvlm_plan().prefill,
        cache=DecodeCompaction(keep=0.1, interval=2, sinks=0, recent=7, rows=2),
    )
    inputs = prompt(LLAVA, [ROWS[3]])  # one text token behind its image
    with torch.no_grad(), lightvlm.attach(llava, plan) as run:
        cache = llava(**inputs).past_key_values
        mask = inputs["attention_mask"]
        for token in (3, 4):
            _, mask = extend(LLAVA, llava, mask, torch.tensor([[token]]), past_key_values=cache)
        assert run.report().compactions == 1
        assert [layer.ends for layer in cache.layers] == [[7]] * 5
        with pytest.raises(ValueError, match="cannot crop 4 tokens: only the last 3 are"):
            cache.crop(-4)
        cache.crop(-3)
        assert [layer.ends for layer in cache.layers] == [[4]] * 5


# -- rows


def test_rows() -> None:
    layer = CompactLayer()
    layer.update(*states(3, 4))
    layer.batch_select_indices(torch.tensor([2, 0]))
    assert layer.keys[:, 0, 0, 0].tolist() == [200, 0]
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.keys[:, 0, 1, 0].tolist() == [1, 1]
    with pytest.raises(ValueError, match="indices must be rows of the cache, 0 to 1, got 0 to 2"):
        layer.batch_select_indices(torch.tensor([0, 2]))
    assert layer.batch_size == 2
    with pytest.raises(ValueError, match="key_states has 3 rows, the cache has 2"):
        layer.update(*states(3, 1))
    assert layer.get_seq_length() == 4


def test_rows_of_an_empty_cache(llava: Any) -> None:
    cache = CompactCache(llava.config)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reorder_cache(torch.tensor([0]))
    cache.crop(-1)
    cache.reset()
    cache.shrink()
    assert (cache.get_seq_length(), cache.kv_bytes_allocated, cache.layers[0].batch_size) == (0, 0, -1)
    assert cache.layers[0].keys is cache.layers[0].values is None


def test_a_bad_index_changes_no_row(qwen: Any) -> None:
    inputs = prompt(QWEN, ROWS)
    with torch.no_grad(), lightvlm.attach(qwen, lightvlm_plan()):
        cache = qwen(**inputs).past_key_values
        before = [(layer.starts, layer.ends) for layer in cache.layers]
        with pytest.raises(ValueError, match="indices must be rows of the cache, 0 to 3, got 0 to 4"):
            cache.batch_select_indices(torch.tensor([0, 4]))
        assert [(layer.starts, layer.ends) for layer in cache.layers] == before
        assert len(cache.leftpad) == 4


# -- bytes


def test_bytes(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    plan = lightvlm.Plan(prefill=lightvlm_plan().prefill, cache=DecodeCompaction(0.2, 2, 1, 3, 2))
    token = torch.tensor([[3]] * len(ROWS))
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        out = model(**inputs)
        cache, mask = out.past_key_values, inputs["attention_mask"]
        for _ in range(3):
            valid = [layer.ends[b] - layer.starts[b] for layer in cache.layers for b in range(len(ROWS))]
            each = 2 * 2 * 8 * 4  # keys and values of two heads of eight numbers of four bytes
            assert cache.kv_bytes_used == each * sum(valid)
            assert cache.kv_bytes_full == each * DEPTH * mask.numel()
            assert cache.kv_bytes_allocated == bytes_alive(cache)
            report = run.report()
            bytes_ = (report.kv_bytes_used, report.kv_bytes_allocated, report.kv_bytes_full)
            assert bytes_ == (cache.kv_bytes_used, cache.kv_bytes_allocated, cache.kv_bytes_full)
            _, mask = extend(family, model, mask, token, past_key_values=cache)
