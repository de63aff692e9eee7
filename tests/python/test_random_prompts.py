"""Random prompts, plans and decoding policies: a batch gives what its rows give, and the slow model what both do."""

from __future__ import annotations

from typing import Any

import lightvlm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.methods.lightvlm import LightVLMPrefill
from lightvlm.methods.random import RandomPrefill
from python.slow import SlowDecoder
from python.test_prefill import noise, slow_options
from python.tiny import LLAVA, QWEN, Family, Image, generate, generate_logits

WORDS = st.lists(st.integers(1, 50), min_size=1, max_size=6)
SHARES = st.sampled_from([0.05, 0.2, 0.5, 0.9])
LAYERS = st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True).map(
    lambda found: tuple(sorted(found))
)


def prompts(family: Family) -> Any:
    """Batches of which a row at least has an image. None ends with one: what follows it is placed otherwise in
    Qwen's generate(), as are padded batches of text alone in that of older transformers."""
    sides = st.integers(1, 5) if family is QWEN else st.just(4)
    images = st.builds(Image, st.integers(0, 9), sides, sides)
    parts = st.lists(st.tuples(WORDS, images), max_size=3)
    row = st.builds(
        lambda parts, end: [x for words, image in parts for x in (*words, image)] + end, parts, WORDS
    )
    rows = st.lists(row, min_size=1, max_size=4)
    return rows.filter(lambda rows: any(isinstance(item, Image) for row in rows for item in row))


REDUCTIONS = st.one_of(
    st.builds(
        LightVLMPrefill,
        keep=SHARES,
        layers=LAYERS,
        probe_rows=st.sampled_from(["text", "last"]),
        probe_limit=st.sampled_from([1, 3, 64]),
        over_rows=st.sampled_from(["mean", "max"]),
        over_heads=st.sampled_from(["mean", "max"]),
        selection=st.sampled_from(["diverse", "top"]),
        strength=st.sampled_from([0.0, 0.3, 1.0]),
        merge=st.sampled_from(["uniform", "score", "drop"]),
        min_image_tokens=st.sampled_from([0, 17]),
    ),
    st.builds(
        RandomPrefill,
        keep=SHARES,
        layers=LAYERS,
        merge=st.sampled_from(["drop", "uniform"]),
        seed=st.integers(0, 9),
        min_image_tokens=st.just(0),
    ),
)
POLICIES = st.builds(
    DecodeCompaction,
    keep=SHARES,
    interval=st.integers(1, 6),
    sinks=st.integers(0, 3),
    recent=st.integers(1, 8),
    rows=st.integers(1, 9),
)


def check(model: Any, family: Family, rows: Any, plan: lightvlm.Plan, steps: int) -> None:
    with lightvlm.attach(model, plan):
        tokens, logits = generate_logits(model, family.batch(rows), steps)
        alone = [generate(model, family.batch([row]), steps)[0] for row in rows]
    assert torch.equal(tokens, torch.stack(alone))
    limit = 6 * noise(model, family, rows) + 2e-5
    policy = None if plan.cache is None else plan.cache.to_dict()
    for b, row in enumerate(rows):
        size = sum(item.tokens for item in row if isinstance(item, Image))
        reduced = plan.prefill is not None and size >= plan.prefill.min_image_tokens
        slow = SlowDecoder(model, slow_options(plan.prefill) if reduced else None, policy)
        expected = [slow.read(family.batch([row]))[-1]]
        expected += [slow.step(token) for token in tokens[b, :-1].tolist()]
        assert (logits[b] - torch.stack(expected)).abs().max() <= limit


MODELS: dict[str, Any] = {}


def _model(family: Family) -> Any:
    if family.name not in MODELS:
        MODELS[family.name] = family.build()
    return MODELS[family.name]


@settings(max_examples=12)
@given(prompts(LLAVA), REDUCTIONS, st.none() | POLICIES, st.integers(2, 12))
def test_llava(rows: Any, prefill: Any, policy: Any, steps: int) -> None:
    check(_model(LLAVA), LLAVA, rows, lightvlm.Plan(prefill=prefill, cache=policy), steps)


@settings(max_examples=12)
@given(prompts(QWEN), REDUCTIONS, st.none() | POLICIES, st.integers(2, 12))
def test_qwen(rows: Any, prefill: Any, policy: Any, steps: int) -> None:
    check(_model(QWEN), QWEN, rows, lightvlm.Plan(prefill=prefill, cache=policy), steps)
