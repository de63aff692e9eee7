"""ZipVL's prefill: adaptive sparse attention, against a direct transcription of its equations in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightvlm
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightvlm.flops import attention_flops
from lightvlm.methods.zipvl import ZipVLPrefill
from lightvlm.sparse_attention import pack, selected_attention
from python.slow import SlowDecoder, _finish, _weights
from python.test_prefill import ROWS, noise, prompt
from python.tiny import DEPTH, LLAVA, Family, extend, generate
from torch import Tensor

from lightvlm_ext import ops


class SlowZipVL(SlowDecoder):
    """One row: eager attention matrices, sorting, explicit sums (arXiv 2410.08584 v1, eq. 6 to 9)."""

    def __init__(self, model: Any, part: ZipVLPrefill) -> None:
        super().__init__(model, None)
        self.part = part
        self.attending: list[list[int]] = []

    @torch.no_grad()
    def read(self, inputs: dict[str, Tensor]) -> Tensor:
        ids = inputs["input_ids"][0]
        hidden, _ = self._embed(inputs)
        positions = self._positions(inputs)
        self.seen, self.next_position = len(ids), int(positions.max()) + 1
        for index, layer in enumerate(self.layers):
            query, key, value = self._project(layer, hidden, positions)
            weights = _weights(query, key, layer.self_attn.scaling)
            full = index < self.part.full_layers
            chosen = list(range(len(ids))) if full else self._important(weights.mean(dim=0))
            self.attending.append(chosen)
            among = _weights(query[:, chosen], key[:, chosen], layer.self_attn.scaling)
            spread = torch.zeros_like(weights)
            for row, token in enumerate(chosen):
                spread[:, token, chosen] = among[:, row]
            hidden = _finish(layer, hidden, spread, value)
            kept = chosen if self.part.unimportant == "drop" else list(range(len(ids)))
            self.keys.append(key[:, kept])
            self.values.append(value[:, kept])
        return self._logits(hidden)

    def _important(self, weights: Tensor) -> list[int]:
        size = len(weights)
        rows = self.part.probe_rows(size)
        sums = [sum(float(weights[row, token]) for row in rows) for token in range(size)]
        count, mass = 0, 0.0
        if self.part.tau == 1:
            return list(range(size))
        for token in sorted(range(size), key=lambda i: (-sums[i], i)):
            if mass >= self.part.tau * sum(sums):
                break
            count, mass = count + 1, mass + sums[token]
        visible = [sum(row >= token for row in rows) for token in range(size)]
        each = [sums[i] / max(1, visible[i]) for i in range(size)]
        others = sorted(range(size - 1), key=lambda i: (-each[i], i))
        return sorted({*others[:count], size - 1})


def plan(**options: Any) -> lightvlm.Plan:
    options = {"tau": 0.8, "recent_rows": 4, "random_rows": 5, "full_layers": 0, "min_tokens": 1, **options}
    return lightvlm.Plan(prefill=ZipVLPrefill(**options))


@pytest.mark.parametrize(
    "options",
    [{}, {"tau": 0.5, "random_rows": 0}, {"tau": 0.97, "recent_rows": 64}, {"full_layers": 2}],
    ids=str,
)
def test_it_is_what_it_says(model: Any, family: Family, options: dict[str, Any]) -> None:
    inputs = prompt(family, ROWS)
    with torch.no_grad(), lightvlm.attach(model, plan(**options)) as run:
        logits = model(**inputs).logits
    report = run.report()
    limit = 4 * noise(model, family, ROWS) + 1e-5
    slow = [SlowZipVL(model, run.plan.prefill) for _ in ROWS]
    for row, one, found in zip(ROWS, slow, logits, strict=True):
        expected = one.read(family.batch([row]))
        assert (found[-len(expected) :] - expected).abs().max() <= limit
    tokens = [sum(1 if isinstance(item, int) else item.tokens for item in row) for row in ROWS]
    counts = [[len(one.attending[layer]) for one in slow] for layer in range(DEPTH)]
    assert report.attending_share == [sum(layer) / sum(tokens) for layer in counts]
    spent = sum(attention_flops(1, count) for layer in counts for count in layer)
    assert report.attention_flops_share == pytest.approx(
        spent / (DEPTH * sum(attention_flops(1, count) for count in tokens))
    )
    assert report.flops_share < 1
    assert report.stepped_aside == {}
    assert report.op_calls["importance"] == DEPTH - options.get("full_layers", 0)
    assert "tokens that attend" in str(report)


def test_everything_attends(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    with torch.no_grad():
        expected = model(**inputs).logits
        with lightvlm.attach(model, plan(tau=1.0)) as run:
            found = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    assert (found - expected)[valid].abs().max() <= 4 * noise(model, family, ROWS) + 1e-5
    assert run.report().attention_flops_share == 1.0
    assert run.report().flops_share == 1.0


@pytest.mark.parametrize("unimportant", ["keep", "drop"])
def test_batches_are_as_their_rows(model: Any, family: Family, unimportant: str) -> None:
    with lightvlm.attach(model, plan(unimportant=unimportant)):
        together = generate(model, family.batch(ROWS), 8)
        alone = [generate(model, family.batch([row]), 8)[0] for row in ROWS]
    assert torch.equal(together, torch.stack(alone))


def test_dropped_keys_are_gone(model: Any, family: Family) -> None:
    """Version 2: more tokens see what attended in the prompt, and nothing else of it; memory falls."""
    inputs = prompt(family, ROWS)
    question = torch.tensor([[21, 22], [24, 25], [27, 28], [30, 31]])
    forgetful = dataclasses.replace(plan(unimportant="drop"), keep_for_later="drop")
    with torch.no_grad(), lightvlm.attach(model, forgetful) as run:
        out = model(**inputs)
        cache, mask = out.past_key_values, inputs["attention_mask"]
        found = []
        for tokens in (question[:, :1], question):
            out, mask = extend(family, model, mask, tokens, past_key_values=cache)
            found.append(out.logits)
    limit = 4 * noise(model, family, ROWS) + 1e-5
    kept = 0
    for b, row in enumerate(ROWS):
        slow = SlowZipVL(model, run.plan.prefill)
        slow.read(family.batch([row]))
        kept += sum(key.shape[1] for key in slow.keys)
        expected = [slow.extend({"input_ids": tokens[b : b + 1]}) for tokens in (question[:, :1], question)]
        assert (torch.cat(found, dim=1)[b] - torch.cat(expected)).abs().max() <= limit
    per_token = cache.kv_bytes_used / (kept + 3 * len(ROWS) * DEPTH)
    assert per_token == 2 * 4 * cache.layers[0].key_storage.shape[2] * cache.layers[0].key_storage.shape[3]
    assert cache.kv_bytes_used < cache.kv_bytes_full
    with pytest.raises(ValueError, match="cannot crop 9 tokens"):
        cache.crop(-9)


def test_low_precision(family: Family) -> None:
    """In bf16 a prompt is read without a NaN and near the baseline where all attends."""
    model = family.build(torch.bfloat16)
    inputs = prompt(family, ROWS, torch.bfloat16)
    with torch.no_grad():
        full = model(**inputs).logits.float()
        with lightvlm.attach(model, plan(tau=1.0)):
            everything = model(**inputs).logits.float()
        with lightvlm.attach(model, plan()):
            assert model(**inputs).logits.isfinite().all()
    valid = inputs["attention_mask"].bool()
    exact = family.build()
    with torch.no_grad():
        wanted = exact(**prompt(family, ROWS)).logits
    assert (everything - wanted)[valid].abs().max() <= 2 * (full - wanted)[valid].abs().max()


def test_steps_aside() -> None:
    model = LLAVA.build()
    inputs = LLAVA.batch(ROWS)
    full = generate(model, inputs, 3)
    with lightvlm.attach(model, plan(min_tokens=100)) as run:
        assert torch.equal(generate(model, inputs, 3), full)
    assert run.report().stepped_aside == {"fewer than min_tokens (100) tokens, or none in a row": 1}
    assert run.report().attending_share == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, r"tau must be in \(0, 1\], got 0.0"),
        ({"tau": 1.01}, ValueError, r"tau must be in \(0, 1\], got 1.01"),
        ({"tau": "high"}, TypeError, "tau must be float or int, got 'high'"),
        ({"recent_rows": 0}, ValueError, "recent_rows must be at least 1, got 0"),
        ({"unimportant": "forget"}, ValueError, "unimportant must be one of 'keep', 'drop', got 'forget'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ZipVLPrefill(**options)


def test_a_plan_survives_json() -> None:
    wanted = plan(unimportant="drop")
    assert lightvlm.Plan.from_json(wanted.to_json()) == wanted


def test_the_papers_arithmetic() -> None:
    """42.1 % of the tokens attending cut attention by 82.3 % (table of Video-MME, 128 frames)."""
    tokens = 100_000
    assert 1 - attention_flops(1, round(0.421 * tokens)) / attention_flops(1, tokens) == pytest.approx(
        0.823, abs=5e-4
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 20))
def test_packing(seed: int, batch: int, length: int) -> None:
    """What a GPU does with packed rows is what a CPU does row by row: the lists say where to find the tokens."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, length, generator=generator)
    keep = torch.randint(0, length + 1, (batch,), generator=generator, dtype=torch.int32)
    chosen = ops.select(scores, keep=keep, capacity=length)
    packed = pack(chosen)
    flat = [b * length + int(i) for b in range(batch) for i in chosen.index[b, : int(chosen.count[b])]]
    assert packed.places[0, : len(flat)].tolist() == flat
    assert (packed.places[0, len(flat) :] == -1).all()
    assert packed.total.tolist() == [len(flat)]
    assert packed.ends.tolist() == [0, *chosen.count.cumsum(0).tolist()]
    for b in range(batch):
        for token in range(length):
            slot = int(packed.slots[b, token])
            assert (flat[slot] == b * length + token) if slot >= 0 else (b * length + token not in flat)


def test_selected_attention_is_causal_attention_among_the_selected() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 9, 4, 8, generator=generator)
    key, value = torch.randn(2, 2, 9, 2, 8, generator=generator)
    chosen = ops.select(torch.rand(2, 9, generator=generator), keep=torch.tensor([4, 0]).int(), capacity=9)
    out = selected_attention(query, key, value, chosen, 0.3)
    tokens = chosen.index[0, :4].tolist()
    for token in range(9):
        for head in range(4):
            expected = torch.zeros(8)
            if token in tokens:
                seen = [other for other in tokens if other <= token]
                weights = (0.3 * key[0, seen, head // 2] @ query[0, token, head]).softmax(0)
                expected = weights @ value[0, seen, head // 2]
            assert torch.allclose(out[0, token, head], expected, atol=1e-6)
    assert not out[1].any()
