"""A cache in few bits: what is stored, what attention makes of it, and when tokens are packed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.kv_precision import KVPrecision
from lightvlm.methods.zipvl import ZipVLPrefill
from python.slow import SlowDecoder
from python.stored import bytes_alive
from python.test_prefill import ROWS, lightvlm_plan, noise, prompt, slow_options
from python.test_sparse_attention import SlowZipVL
from python.tiny import DEPTH, LLAVA, Image, extend, generate
from torch import Tensor

from lightvlm_ext import ops, reference
from lightvlm_ext.ops import KVSegment

LONG = [[1, 2, *(Image(seed) for seed in range(6)), 3, 4, 5], [7, *(Image(seed) for seed in range(3, 8)), 9]]
UNIFORM: dict[str, Any] = {"bits": 4, "sinks": 2, "recent": 6, "interval": 64}
ZIPVL = ZipVLPrefill(tau=0.7, recent_rows=4, random_rows=5, min_tokens=1)


@pytest.fixture(scope="module")
def model() -> Any:
    """Heads of 32 channels, which a packed cache needs."""
    return LLAVA.build(head_dim=32)


def plan_of(prefill: Any = None, **options: Any) -> lightvlm.Plan:
    return lightvlm.Plan(prefill=prefill, precision=KVPrecision(**{**UNIFORM, **options}))


def content(layer: Any, row: int) -> tuple[Tensor, Tensor]:
    """Keys and values (Hkv, N, D) in float64 of a row: sinks, packed tokens segment by segment, buffer."""
    parts = []
    for segment in layer.packed.segments() if layer.packed is not None else []:
        exact = torch.float64
        pair = (
            (segment.key, segment.value)
            if isinstance(segment, KVSegment)
            else reference.dequantize_kv(segment, exact)
        )
        parts.append([x[row, : int(segment.lens[row])] for x in pair])
    valid = slice(layer.starts[row], layer.ends[row])
    parts.append([layer.key_storage[row, valid], layer.value_storage[row, valid]])
    key, value = (torch.cat([part[i].double() for part in parts]).transpose(0, 1) for i in (0, 1))
    return key, value


def read_prompt(model: Any, plan: lightvlm.Plan, rows: Any) -> tuple[Any, Any, Any]:
    inputs = prompt(LLAVA, rows)
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        out = model(**inputs)
    return run, out, inputs


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("reduce", [False, True])
def test_a_prompt_is_packed_between_sinks_and_recent_tokens(model: Any, bits: int, reduce: bool) -> None:
    prefill = lightvlm_plan().prefill if reduce else None
    run, out, _ = read_prompt(model, plan_of(prefill, bits=bits), LONG)
    cache = out.past_key_values
    for b, row in enumerate(LONG):
        slow = SlowDecoder(model, slow_options(prefill) if reduce else None)
        slow.read(LLAVA.batch([row]))
        for layer, keys, values in zip(cache.layers, slow.keys, slow.values, strict=True):
            key, value = content(layer, b)
            assert key.shape == keys.shape
            tokens = keys.shape[1]
            assert layer.packed.counts[b] == tokens - 6
            ends = torch.tensor([*range(2), *range(tokens - 6, tokens)])
            assert (key[:, ends] - keys[:, ends]).abs().max() <= 1e-4
            assert (value[:, ends] - values[:, ends]).abs().max() <= 1e-4
            middle = keys[:, 2 : tokens - 6]
            step = (middle.amax(1) - middle.amin(1)) / (2**bits - 1)
            assert ((key[:, 2 : tokens - 6] - middle).abs() <= step[:, None] / 2 + 1e-4).all()
    report = run.report()
    assert report.kv_bytes_used < report.kv_bytes_full
    assert report.kv_bytes_allocated == bytes_alive(cache)
    assert report.op_calls["quantize_kv"] == DEPTH


def check_steps(model: Any, plan: lightvlm.Plan, rows: Any, steps: int, slow: Any = SlowDecoder) -> Any:
    """Logits are those of a slow model whose cache holds what ours holds: two of 16 steps, and the last."""
    inputs = prompt(LLAVA, rows)
    limit = 4 * noise(model, LLAVA, rows) + 1e-5
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        out = model(**inputs)
        cache, mask = out.past_key_values, inputs["attention_mask"]
        slows = [slow(model) for _ in rows]
        for one, row in zip(slows, rows, strict=True):
            one.read(LLAVA.batch([row]))
        for step in range(steps):
            tokens = torch.tensor([[10 + (step + 3 * b) % 40] for b in range(len(rows))])
            asked = step % 16 in (0, 1) or step + 1 == steps
            for b, one in enumerate(slows if asked else []):
                one.keys, one.values = map(
                    list, zip(*[content(layer, b) for layer in cache.layers], strict=True)
                )
            out, mask = extend(LLAVA, model, mask, tokens, past_key_values=cache)
            for b, one in enumerate(slows):
                if asked:
                    assert (out.logits[b, 0] - one.step(int(tokens[b]))).abs().max() <= limit
                else:
                    one.next_position, one.seen = one.next_position + 1, one.seen + 1
    return run, cache


def test_attention_over_what_is_stored(model: Any) -> None:
    """Past two packings of generated tokens; rows of different length."""
    run, cache = check_steps(model, plan_of(interval=64), LONG, 140, lambda model: SlowDecoder(model, None))
    for layer in cache.layers:
        assert [end - start for start, end in zip(layer.starts, layer.ends, strict=True)] == [
            6 + 140 - 128
        ] * 2
        assert layer.packed.generated[4].used == 128
    assert run.report().op_calls["decode_attention"] == 140 * DEPTH
    assert cache.get_seq_length() == LLAVA.batch(LONG)["input_ids"].shape[1] + 140


def test_zipvl_stores_what_attended_in_more_bits(model: Any) -> None:
    plan = plan_of(ZIPVL, low_bits=2, interval=64)
    _, out, _ = read_prompt(model, plan, LONG)
    for b, row in enumerate(LONG):
        slow = SlowZipVL(model, ZIPVL)
        slow.read(LLAVA.batch([row]))
        tokens = slow.keys[0].shape[1]
        for index, layer in enumerate(out.past_key_values.layers):
            middle = [i for i in slow.attending[index] if 2 <= i < tokens - 6]
            high = [one.packed for one in layer.packed.prompt if one.packed.bits == 4]
            assert sum(int(one.lens[b]) for one in high) == len(middle)
            low = [one.packed for one in layer.packed.prompt if one.packed.bits == 2]
            assert sum(int(one.lens[b]) for one in low) == tokens - 8 - len(middle)
    _, cache = check_steps(model, plan, LONG, 70, lambda model: SlowZipVL(model, ZIPVL))
    assert sum(one.used for one in cache.layers[0].packed.generated.values()) == 64


def test_generated_tokens_are_told_apart_by_the_last_query(model: Any) -> None:
    """Blocks of 64: with an interval of 128, one for those with the most attention, one for the others."""
    plan = plan_of(ZIPVL, low_bits=2, interval=128, tau=0.3)
    _, cache = check_steps(model, plan, LONG[:1], 6 + 128 - 5, lambda model: SlowZipVL(model, ZIPVL))
    for layer in cache.layers:
        assert {bits: one.used for bits, one in layer.packed.generated.items()} == {4: 64, 2: 64}


def test_first_and_last_layers_in_other_bits(model: Any) -> None:
    _, out, _ = read_prompt(model, plan_of(edge_bits=8, bits=2), LONG)
    bits = [layer.packed.prompt[0].packed.bits for layer in out.past_key_values.layers]
    assert bits == [8, *[2] * (DEPTH - 2), 8]
    _, out, _ = read_prompt(model, plan_of(edge_bits=16, edge_layers=2), LONG)
    assert [layer.packed is None for layer in out.past_key_values.layers] == [True] * 2 + [False] + [True] * 2
    check_steps(model, plan_of(edge_bits=16), LONG, 72, lambda model: SlowDecoder(model, None))


@pytest.mark.parametrize(
    "prefill", [None, ZIPVL, lightvlm_plan().prefill], ids=["whole", "zipvl", "lightvlm"]
)
def test_batches_are_as_their_rows(model: Any, prefill: Any) -> None:
    plan = plan_of(prefill, low_bits=2 if prefill is ZIPVL else None)
    rows = [*ROWS, *LONG]
    with lightvlm.attach(model, plan) as run:
        together = generate(model, LLAVA.batch(rows), 12)
        alone = [generate(model, LLAVA.batch([row]), 12)[0] for row in rows]
    assert torch.equal(together, torch.stack(alone))
    assert run.report().stepped_aside == {}


@pytest.mark.parametrize("new", [3, 12])
def test_several_new_tokens_at_once(model: Any, new: int) -> None:
    """A second question, or drafts: one by one, or over the cache unpacked for the moment."""
    plan, limit = plan_of(), 4 * noise(model, LLAVA, LONG) + 1e-5
    inputs = prompt(LLAVA, LONG)
    question = torch.arange(20, 20 + 2 * new).reshape(2, new)
    with torch.no_grad(), lightvlm.attach(model, plan):
        out = model(**inputs)
        cache = out.past_key_values
        stored = [[content(layer, b) for layer in cache.layers] for b in range(2)]
        out, _ = extend(LLAVA, model, inputs["attention_mask"], question, past_key_values=cache)
    for b, row in enumerate(LONG):
        slow = SlowDecoder(model, None)
        slow.read(LLAVA.batch([row]))
        slow.keys, slow.values = map(list, zip(*stored[b], strict=True))
        assert (out.logits[b] - slow.extend({"input_ids": question[b : b + 1]})).abs().max() <= limit


def test_beams(model: Any) -> None:
    """Rows that change places take their packed tokens along."""
    options = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    with lightvlm.attach(model, plan_of(bits=8)):
        together = model.generate(**LLAVA.batch(LONG), **options)[:, -10:]
        alone = [model.generate(**LLAVA.batch([row]), **options)[0, -10:] for row in LONG]
    assert torch.equal(together, torch.stack(alone))


def test_crop(model: Any) -> None:
    inputs = prompt(LLAVA, LONG)
    with torch.no_grad(), lightvlm.attach(model, plan_of()):
        cache = model(**inputs).past_key_values
        mask = inputs["attention_mask"]
        first, _ = extend(LLAVA, model, mask, torch.tensor([[20], [21]]), past_key_values=cache)
        cache.crop(-1)
        again, _ = extend(LLAVA, model, mask, torch.tensor([[20], [21]]), past_key_values=cache)
    assert torch.equal(first.logits, again.logits)
    with pytest.raises(ValueError, match="cannot crop 8 tokens: only the last 7 are all still in the cache"):
        cache.crop(-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    """A packed cache and a low precision cost together what they cost alone, in logits of the same tokens."""
    model, exact = LLAVA.build(dtype, head_dim=32), LLAVA.build(head_dim=32)
    tokens = torch.arange(20, 28).reshape(2, 4)

    def logits(of: Any, dtype: torch.dtype) -> Tensor:
        inputs = prompt(LLAVA, LONG, dtype)
        with torch.no_grad():
            out, mask, found = of(**inputs), inputs["attention_mask"], []
            for at in range(4):
                cache = out.past_key_values
                out, mask = extend(LLAVA, of, mask, tokens[:, at : at + 1], past_key_values=cache)
                found.append(out.logits.float())
        return torch.cat(found, dim=1)

    wanted, full = logits(exact, torch.float32), logits(model, dtype)
    with lightvlm.attach(model, plan_of(bits=8)):
        found = logits(model, dtype)
    with lightvlm.attach(exact, plan_of(bits=8)):
        packed = logits(exact, torch.float32)
    alone = (full - wanted).abs().max() + (packed - wanted).abs().max()
    assert (found - wanted).abs().max() <= 2 * alone


def test_short_prompts_stay_as_they_are(model: Any) -> None:
    inputs = LLAVA.batch([[1, 2, 3]])
    full = generate(model, inputs, 5)
    with lightvlm.attach(model, plan_of()) as run:
        assert torch.equal(generate(model, inputs, 5), full)
    assert "quantize_kv" not in run.report().op_calls


def bad_plans() -> Iterator[Any]:
    build = LLAVA.build
    yield (
        build,
        plan_of(),
        "model has heads of 8 channels; a packed cache needs 32, 64, 80, 96, 128, 192, 256",
    )
    wide = lambda: build(head_dim=32)  # noqa: E731
    yield wide, plan_of(low_bits=2), "plan.precision has low_bits, which needs a prefill part that says"
    drop = ZipVLPrefill(unimportant="drop")
    yield wide, plan_of(drop, low_bits=2), "plan.precision has low_bits, but plan.prefill drops the tokens"
    queries = lightvlm.LightVLM(decode_score="queries").cache
    both = lightvlm.Plan(cache=queries, precision=KVPrecision())
    yield wide, both, "plan.cache must score by the attention added up while decoding"


@pytest.mark.parametrize(("build", "plan", "message"), list(bad_plans()))
def test_refused(build: Any, plan: lightvlm.Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lightvlm.attach(build(), plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 16, "low_bits": 4}, "low_bits needs bits below 16, got bits 16 and low_bits 4"),
        ({"bits": 3}, "bits must be one of 16, 8, 4, 2, got 3"),
        ({"low_bits": 4}, r"low_bits must be below bits \(4\), got 4"),
        ({"interval": 100}, "interval must be a multiple of 64, got 100"),
        ({"tau": 0.0}, r"tau must be in \(0, 1\], got 0.0"),
        ({"recent": 0}, "recent must be at least 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVPrecision(**options)


def test_a_plan_survives_json() -> None:
    plan = plan_of(ZIPVL, low_bits=2)
    assert lightvlm.Plan.from_json(plan.to_json()) == plan


def test_bytes_of_a_long_cache() -> None:
    """Important tokens in 4 bits and 60 % in 2, heads of 128: a fifth of 16 bits at 32k tokens, scales included."""
    key = torch.randn(1, 4096, 1, 128).bfloat16()
    stored = 0
    for bits, share in ((4, 0.4), (2, 0.6)):
        part = key[:, : int(share * 4096)]
        stored += 8 * ops.quantize_kv(part, part, bits=bits).nbytes
    rest = (4 + 64 + 128 + 16) * 2 * 128 * 2
    assert 32768 * 2 * 128 * 2 / (stored + rest) >= 5


@pytest.mark.parametrize("prefill", [None, lightvlm_plan().prefill], ids=["whole", "lightvlm"])
def test_a_prompt_is_never_in_16_bits_in_more_than_one_layer(model: Any, prefill: Any) -> None:
    """Each layer is packed before the next one runs, so that memory peaks with one layer's keys and values."""
    whole: list[list[int]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        cache = run._forward.cache
        filled = [index for index, layer in enumerate(cache.layers) if layer.is_initialized]
        whole.append([index for index in filled if cache.layers[index].packed is None])

    with torch.no_grad(), lightvlm.attach(model, plan_of(prefill)) as run:
        handles = [
            layer.register_forward_pre_hook(look, with_kwargs=True)
            for layer in model.model.language_model.layers
        ]
        model(**prompt(LLAVA, LONG))
        for handle in handles:
            handle.remove()
    assert whole == [[]] * DEPTH


def test_text_may_stay_in_16_bits(model: Any) -> None:
    """Only image tokens are packed; attention over what is stored is as ever."""
    plan = plan_of(lightvlm_plan().prefill, keep_text=True, recent=2)
    _, out, _ = read_prompt(model, plan, LONG)
    for b, row in enumerate(LONG):
        slow = SlowDecoder(model, slow_options(plan.prefill))
        slow.read(LLAVA.batch([row]))
        words = sum(isinstance(item, int) for item in row)
        for index, layer in enumerate(out.past_key_values.layers):
            (packed,) = layer.packed.prompt
            stored = slow.keys[index].shape[1]
            # the first row ends with three words, of which two are recent; its sinks are words as well
            own = words - 2 if b == 0 else words - 1 + 1
            assert layer.packed.sink_counts[b] == own
            assert packed.counts[b] == stored - own - 2
    check_steps(model, plan_of(None, keep_text=True), LONG, 20, lambda model: SlowDecoder(model, None))


@pytest.mark.parametrize("low_bits", [None, 2])
def test_a_cache_outlives_inference_mode(model: Any, low_bits: int | None) -> None:
    """Filled inside of it, gone on with outside: packed, compacted and cropped as ever."""
    prefill = ZIPVL if low_bits else None
    cache_part = DecodeCompaction(keep=0.3, interval=32, sinks=2, recent=6)
    plan = lightvlm.Plan(prefill, cache_part, KVPrecision(low_bits=low_bits, **UNIFORM))
    inputs, found = prompt(LLAVA, LONG), []
    for mode in (torch.inference_mode, torch.no_grad):
        with lightvlm.attach(model, plan):
            with mode():
                out, mask = model(**inputs), inputs["attention_mask"]
                for step in range(70):
                    tokens = torch.tensor([[10 + step % 40], [11]])
                    out, mask = extend(LLAVA, model, mask, tokens, past_key_values=out.past_key_values)
            with torch.no_grad():
                for step in range(70):
                    tokens = torch.tensor([[10 + step % 40], [11]])
                    out, mask = extend(LLAVA, model, mask, tokens, past_key_values=out.past_key_values)
            out.past_key_values.crop(-1)
        found.append(out.logits)
    assert torch.equal(*found)


def test_text_of_a_cache_with_a_plan_of_its_own(model: Any) -> None:
    own = plan_of(keep_text=True, recent=2)
    found = []
    for cache_plan, run_plan in ((own, lightvlm.Plan()), (None, own)):
        cache = CompactCache(model.config, cache_plan)
        with torch.no_grad(), lightvlm.attach(model, run_plan):
            model(**prompt(LLAVA, LONG), past_key_values=cache)
        found.append(cache.layers[0].packed.sink_counts)
    assert found[0] == found[1]
    assert max(found[0]) > 2


def test_packing_a_prompt_is_the_plans_own_work(model: Any) -> None:
    """Ops count by their own time where no block of the method's work is around them."""
    run, _, _ = read_prompt(model, plan_of(), LONG)
    report = run.report()
    assert report.op_calls
    assert report.own_seconds == pytest.approx(sum(report.op_seconds.values()))
