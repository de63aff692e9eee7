"""KL of a plan's next-token distributions: zero where nothing changes, more with fewer bits, a batch like its rows."""

from __future__ import annotations

import json
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import kl
from lightvlm.methods.kv_precision import KVPrecision
from lightvlm.methods.zipvl import ZipVLPrefill
from python.test_prefill import ROWS, lightvlm_plan, prompt
from python.tiny import LLAVA, QWEN, Family, Image, extend, generate, generate_logits

LONG = [[1, 2, *(Image(seed) for seed in range(6)), 3, 4, 5], [7, *(Image(seed) for seed in range(3, 8)), 9]]
COMPACTION = lightvlm.LightVLM(keep=1.0, decode_keep=0.2, decode_interval=3, decode_recent=5, decode_sinks=1)


def bits(number: int) -> lightvlm.Plan:
    return lightvlm.Plan(precision=KVPrecision(bits=number, sinks=2, recent=6, interval=64))


@pytest.fixture(scope="module")
def wide() -> Any:
    """Heads of 32 channels, which a packed cache needs."""
    return LLAVA.build(head_dim=32)


def test_a_plan_that_changes_nothing_is_at_zero(model: Any, family: Family) -> None:
    """The model's own attention runs, so that every logit is the same bit for bit."""
    plans = {"nothing": lightvlm.Plan(), "keep all": lightvlm.LightVLM(keep=1.0, decode_keep=None)}
    found = lightvlm.divergence(model, family.batch(ROWS), plans, new_tokens=5)
    assert list(found) == list(plans)
    for one in found.values():
        assert (one.mean, one.max, one.agreement, one.tokens) == (0.0, 0.0, 1.0, 5 * len(ROWS))
        assert one.rows == [0.0] * len(ROWS)


def test_our_attention_is_near_zero(wide: Any) -> None:
    """All tokens attend and none is dropped, but ours is the attention of the prompt and over the cache."""
    plan = lightvlm.Plan(prefill=ZipVLPrefill(tau=1.0, unimportant="drop", min_tokens=1))
    found = lightvlm.divergence(wide, LLAVA.batch(LONG), plan, new_tokens=6)
    assert 0.0 <= found.max <= 1e-7
    assert found.agreement == 1.0


def test_it_is_what_the_definition_says(model: Any, family: Family) -> None:
    """Step by step through forward(), along the full model's tokens, in float64."""
    inputs, plan = family.batch(ROWS), lightvlm_plan()
    tokens, full = generate_logits(model, inputs, 4)
    logits = []
    with torch.no_grad(), lightvlm.attach(model, plan):
        out, mask = model(**prompt(family, ROWS)), inputs["attention_mask"]
        logits.append(out.logits[:, -1])
        for at in range(3):
            cache = out.past_key_values
            out, mask = extend(family, model, mask, tokens[:, at : at + 1], past_key_values=cache)
            logits.append(out.logits[:, -1])
    p = full.double().softmax(-1)
    q = torch.stack(logits, dim=1).double().softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    found = lightvlm.divergence(model, inputs, plan, new_tokens=4)
    assert found.mean == pytest.approx(float(each.mean()), rel=1e-4)
    assert found.max == pytest.approx(float(each.max()), rel=1e-4)
    assert found.rows == pytest.approx(each.mean(1).tolist(), rel=1e-4)
    assert found.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.mean > 1e-4


def test_fewer_bits_cost_more(wide: Any) -> None:
    plans = {str(number): bits(number) for number in (8, 4, 2)}
    found = lightvlm.divergence(wide, LLAVA.batch(LONG), plans, new_tokens=12)
    assert 0.0 < found["8"].mean < found["4"].mean < found["2"].mean
    assert found["8"].agreement >= found["2"].agreement


def test_a_batch_is_as_its_rows(wide: Any) -> None:
    """Rows are padded to the longest; each has its own mean."""
    for plan in (bits(4), COMPACTION):
        together = lightvlm.divergence(wide, LLAVA.batch(LONG), plan, new_tokens=8)
        alone = [lightvlm.divergence(wide, LLAVA.batch([row]), plan, new_tokens=8) for row in LONG]
        assert together.rows == pytest.approx([one.mean for one in alone], rel=1e-2, abs=1e-9)
        assert together.tokens == sum(one.tokens for one in alone)
        assert together.mean == pytest.approx(sum(together.rows) / len(LONG))


def test_a_row_counts_up_to_its_end(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token counts, what follows does not; plans differ from the full model in every token here."""
    inputs = LLAVA.batch(ROWS)
    answers = generate(llava, inputs, 8).tolist()
    end = answers[0][2]
    monkeypatch.setattr(llava.generation_config, "eos_token_id", end)
    lengths = [row.index(end) + 1 if end in row else 8 for row in answers]
    found = lightvlm.divergence(llava, inputs, lightvlm_plan(), new_tokens=8)
    assert found.tokens == sum(lengths) < 8 * len(ROWS)
    weighted = sum(mean * length for mean, length in zip(found.rows, lengths, strict=True))
    assert found.mean == pytest.approx(weighted / found.tokens)


def test_the_model_s_logits_count_and_not_what_generate_makes_of_them(
    llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = LLAVA.batch(ROWS)
    plain = lightvlm.divergence(llava, inputs, lightvlm_plan(), new_tokens=1)
    monkeypatch.setattr(llava.generation_config, "repetition_penalty", 5.0)
    assert lightvlm.divergence(llava, inputs, lightvlm_plan(), new_tokens=1) == plain


def test_tokens_that_cannot_come_add_nothing() -> None:
    full = torch.tensor([[0.0, 1.0, -torch.inf]])
    other = torch.tensor([[0.0, 1.0, 3.0]])
    rest = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64).softmax(-1)[0, :2].sum()
    assert float(kl.kl_divergence(full, other)) == pytest.approx(float(-rest.log()))
    assert float(kl.kl_divergence(other, other)) == 0.0


def test_of_a_run(wide: Any) -> None:
    inputs = LLAVA.batch(LONG)
    with lightvlm.attach(wide, bits(2)) as run:
        assert run.report().kl is None
        assert "KL" not in str(run.report())
        out = wide(**inputs)
        before = run.report().to_dict()
        found = run.divergence(inputs, new_tokens=6)
        assert run.attached
        report = run.report()
        assert report.to_dict() == before | {"kl": report.kl}
        assert report.kl == {
            "mean": found.mean, "max": found.max, "agreement": found.agreement, "tokens": 12,
        }  # fmt: skip
        text = next(line for line in str(report).splitlines() if line.startswith("KL from the full model"))
        assert f"{found.mean:.3g} nats" in text
        assert "of 12 tokens" in text
        # a cache from before goes on
        with torch.no_grad():
            mask, cache = inputs["attention_mask"], out.past_key_values
            extend(LLAVA, wide, mask, torch.tensor([[20], [21]]), past_key_values=cache)
        assert run.report().op_calls["decode_attention"] == wide.config.text_config.num_hidden_layers
    assert found == lightvlm.divergence(wide, inputs, bits(2), new_tokens=6)
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="the run is detached"):
        run.divergence(inputs)


def test_a_run_is_back_on_after_an_error(llava: Any) -> None:
    with lightvlm.attach(llava, lightvlm_plan()) as run:
        with pytest.raises(ValueError, match="new_tokens must be at least 1, got 0"):
            run.divergence(LLAVA.batch(ROWS), new_tokens=0)
        assert run.attached
        generate(llava, LLAVA.batch(ROWS), 2)
    assert run.report().prefills == len(ROWS)


def test_positions_of_a_cache_in_use_stay(qwen: Any) -> None:
    generate(qwen, QWEN.batch([[1, Image(0, 2, 6), 2]]), 1)
    deltas = qwen.model.rope_deltas.clone()
    lightvlm.divergence(qwen, QWEN.batch([[1, Image(0, 6, 6), 2]]), lightvlm_plan(), new_tokens=2)
    assert torch.equal(qwen.model.rope_deltas, deltas)


def test_it_says_what_stepped_aside(llava: Any) -> None:
    found = lightvlm.divergence(
        llava, LLAVA.batch(ROWS), lightvlm.LightVLM(min_image_tokens=500), new_tokens=2
    )
    assert found.mean == 0.0
    assert found.stepped_aside == {"fewer than min_image_tokens (500) image tokens": 1}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"new_tokens": 0}, ValueError, "new_tokens must be at least 1, got 0"),
        ({"new_tokens": 2.5}, TypeError, "new_tokens must be an int, got float"),
        ({"plans": None}, TypeError, "plans must be a lightvlm.Plan or plans by name, got NoneType"),
        ({"plans": {}}, ValueError, "plans must name at least one plan"),
        ({"plans": {"a": 3}}, TypeError, "plan must be a lightvlm.Plan, got int"),
        ({"plans": bits(4)}, ValueError, "heads of 8 channels"),
        ({"inputs": [1, 2]}, TypeError, "inputs must be a mapping of generate()'s arguments, got list"),
        (
            {"inputs": {"pixel_values": 1}},
            ValueError,
            "inputs must have input_ids as a tensor, got pixel_values",
        ),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments(
    llava: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Refused before the model has run."""
    monkeypatch.setattr(llava, "generate", lambda **options: pytest.fail("it ran"))
    given = {"model": llava, "inputs": LLAVA.batch(ROWS), "plans": lightvlm.Plan(), "new_tokens": 2} | change
    with pytest.raises(error) as raised:
        lightvlm.divergence(given["model"], given["inputs"], given["plans"], new_tokens=given["new_tokens"])
    assert message in str(raised.value)


def test_an_attached_model_is_refused(llava: Any) -> None:
    with lightvlm.attach(llava, lightvlm_plan()), pytest.raises(ValueError, match="attached already"):
        lightvlm.divergence(llava, LLAVA.batch(ROWS), lightvlm.Plan())
