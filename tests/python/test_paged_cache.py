"""PagedCompactCache: what a CompactCache does, in pages; who gets which page, and what happens when there are none."""

from __future__ import annotations

import contextlib
import copy
import gc
from pathlib import Path
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache, KVPages, PagedCompactCache, Plan
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.kv_precision import KVPrecision
from lightvlm.methods.zipvl import ZipVLPrefill
from lightvlm.paged_layer import PagedLayer
from python.slow import SlowDecoder
from python.test_cache import states
from python.test_decode import COMPACTION, plan_of
from python.test_host_reads import counted_reads
from python.test_prefill import ROWS, lightvlm_plan, noise, prompt, slow_options
from python.tiny import DEPTH, LLAVA, QWEN, Family, extend, generate, generate_logits
from torch import Tensor

from lightvlm_ext import OutOfPages

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams-return-two": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "sampled-beams": {"do_sample": True, "top_k": 5, "num_beams": 2},
    "assisted": {"prompt_lookup_num_tokens": 3},
}


def pages_for(model: Any, number: int = 600, page_size: int = 16, **options: Any) -> KVPages:
    return KVPages(model.config, pages=number, page_size=page_size, **options)


def batch_for(family: Family, kind: str) -> dict[str, Tensor]:
    """A padded batch; assisted decoding takes one row, and needs repeats to guess from."""
    return family.batch([[*ROWS[2], 11, 12, 13, 11, 12]] if kind == "assisted" else ROWS)


# -- as a CompactCache


@pytest.mark.parametrize(
    ("dtype", "page_size"), [(torch.float32, 16), (torch.bfloat16, 48), (torch.float32, 256)], ids=str
)
def test_alone_it_is_a_dynamic_cache(family: Family, dtype: torch.dtype, page_size: int) -> None:
    model = family.build(dtype)
    inputs = family.batch(ROWS, dtype)
    expected = generate_logits(model, inputs, 8)[1]
    pages = pages_for(model, page_size=page_size, dtype=dtype)
    cache = PagedCompactCache(model.config, pages=pages)
    assert torch.equal(generate_logits(model, inputs, 8, past_key_values=cache)[1], expected)
    length = inputs["input_ids"].shape[1] + 7
    assert cache.get_seq_length() == length
    assert cache.kv_bytes_used == cache.kv_bytes_full
    assert pages.pages - pages.available == DEPTH * len(ROWS) * -(-length // page_size)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_in_other_kinds_of_generation(model: Any, family: Family, kind: str) -> None:
    inputs, pages, found = batch_for(family, kind), pages_for(model), []
    for cache in (None, PagedCompactCache(model.config, pages=pages)):
        torch.manual_seed(7)
        given = {} if cache is None else {"past_key_values": cache}
        found.append(generate(model, inputs, 24, **KINDS[kind], **given))
    assert torch.equal(*found)


@pytest.mark.parametrize("width", [8, 32], ids=["laid-out", "from-the-pages"])
@pytest.mark.parametrize("plan", ["mass", "queries", "reduced", "nothing"])
@pytest.mark.parametrize("kind", KINDS)
def test_attached_it_is_a_compact_cache(kind: str, plan: str, width: int) -> None:
    """Heads of 32 channels are read from the pages, those of 8 are laid out."""
    model, score = LLAVA.build(head_dim=width), plan if plan in ("mass", "queries") else None
    options: dict[str, Any] = {"keep": 0.2, "interval": 4, "sinks": 1, "recent": 4, "rows": 3, "score": score}
    part = DecodeCompaction(**options) if score else None
    both = Plan(prefill=lightvlm_plan().prefill if plan != "nothing" else None, cache=part)
    pages, inputs, found = pages_for(model), batch_for(LLAVA, kind), []
    with lightvlm.attach(model, both) as run:
        caches = CompactCache(model.config), PagedCompactCache(model.config, pages=pages)
        for cache in caches:
            torch.manual_seed(7)
            found.append(generate(model, inputs, 24, **KINDS[kind], past_key_values=cache))
    assert torch.equal(*found)
    assert [layer.seen for layer in caches[0].layers] == [layer.seen for layer in caches[1].layers]
    if score:
        assert run.report().compactions > 5
        assert [layer.ends for layer in caches[0].layers] == [layer.ends for layer in caches[1].layers]


@pytest.mark.parametrize("name", ["usual", "every-token", "more-rows-than-interval"])
def test_compaction_is_what_it_says(model: Any, family: Family, name: str) -> None:
    """A padded batch against the slow model: every step's logits, and what each layer holds at the end."""
    plan, steps = plan_of(name), 27
    cache = PagedCompactCache(model.config, pages=pages_for(model))
    with lightvlm.attach(model, plan):
        tokens, logits = generate_logits(model, family.batch(ROWS), steps, past_key_values=cache)
    limit = 4 * noise(model, family, ROWS) + 1e-5
    for b, row in enumerate(ROWS):
        slow = SlowDecoder(model, slow_options(plan.prefill), COMPACTION[name])
        expected = [slow.read(family.batch([row]))[-1]]
        expected += [slow.step(token) for token in tokens[b, :-1].tolist()]
        assert (logits[b] - torch.stack(expected)).abs().max() <= limit
        for index, layer in enumerate(cache.layers):
            keys = layer.keys[b, :, layer.starts[b] : layer.ends[b]]
            assert (keys - slow.keys[index]).abs().max() <= limit


def test_no_layer_is_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and compaction read and write the pages themselves."""
    model = LLAVA.build(head_dim=32)

    def refuse(layer: PagedLayer) -> Any:
        raise AssertionError("keys and values were laid out")

    monkeypatch.setattr(PagedLayer, "buffer", refuse)
    cache = PagedCompactCache(model.config, pages=pages_for(model))
    with lightvlm.attach(model, plan_of("usual")) as run:
        generate(model, LLAVA.batch(ROWS), 20, past_key_values=cache)
    report = run.report()
    assert report.op_calls["append_attend_"] == 19 * DEPTH
    assert report.op_calls["compact_paged_kv_"] == report.compactions == 2


def test_sixteen_bits() -> None:
    """As near to fp32 as a cache that is not in pages."""
    token, logits = torch.tensor([[3]] * 4), {}
    for dtype in (torch.float32, torch.bfloat16):
        model = LLAVA.build(dtype, head_dim=32)
        pages, inputs = pages_for(model, dtype=dtype), prompt(LLAVA, ROWS, dtype)
        with torch.no_grad(), lightvlm.attach(model, lightvlm_plan()):
            for cache in (CompactCache(model.config), PagedCompactCache(model.config, pages=pages)):
                model(**inputs, past_key_values=cache)
                out, _ = extend(LLAVA, model, inputs["attention_mask"], token, past_key_values=cache)
                logits[dtype, type(cache)] = out.logits.float()
    exact = logits[torch.float32, CompactCache]
    dense, paged = (
        (logits[torch.bfloat16, kind] - exact).abs().max() for kind in (CompactCache, PagedCompactCache)
    )
    assert (logits[torch.float32, PagedCompactCache] - exact).abs().max() <= 1e-4
    assert paged <= 1.5 * dense


@pytest.mark.parametrize("name", ["usual", "every-token", "queries"])
def test_a_second_question(model: Any, family: Family, name: str) -> None:
    question = torch.tensor([[21, 22, 23], [24, 25, 26], [27, 28, 29], [30, 31, 32]])
    more = question.repeat(1, 7)  # more than are attended one by one
    inputs, pages = prompt(family, ROWS), pages_for(model)
    with torch.no_grad(), lightvlm.attach(model, plan_of(name)):
        found = []
        for cache in (CompactCache(model.config), PagedCompactCache(model.config, pages=pages)):
            out, mask = model(**inputs, past_key_values=cache), inputs["attention_mask"]
            assert out.past_key_values is cache
            logits = []
            for tokens in (question[:, :1], question, more, question[:, :1]):
                out, mask = extend(family, model, mask, tokens, past_key_values=cache)
                logits.append(out.logits)
            found.append(torch.cat(logits, dim=1))
    assert (found[0] - found[1]).abs().max() <= 1e-4


def test_tokens_that_a_prompt_drops() -> None:
    model = LLAVA.build(head_dim=32)
    plan = Plan(prefill=ZipVLPrefill(tau=0.7, recent_rows=4, random_rows=5, min_tokens=1, unimportant="drop"))
    pages, found = pages_for(model), []
    with lightvlm.attach(model, plan):
        for cache in (CompactCache(model.config), PagedCompactCache(model.config, pages=pages)):
            found.append(generate(model, LLAVA.batch(ROWS), 12, past_key_values=cache))
    assert torch.equal(*found)
    assert cache.kv_bytes_used < cache.kv_bytes_full


def test_no_reads_between_layers(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(prefill=lightvlm_plan().prefill, cache=DecodeCompaction(0.2, 3, 1, 4, 3))
    cache = PagedCompactCache(llava.config, pages=pages_for(llava))
    with lightvlm.attach(llava, plan) as run, counted_reads(llava, monkeypatch) as found:
        generate(llava, LLAVA.batch(ROWS), 20, past_key_values=cache)
    assert run.report().compactions == 6
    assert found == []


# -- off the model that filled it


def test_a_whole_cache_does_without_the_run(model: Any, family: Family) -> None:
    """Padding that was not stored is put back for a model that goes by the mask."""
    rows = [[*ROWS[2], *range(1, 20)], ROWS[1]]  # more than a page of padding
    inputs, token = prompt(family, rows), torch.tensor([[3], [4]])
    cache = PagedCompactCache(model.config, pages=pages_for(model))
    with torch.no_grad():
        plain = model(**inputs).past_key_values
        with lightvlm.attach(model, Plan()):
            model(**inputs, past_key_values=cache)
        padding = inputs["input_ids"].shape[1] - len(ROWS[1])
        assert cache.layers[0].starts == [0, padding % 16]
        mask = inputs["attention_mask"]
        for _ in range(2):
            found, _ = extend(family, model, mask, token, past_key_values=cache)
            expected, mask = extend(family, model, mask, token, past_key_values=plain)
            assert (found.logits - expected.logits).abs().max() <= 1e-4


def test_a_shortened_cache_needs_the_attached_model(llava: Any) -> None:
    inputs, token = prompt(LLAVA, ROWS), torch.tensor([[3]] * 4)
    pages = pages_for(llava)
    cache = PagedCompactCache(llava.config, pages=pages)
    with torch.no_grad():
        with lightvlm.attach(llava, lightvlm_plan()):
            llava(**inputs, past_key_values=cache)
        free = pages.available
        with pytest.raises(ValueError, match="shortened by a plan and only an attached model can read it"):
            extend(LLAVA, llava, inputs["attention_mask"], token, past_key_values=cache)
        assert pages.available == free
        with lightvlm.attach(llava, Plan()):
            extend(LLAVA, llava, inputs["attention_mask"], token, past_key_values=cache)


def test_out_of_inference_mode(llava: Any) -> None:
    """Pages, masses and forks made in inference mode are written outside it."""
    inputs, token = prompt(LLAVA, ROWS), torch.tensor([[3]] * 4)
    with lightvlm.attach(llava, plan_of("every-token")):
        with torch.inference_mode():
            cache = PagedCompactCache(llava.config, pages=pages_for(llava))
            llava(**inputs, past_key_values=cache)
            _, mask = extend(LLAVA, llava, inputs["attention_mask"], token, past_key_values=cache)
            other = cache.fork()
            other.reorder_cache(torch.arange(4))
        with torch.no_grad():
            found = [extend(LLAVA, llava, mask, token, past_key_values=one)[0] for one in (cache, other)]
    assert torch.equal(found[0].logits, found[1].logits)


# -- who has which page


def test_two_requests_share_the_pages(llava: Any) -> None:
    """Token by token in turn, each as it would have been alone; and all pages come back."""
    pages, plan = pages_for(llava, 60), plan_of("every-token")
    requests = [prompt(LLAVA, [ROWS[0]]), prompt(LLAVA, [ROWS[2]])]
    with torch.no_grad(), lightvlm.attach(llava, plan):
        logits: dict[str, list[list[Tensor]]] = {}
        for way in ("alone", "in turn"):
            caches = [
                PagedCompactCache(llava.config, pages=pages)
                if way == "in turn"
                else CompactCache(llava.config)
                for _ in requests
            ]
            masks = [inputs["attention_mask"] for inputs in requests]
            logits[way] = [[], []]
            for inputs, cache in zip(requests, caches, strict=True):
                llava(**inputs, past_key_values=cache)
            for step in range(20):
                for which, cache in enumerate(caches):
                    token = torch.tensor([[3 + (7 * step + which) % 40]])
                    out, masks[which] = extend(LLAVA, llava, masks[which], token, past_key_values=cache)
                    logits[way][which].append(out.logits)
        assert pages.available == 60 - sum(
            len(layer.blocks.ids) for cache in caches for layer in cache.layers
        )
        caches[0].release()
        del caches, cache, out
        assert pages.available == 60
    for alone, in_turn in zip(logits["alone"], logits["in turn"], strict=True):
        assert (torch.cat(alone) - torch.cat(in_turn)).abs().max() <= 1e-4


def test_what_is_freed_is_free_for_others(llava: Any) -> None:
    """Layers born short take fewer pages, a compaction gives pages back, and another request takes them."""
    row = [*ROWS[2], *range(1, 20)]  # 64 tokens
    inputs, pages = prompt(LLAVA, [row]), pages_for(llava, 4 * DEPTH)
    whole = PagedCompactCache(llava.config, pages=pages)
    plan = Plan(cache=DecodeCompaction(keep=0.1, interval=1, sinks=2, recent=10))
    with torch.no_grad():
        llava(**inputs, past_key_values=whole)
        assert pages.available == 0
        whole.release()
        with lightvlm.attach(llava, lightvlm_plan()):
            short = PagedCompactCache(llava.config, pages=pages)
            llava(**inputs, past_key_values=short)
            held = [-(-end // 16) for layer in short.layers for end in layer.ends]
            assert sum(held) < 4 * DEPTH
            assert pages.available == 4 * DEPTH - sum(held)
            short.release()
        with lightvlm.attach(llava, plan):
            first, second = (PagedCompactCache(llava.config, pages=pages) for _ in range(2))
            llava(**inputs, past_key_values=first)
            first.crop(-1)
            extend(LLAVA, llava, inputs["attention_mask"][:, 1:], torch.tensor([[3]]), past_key_values=first)
            assert [layer.ends for layer in first.layers] == [[12]] * DEPTH
            assert pages.available == 3 * DEPTH
            llava(**prompt(LLAVA, [[*range(1, 45)]]), past_key_values=second)
            assert second.get_seq_length() == 44
            assert pages.available == 0


@pytest.mark.parametrize("how", ["fork", "deepcopy"])
def test_a_copy_shares_and_goes_its_own_way(model: Any, family: Family, how: str) -> None:
    inputs, pages = prompt(family, ROWS), pages_for(model)
    tokens = [torch.tensor([[number]] * len(ROWS)) for number in (11, 12)]
    with torch.no_grad(), lightvlm.attach(model, plan_of("every-token")):
        caches, expected = [CompactCache(model.config), CompactCache(model.config)], []
        for cache, token in zip(caches, tokens, strict=True):
            model(**inputs, past_key_values=cache)
            out, mask = extend(family, model, inputs["attention_mask"], token, past_key_values=cache)
            expected += [out.logits, extend(family, model, mask, token, past_key_values=cache)[0].logits]
        first = PagedCompactCache(model.config, pages=pages)
        model(**inputs, past_key_values=first)
        held = pages.pages - pages.available
        second = first.fork() if how == "fork" else copy.deepcopy(first)
        assert pages.pages - pages.available == held
        found = []
        for cache, token in zip((first, second), tokens, strict=True):
            out, mask = extend(family, model, inputs["attention_mask"], token, past_key_values=cache)
            found += [out.logits, extend(family, model, mask, token, past_key_values=cache)[0].logits]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4
    del first, second, cache, out
    gc.collect()
    assert pages.available == pages.pages


def test_only_the_last_page_of_a_shared_prompt_is_copied(llava: Any) -> None:
    inputs, pages = prompt(LLAVA, [ROWS[2]]), pages_for(llava)  # 44 tokens, three pages
    cache = PagedCompactCache(llava.config, pages=pages)
    with torch.no_grad(), lightvlm.attach(llava, Plan()):
        llava(**inputs, past_key_values=cache)
        assert pages.pages - pages.available == 3 * DEPTH
        cache.batch_repeat_interleave(4)
        assert pages.pages - pages.available == 3 * DEPTH
        mask = inputs["attention_mask"].repeat(4, 1)
        tokens = torch.tensor([[11], [12], [13], [14]])
        out, _ = extend(LLAVA, llava, mask, tokens, past_key_values=cache)
        assert pages.pages - pages.available == (2 + 4) * DEPTH
        held = 6 * DEPTH * pages.page_bytes
        assert held < cache.kv_bytes_allocated < held + 1000 < cache.kv_bytes_used
        for b in range(4):
            alone = CompactCache(llava.config)
            llava(**inputs, past_key_values=alone)
            expected, _ = extend(
                LLAVA, llava, inputs["attention_mask"], tokens[b : b + 1], past_key_values=alone
            )
            assert (out.logits[b] - expected.logits[0]).abs().max() <= 1e-4


def test_rows_are_taken_out_of_a_padded_cache(qwen: Any) -> None:
    inputs, tokens = prompt(QWEN, ROWS), torch.tensor([[3], [4], [5], [6]])
    order = torch.tensor([2, 0])
    with torch.no_grad(), lightvlm.attach(qwen, plan_of("every-token")):
        whole = CompactCache(qwen.config)
        part = PagedCompactCache(qwen.config, pages=pages_for(qwen))
        for cache in (whole, part):
            qwen(**inputs, past_key_values=cache)
            _, mask = extend(QWEN, qwen, inputs["attention_mask"], tokens, past_key_values=cache)
        expected, _ = extend(QWEN, qwen, mask, tokens, past_key_values=whole)
        part.batch_select_indices(order)
        qwen.model.rope_deltas = qwen.model.rope_deltas[order]
        found, _ = extend(QWEN, qwen, mask[order], tokens[order], past_key_values=part)
        with pytest.raises(ValueError, match="indices must be rows of the cache, 0 to 1, got 0 to 4"):
            part.batch_select_indices(torch.tensor([0, 4]))
    assert part.leftpad == [whole.leftpad[2], whole.leftpad[0]]
    assert (found.logits - expected.logits[order]).abs().max() <= 1e-4


# -- no pages left


def test_a_prompt_that_does_not_fit(llava: Any) -> None:
    """Four rows of 44 tokens, padding included; an attached model's cache has given up whole pages of padding in the
    layers before, and layers born short need less."""
    inputs = prompt(LLAVA, ROWS)
    with torch.no_grad():
        for plan, number in ((None, 5 * 12 - 1), (Plan(), 4 * 8 + 12 - 1)):
            cache = PagedCompactCache(llava.config, pages=pages_for(llava, number))
            with contextlib.ExitStack() as stack:
                if plan is not None:
                    stack.enter_context(lightvlm.attach(llava, plan))
                with pytest.raises(OutOfPages, match=f"pages: 12 more are needed, 11 of {number} are free"):
                    llava(**inputs, past_key_values=cache)
            assert cache.pages.available == number
            assert (cache.get_seq_length(), cache.kv_bytes_allocated, cache.leftpad) == (0, 0, [])
        with lightvlm.attach(llava, lightvlm_plan()):
            llava(**inputs, past_key_values=cache)
        assert cache.get_seq_length() == 44


def test_a_step_that_does_not_fit(llava: Any) -> None:
    """It changes nothing, and can be taken again when there are pages."""
    inputs, pages = prompt(LLAVA, [ROWS[3]]), pages_for(llava, 4 * DEPTH - 1)
    token = torch.tensor([[3]])
    with torch.no_grad(), lightvlm.attach(llava, Plan()):
        first, second = (PagedCompactCache(llava.config, pages=pages) for _ in range(2))
        mask = inputs["attention_mask"]  # 18 tokens
        llava(**inputs, past_key_values=first)
        other = first.fork()
        before = [(layer.seen, layer.ends, layer.buffer()[0].clone()) for layer in first.layers]
        second.layers[0].update(*(torch.zeros(1, 2, 16 * (2 * DEPTH - 4), 8),) * 2)
        assert pages.available == 3
        with pytest.raises(OutOfPages, match="pages: 5 more are needed, 3 of 19 are free"):
            extend(LLAVA, llava, mask, token, past_key_values=first)
        assert pages.available == 3
        for layer, (seen, ends, keys) in zip(first.layers, before, strict=True):
            assert (layer.seen, layer.ends) == (seen, ends)
            assert torch.equal(layer.buffer()[0], keys)
        second.release()
        found, _ = extend(LLAVA, llava, mask, token, past_key_values=first)
        again, _ = extend(LLAVA, llava, mask, token, past_key_values=other)
        assert torch.equal(found.logits, again.logits)


def test_compaction_makes_room(llava: Any) -> None:
    """Pages for 32 tokens of a layer; sixty are generated, with a compaction whenever the pages are used up."""
    plan = Plan(cache=DecodeCompaction(keep=0.1, interval=1000, sinks=2, recent=8))
    pages = pages_for(llava, 2 * DEPTH)
    cache = PagedCompactCache(llava.config, pages=pages)
    with lightvlm.attach(llava, plan) as run:
        assert generate(llava, LLAVA.batch([[1, 2, 3]]), 60, past_key_values=cache).shape == (1, 60)
    assert cache.get_seq_length() == 62
    assert run.report().compactions == 2
    cache.release()
    without = PagedCompactCache(llava.config, pages=pages)
    with pytest.raises(OutOfPages, match="pages: 5 more are needed, 0 of 10 are free"):
        generate(llava, LLAVA.batch([[1, 2, 3]]), 60, past_key_values=without)


def test_a_compaction_without_pages_for_copies(llava: Any) -> None:
    """Of tokens that another cache has as well; nothing moves, and it can be done later."""
    inputs, pages = prompt(LLAVA, [ROWS[2]]), pages_for(llava, (3 + 1) * DEPTH)
    plan = Plan(cache=DecodeCompaction(keep=0.5, interval=1, sinks=0, recent=2))
    token = torch.tensor([[3]])
    with torch.no_grad(), lightvlm.attach(llava, plan):
        cache = PagedCompactCache(llava.config, pages=pages)
        llava(**inputs, past_key_values=cache)
        kept = cache.fork()
        prefix = [layer.buffer()[0].clone() for layer in kept.layers]
        with pytest.raises(OutOfPages, match="pages: 10 more are needed, 0 of 20 are free"):
            extend(LLAVA, llava, inputs["attention_mask"], token, past_key_values=cache)
        assert [layer.ends for layer in cache.layers] == [[45]] * DEPTH
        for layer, before in zip(kept.layers, prefix, strict=True):
            assert torch.equal(layer.buffer()[0], before)
        kept.release()
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.int64)], dim=1)
        extend(LLAVA, llava, mask, token, past_key_values=cache)
        assert [layer.ends for layer in cache.layers] == [[23]] * DEPTH
        assert pages.available == 2 * DEPTH


# -- one layer


def layer_of(pages: int = 40) -> PagedLayer:
    from transformers import LlamaConfig

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
    return PagedLayer(KVPages(LlamaConfig(hidden_size=8, **heads), pages=pages, page_size=16))


def test_crop() -> None:
    layer = layer_of()
    layer.crop(-1)  # nothing stored, nothing to do
    layer.update(*states(2, 39))
    layer.crop(0)
    layer.crop(-5)
    assert torch.equal(layer.keys, states(2, 34)[0])
    assert layer.pages.available == 40 - 6
    layer.crop(-2)
    assert layer.pages.available == 40 - 4
    layer.update(*states(2, 2, 50))
    assert layer.keys[0, 0, :, 0].tolist() == [*range(32), 50, 51]
    layer.crop(4)  # older transformers: the length that shall be left
    assert torch.equal(layer.values, states(2, 4)[1])
    with pytest.raises(ValueError, match="cannot crop 5 tokens: only the last 4 are all still in the cache"):
        layer.crop(-5)
    layer.crop(-4)
    assert (layer.get_seq_length(), layer.pages.available, layer.keys) == (0, 40, None)
    layer.update(*states(1, 3))
    assert layer.batch_size == 1


def test_crop_into_padding() -> None:
    """A row of which nothing is left begins anew behind its padding."""
    layer = layer_of()
    layer.update(*states(2, 36))
    layer.begin([0, 33], 36, 36, False)
    assert (layer.starts, layer.ends) == ([0, 1], [36, 4])
    layer.crop(-10)
    assert (layer.starts, layer.ends) == ([0, 1], [26, 1])
    layer.update(*states(2, 1, 70))
    assert (layer.starts, layer.ends) == ([0, 1], [27, 2])
    assert layer.keys[:, 0, :, 0].tolist()[1][1] == 170


def test_a_layer_refuses_other_states() -> None:
    layer = layer_of()
    key, value = states(2, 3)
    for bad, message in (
        (
            key.half(),
            "key_states has 2 heads of 4 channels in torch.float16, the cache 2 of 4 in torch.float32",
        ),
        (key[:, :1], "key_states has 1 heads of 4 channels"),
        (key.to("meta"), "key_states is on meta, the pages are on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.update(bad, value)
    assert not layer.is_initialized
    layer.update(key, value)
    with pytest.raises(ValueError, match="key_states has 3 rows, the cache has 2"):
        layer.update(*states(3, 1))
    small = layer_of(3)
    with pytest.raises(OutOfPages, match="pages: 4 more are needed, 3 of 3 are free"):
        small.update(*states(2, 20))
    assert (small.is_initialized, small.pages.available) == (False, 3)


# -- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": "config"}, TypeError, "config must be a configuration of transformers, got str"),
        ({"pages": 0}, ValueError, "pages must be at least 1, got 0"),
        ({"pages": 1.0}, TypeError, "pages must be an int, got float"),
        ({"page_size": 24}, ValueError, "page_size must be a multiple of 16 from 16 to 256, got 24"),
        ({"page_size": 272}, ValueError, "page_size must be a multiple of 16 from 16 to 256, got 272"),
        ({"page_size": True}, TypeError, "page_size must be an int, got bool"),
        ({"dtype": torch.int8}, ValueError, "dtype must be float32, float16 or bfloat16, got torch.int8"),
    ],
)
def test_bad_pages(llava: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"config": llava.config, "pages": 4, **options}
    with pytest.raises(error, match=message):
        KVPages(options.pop("config"), **options)


def test_bad_arguments(llava: Any) -> None:
    wide = LLAVA.build(head_dim=32)
    pages, other = pages_for(llava, 4), pages_for(wide, 4)
    with pytest.raises(TypeError, match=r"pages must be a lightvlm.KVPages, got int"):
        PagedCompactCache(llava.config, pages=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pages hold 2 heads of 32 channels, config says 2 of 8"):
        PagedCompactCache(llava.config, pages=other)
    packing = Plan(precision=KVPrecision(bits=4))
    with pytest.raises(ValueError, match=r"plan.precision packs the cache, and pages hold 16 or 32 bits"):
        PagedCompactCache(wide.config, packing, pages=other)
    cache = PagedCompactCache(wide.config, pages=other)
    with lightvlm.attach(wide, packing), torch.no_grad():
        with pytest.raises(ValueError, match=r"plan.precision packs the cache"):
            wide(**prompt(LLAVA, ROWS), past_key_values=cache)
        assert cache.get_seq_length() == 0
    assert repr(pages) == "KVPages((4, 16, 2, 8), torch.float32, cpu, available=4)"


def test_pages_follow_the_configuration() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, dtype=torch.bfloat16)
    pages = KVPages(config, pages=3)
    assert (pages.page_size, pages.heads, pages.dtype) == (64, (4, 16), torch.bfloat16)
    assert pages.page_bytes == 2 * 64 * 4 * 16 * 2


# -- bytes


def test_bytes(model: Any, family: Family) -> None:
    inputs, pages = prompt(family, ROWS), pages_for(model)
    plan = Plan(prefill=lightvlm_plan().prefill, cache=DecodeCompaction(0.2, 2, 1, 3, 2))
    token = torch.tensor([[3]] * len(ROWS))
    cache = PagedCompactCache(model.config, pages=pages)
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        model(**inputs, past_key_values=cache)
        mask = inputs["attention_mask"]
        for _ in range(3):
            each = 2 * 2 * 8 * 4  # keys and values of two heads of eight numbers of four bytes
            valid = [layer.ends[b] - layer.starts[b] for layer in cache.layers for b in range(len(ROWS))]
            assert cache.kv_bytes_used == each * sum(valid)
            assert cache.kv_bytes_full == each * DEPTH * mask.numel()
            held = pages.pages - pages.available
            others = sum(layer.mass.nbytes + layer.blocks.table_bytes for layer in cache.layers)
            others += sum(bound.nbytes for layer in cache.layers for bound in layer._bounds or ())
            assert cache.kv_bytes_allocated == held * pages.page_bytes + others
            report = run.report()
            bytes_ = (report.kv_bytes_used, report.kv_bytes_allocated, report.kv_bytes_full)
            assert bytes_ == (cache.kv_bytes_used, cache.kv_bytes_allocated, cache.kv_bytes_full)
            _, mask = extend(family, model, mask, token, past_key_values=cache)
    before = cache.kv_bytes_allocated
    cache.shrink()
    assert cache.kv_bytes_allocated < before
    cache.reset()
    assert (cache.kv_bytes_allocated, cache.kv_bytes_used, pages.available) == (0, 0, pages.pages)


# -- files


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        plan_of("every-token"),
        plan_of("queries"),
        lightvlm.LightKV(layers=(1, 2, 3), windows=(1,), positions="renumber", min_image_tokens=0),
    ],
    ids=["whole", "mass", "queries", "renumbered"],
)
@pytest.mark.parametrize("kinds", ["paged-compact", "compact-paged", "paged-paged"])
def test_files(family: Family, model: Any, plan: Plan, kinds: str, tmp_path: Path) -> None:
    """One format for both kinds; the cache read goes on as the one written, padded rows too."""
    written, read = kinds.split("-")
    inputs, pages = prompt(family, ROWS), pages_for(model)
    tokens = [torch.tensor([[number]] * 4) for number in range(3, 13)]
    with torch.no_grad(), lightvlm.attach(model, plan):
        cache = CompactCache(model.config)
        if written == "paged":
            cache = PagedCompactCache(model.config, pages=pages)
        out, mask = model(**inputs, past_key_values=cache), inputs["attention_mask"]
        for token in tokens[:3]:
            out, mask = extend(family, model, mask, token, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        if read == "paged":
            other = PagedCompactCache.load(tmp_path / "cache.safetensors", model.config, pages=pages)
        else:
            other = CompactCache.load(tmp_path / "cache.safetensors", model.config)
        assert (other.kv_bytes_used, other.kv_bytes_full) == (cache.kv_bytes_used, cache.kv_bytes_full)
        masks = [mask, mask]
        for token in tokens[3:]:
            logits = []
            for which, one in enumerate((cache, other)):
                out, masks[which] = extend(family, model, masks[which], token, past_key_values=one)
                logits.append(out.logits)
            assert (logits[0] - logits[1]).abs().max() <= 1e-4
        assert [layer.seen for layer in cache.layers] == [layer.seen for layer in other.layers]
    if plan == Plan():  # and off the model
        with torch.no_grad():
            logits = [
                extend(family, model, masks[0], tokens[0], past_key_values=one)[0].logits
                for one in (cache, other)
            ]
        assert (logits[0] - logits[1]).abs().max() <= 1e-4


def test_files_of_an_unattached_model(llava: Any, tmp_path: Path) -> None:
    """Where padding is, only the mask knows; an empty cache; and what cannot be read."""
    inputs, token, path = prompt(LLAVA, ROWS), torch.tensor([[3]] * 4), tmp_path / "cache.safetensors"
    pages = pages_for(llava)
    cache = PagedCompactCache(llava.config, pages=pages)
    cache.save(path)
    assert PagedCompactCache.load(path, llava.config, pages=pages).get_seq_length() == 0
    with torch.no_grad():
        llava(**inputs, past_key_values=cache)
        cache.save(path)
        other = PagedCompactCache.load(path, llava.config, pages=pages)
        expected, _ = extend(LLAVA, llava, inputs["attention_mask"], token, past_key_values=cache)
        found, _ = extend(LLAVA, llava, inputs["attention_mask"], token, past_key_values=other)
    assert torch.equal(found.logits, expected.logits)
    few = pages_for(llava, 60 - 1)
    with pytest.raises(OutOfPages, match="pages: 60 more are needed, 59 of 59 are free"):
        PagedCompactCache.load(path, llava.config, pages=few)
    assert few.available == 59
    halves = pages_for(llava, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"in torch.float32, the cache 2 of 8 in torch.float16"):
        PagedCompactCache.load(path, llava.config, pages=halves)
    assert halves.available == halves.pages
