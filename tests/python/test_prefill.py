"""Reduction at prefill, against a slow implementation of it, and a batch against its rows one by one."""

from __future__ import annotations

from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.lightvlm import LightVLMPrefill
from lightvlm.methods.random import RandomPrefill
from python.slow import SlowDecoder
from python.tiny import DEPTH, LLAVA, NEWER, QWEN, Family, Image, generate, generate_logits
from torch import Tensor
from transformers import DynamicCache

ROWS = [
    [1, 2, Image(0), 3, 4, 5],
    [6, 7, 8],
    [1, Image(1), 9, Image(2), *range(10, 20)],
    [22, Image(3), 21],
]
# sizes that only Qwen's images can have: one token, a tall one
UNEVEN = [
    [1, Image(0, 3, 5), 3, 4, 5, 6, 7],
    [2, Image(1, 1, 1), 3, Image(2, 7, 2), 4, Image(3, 2, 3), 8],
    [5, 6],
]
ADJACENT = [[1, Image(0), Image(1), 3, 4], [1, Image(2), 5]]  # transformers' Qwen refuses them itself
# a prompt that ends with an image has no text to ask with: its last token scores
ENDS = [[1, 2, 3, Image(0)], [4, Image(1)], [4, Image(1), 2, Image(3)]]

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "top-drop": {"selection": "top", "merge": "drop", "over_rows": "max"},
    "score-last": {"merge": "score", "probe_rows": "last", "over_heads": "max"},
    "half-diverse": {"strength": 0.5, "over_rows": "max", "over_heads": "max", "probe_limit": 2},
    "two-stages": {"layers": (2, 4), "fractions": (0.7, 0.3), "selection": "top"},
    "spread-first": {"spread": 0.5},
    "spread-first-drop": {"spread": 0.7, "layers": (2, 4), "merge": "drop"},
    "spread-first-score": {"spread": 0.6, "merge": "score"},
    "late": {"layers": (4,), "probe_rows": "last", "merge": "drop"},
}


def lightvlm_plan(**options: Any) -> lightvlm.Plan:
    options = {"keep": 0.3, "layers": (1, 2, 3), "min_image_tokens": 0, **options}
    return lightvlm.Plan(prefill=LightVLMPrefill(**options))


def slow_options(part: Any) -> dict[str, Any]:
    """What the slow model wants to know of a prefill part."""
    options = {key: value for key, value in part.to_dict().items() if key != "kind"}
    options |= {"kind": part.kind, "stages": [(stage.layer, stage.keep) for stage in part.stages(DEPTH)]}
    if part.kind == "random":
        options["random"] = torch.rand(1 << 16, generator=torch.Generator().manual_seed(part.seed))[
            :64
        ].tolist()
    return options


def prompt(family: Family, rows: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of forward(); generate() makes the positions itself."""
    inputs = family.batch(rows, dtype)
    if family is not QWEN:
        inputs["position_ids"] = family.positions(
            None, inputs["attention_mask"], inputs["input_ids"].shape[1]
        )
    return inputs


def noise(model: Any, family: Family, rows: Any) -> float:
    """What fp32 costs the unreduced model: its largest distance from float64 in a logit."""
    worst = 0.0
    for row in rows:
        inputs = family.batch([row])
        with torch.no_grad():
            found = model(**inputs).logits[0]
        worst = max(worst, float((SlowDecoder(model, None).read(inputs) - found).abs().max()))
    return worst


def check_against_slow(model: Any, family: Family, plan: lightvlm.Plan, rows: Any) -> None:
    inputs = prompt(family, rows)
    with torch.no_grad(), lightvlm.attach(model, plan, trace=True) as run:
        logits = model(**inputs).logits
    limit = 4 * noise(model, family, rows) + 1e-5
    for b, row in enumerate(rows):
        slow = SlowDecoder(model, slow_options(plan.prefill))
        expected = slow.read(family.batch([row]))
        assert {layer: kept[b] for layer, kept in run.kept.items() if kept[b]} == slow.kept
        # rows stand flush right, the last token last
        assert (logits[b, logits.shape[1] - len(expected) :] - expected).abs().max() <= limit
    assert logits.shape[1] == max(
        len(SlowDecoder(model, slow_options(plan.prefill)).read(family.batch([row]))) for row in rows
    )
    assert run.report().stepped_aside == {}


@pytest.mark.parametrize("name", OPTIONS)
def test_lightvlm_is_what_it_says(model: Any, family: Family, name: str) -> None:
    check_against_slow(model, family, lightvlm_plan(**OPTIONS[name]), ROWS)


@pytest.mark.parametrize(
    "options", [{}, {"merge": "uniform", "seed": 5, "layers": (0, 3)}], ids=["drop", "merge"]
)
def test_random_is_what_it_says(model: Any, family: Family, options: dict[str, Any]) -> None:
    part = RandomPrefill(**{"keep": 0.3, "layers": (1, 2, 3), "min_image_tokens": 0, **options})
    check_against_slow(model, family, lightvlm.Plan(prefill=part), ROWS)


@pytest.mark.parametrize("name", ["default", "top-drop", "spread-first"])
def test_images_of_any_size(qwen: Any, name: str) -> None:
    check_against_slow(qwen, QWEN, lightvlm_plan(**OPTIONS[name]), UNEVEN)


def test_adjacent_images(llava: Any) -> None:
    check_against_slow(llava, LLAVA, lightvlm_plan(), ADJACENT)


@pytest.mark.parametrize("rows", [[row] for row in ENDS], ids=["last", "only", "both"])
def test_prompts_that_end_with_an_image(model: Any, family: Family, rows: Any) -> None:
    check_against_slow(model, family, lightvlm_plan(), rows)


def test_an_image_and_nothing_else(llava: Any) -> None:
    check_against_slow(llava, LLAVA, lightvlm_plan(), [[Image(1)]])


def test_prompts_that_end_with_an_image_in_a_batch(model: Any, family: Family) -> None:
    check_against_slow(model, family, lightvlm_plan(), [*ENDS, ROWS[2]])


PLANS = [
    lightvlm_plan(),
    lightvlm_plan(**OPTIONS["top-drop"]),
    lightvlm_plan(**OPTIONS["score-last"]),
    lightvlm_plan(**OPTIONS["spread-first"]),
    lightvlm.Random(keep=0.2, min_image_tokens=0),
    lightvlm.LightVLM(
        keep=0.3, min_image_tokens=0, decode_keep=0.4, decode_interval=5, decode_sinks=2, decode_recent=6
    ),
]
PLAN_NAMES = ["default", "top-drop", "score-last", "spread-first", "random", "compaction"]


@pytest.mark.parametrize("plan", PLANS, ids=PLAN_NAMES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_is_its_rows_one_by_one(family: Family, plan: lightvlm.Plan, attention: str) -> None:
    model = family.build(attention=attention)
    rows = [*ROWS, *UNEVEN[:2]] if family is QWEN else ROWS
    with lightvlm.attach(model, plan):
        together = generate(model, family.batch(rows), 12)
        alone = [generate(model, family.batch([row]), 12)[0] for row in rows]
    assert torch.equal(together, torch.stack(alone))
    full = generate(model, family.batch(rows), 12)
    assert not torch.equal(together, full)  # the plan did something
    assert (
        torch.equal(together[1], full[1]) or plan.cache is not None
    )  # and nothing to the row without an image


def last_logits(model: Any, family: Family, run: Any = None) -> tuple[Tensor, Tensor, list[Any]]:
    """The last token's logits of each row in a batch and alone (B, V), and whether the same tokens were kept."""
    with torch.no_grad():
        together = model(**prompt(family, ROWS, model.dtype), logits_to_keep=1).logits[:, 0].float()
        kept = run.kept if run is not None else {}
        alone, same = [], []
        for b, row in enumerate(ROWS):
            alone.append(model(**prompt(family, [row], model.dtype), logits_to_keep=1).logits[0, 0].float())
            own = {layer: rows[0] for layer, rows in run.kept.items()} if run is not None else {}
            same.append(all(rows[b] == own.get(layer, []) for layer, rows in kept.items()))
    return together, torch.stack(alone), same


@pytest.mark.parametrize("plan", PLANS, ids=PLAN_NAMES)
def test_a_batch_is_its_rows_in_bf16(family: Family, plan: lightvlm.Plan) -> None:
    """In 16 bit the two may differ by what the full model itself differs between them.

    Choices are discrete, though: where two tokens are as good as each other, noise decides, and what a merge is worth
    is not noise any more. There the bound is what the precision costs, the distance to fp32.
    """
    models = {dtype: family.build(dtype) for dtype in (torch.float32, torch.bfloat16)}
    together, alone, _ = last_logits(models[torch.bfloat16], family)
    allowed = 3 * (together - alone).abs().max()
    with lightvlm.attach(models[torch.float32], plan, trace=True) as run:
        exact, exact_alone, same = last_logits(models[torch.float32], family, run)
        assert all(same)
        assert (exact - exact_alone).abs().max() < 1e-4
    with lightvlm.attach(models[torch.bfloat16], plan, trace=True) as run:
        together, alone, same = last_logits(models[torch.bfloat16], family, run)
    differ, cost = (together - alone).abs().amax(dim=1), (together - exact).abs().amax(dim=1)
    assert sum(same) >= len(ROWS) - 1
    discrete = getattr(plan.prefill, "merge", "drop") != "drop"
    for b in range(len(ROWS)):
        if same[b] and not discrete:
            assert differ[b] <= allowed
        else:
            assert differ[b] <= max(allowed, cost.max())


def test_generated_tokens_follow_the_slow_model(model: Any, family: Family) -> None:
    """Without a compaction: the cache of a reduced prompt is read right at every step."""
    plan = lightvlm_plan()
    with lightvlm.attach(model, plan):
        tokens, logits = generate_logits(model, family.batch(ROWS), 6)
    limit = 4 * noise(model, family, ROWS) + 1e-5
    for b, row in enumerate(ROWS):
        slow = SlowDecoder(model, slow_options(plan.prefill))
        expected = [slow.read(family.batch([row]))[-1]]
        expected += [slow.step(token) for token in tokens[b, :-1].tolist()]
        assert (logits[b] - torch.stack(expected)).abs().max() <= limit


def test_without_a_cache_every_step_reads_the_prompt_anew(model: Any, family: Family) -> None:
    plan, row = lightvlm_plan(), ROWS[2]
    with lightvlm.attach(model, plan) as run:
        tokens, logits = generate_logits(model, family.batch([row]), 4, use_cache=False)
    for step in range(4):
        slow = SlowDecoder(model, slow_options(plan.prefill))
        expected = slow.read(family.batch([[*row, *tokens[0, :step].tolist()]]))[-1]
        assert (logits[0, step] - expected).abs().max() <= 4 * noise(model, family, [row]) + 1e-5
    assert run.report().prefills == 4
    assert run.report().kv_bytes_used == 0


def test_without_a_cache_random_dropping_is_the_same(model: Any, family: Family) -> None:
    """Its choice does not depend on the text, so that reading anew must give what the cache gives."""
    with lightvlm.attach(model, lightvlm.Random(keep=0.2, min_image_tokens=0)):
        inputs = family.batch(ROWS)
        assert torch.equal(generate(model, inputs, 4, use_cache=False), generate(model, inputs, 4))


def test_lengths_of_forward(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan(layers=(1, 3))) as run:
        out = model(**inputs, output_hidden_states=True)
    # Row 2 is the longest throughout: 12 text tokens, and 2 images of 16 tokens, of which 9 stay (sqrt(0.3) of
    # them), then 5. The first entry are the embeddings.
    assert [x.shape[1] for x in out.hidden_states] == [length, length, 30, 30, 22, 22]
    assert out.logits.shape[1] == 22
    assert out.past_key_values.get_seq_length() == length
    assert [layer.seen for layer in out.past_key_values.layers] == [length] * DEPTH
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [length, 30, 30, 22, 22]
    text = 5 + 3 + 12 + 2
    assert run.report().tokens_per_layer == [(text + 4 * kept) / 4 for kept in (16, 9, 9, 5, 5)]


@pytest.mark.parametrize("name", ["default", "score-last"])
def test_rating_an_answer(model: Any, family: Family, name: str) -> None:
    """logits_to_keep says which tokens are the answer; the logits are those of generating it."""
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan(**OPTIONS[name])):
        tokens, expected = generate_logits(model, family.batch(ROWS), 5)
        answered = [[*row, *tokens[b, :-1].tolist()] for b, row in enumerate(ROWS)]
        found = model(**prompt(family, answered), logits_to_keep=5).logits
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 4 * noise(model, family, ROWS) + 1e-5


def test_logits_of_one_token(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan()):
        expected = model(**inputs).logits
        assert torch.allclose(model(**inputs, logits_to_keep=1).logits, expected[:, -1:], atol=1e-4)
        # more than the text behind the last image cannot be an answer
        assert torch.allclose(model(**inputs, logits_to_keep=22).logits, expected, atol=1e-4)


def test_tuples_instead_of_outputs(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    with torch.no_grad(), lightvlm.attach(model, PLANS[-1]):
        expected = model(**inputs)
        logits, cache, *_ = model(**inputs, return_dict=False)
        assert torch.equal(logits, expected.logits)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_no_attention_mask(model: Any, family: Family) -> None:
    inputs = family.batch(ROWS[2:3])
    with lightvlm.attach(model, lightvlm_plan()):
        expected = generate(model, inputs, 4)
        del inputs["attention_mask"]
        assert torch.equal(generate(model, inputs, 4), expected)


def test_embeddings_instead_of_ids(model: Any, family: Family) -> None:
    inputs = prompt(family, ROWS)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    others = {key: value for key, value in inputs.items() if key not in ("input_ids", "mm_token_type_ids")}
    if family is QWEN:  # its positions can only be computed from ids
        others["position_ids"] = torch.zeros(3, *inputs["input_ids"].shape, dtype=torch.long)
        for b, row in enumerate(ROWS):
            positions = SlowDecoder(model, None)._positions(family.batch([row]))
            others["position_ids"][:, b, -positions.shape[1] :] = positions
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan()) as run:
        expected = model(**inputs).logits
        found = model(inputs_embeds=embeds, **others).logits
    assert torch.equal(found, expected)
    assert run.report().stepped_aside == {}


@pytest.mark.parametrize("where", ["right", "hole"])
def test_padding_that_is_not_on_the_left_steps_aside(model: Any, family: Family, where: str) -> None:
    inputs = family.batch(ROWS[:2], left=where == "hole")
    if where == "hole":
        inputs["attention_mask"][0, 1] = 0
    with torch.no_grad():
        expected = model(**inputs).logits
        with lightvlm.attach(model, PLANS[-1]) as run:
            out = model(**inputs)
    assert torch.equal(out.logits, expected)
    assert type(out.past_key_values).__name__ == "DynamicCache"
    reason = "the attention mask is not left padding (holes or padding on the right)"
    assert run.report().stepped_aside == {reason: 1}


def test_prepared_masks_step_aside(llava: Any) -> None:
    inputs = LLAVA.batch(ROWS[2:3])
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        expected = llava(**inputs).logits
        with lightvlm.attach(llava, PLANS[-1]) as run:
            assert torch.equal(llava(**inputs).logits, expected)
    assert run.report().stepped_aside == {"the attention mask is not a 2-D padding mask": 1}


def test_small_images_step_aside(model: Any, family: Family) -> None:
    inputs = family.batch(ROWS[:2])
    expected = generate_logits(model, inputs, 4)[1]
    with lightvlm.attach(model, lightvlm_plan(min_image_tokens=17)) as run:
        assert torch.equal(generate_logits(model, inputs, 4)[1], expected)
    assert run.report().stepped_aside == {"fewer than min_image_tokens (17) image tokens": 1}
    assert run.report().flops_share == 1.0


def test_each_row_steps_aside_for_itself(model: Any, family: Family) -> None:
    """Rows 0 and 3 have 16 image tokens, row 2 has 32: it alone is reduced, in a batch as by itself."""
    plan = lightvlm_plan(min_image_tokens=17)
    full = generate(model, family.batch(ROWS), 8)
    with lightvlm.attach(model, plan, trace=True) as run:
        together = generate(model, family.batch(ROWS), 8)
        kept = run.kept
        alone = [generate(model, family.batch([row]), 8)[0] for row in ROWS]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(together[[0, 1, 3]], full[[0, 1, 3]])
    assert not torch.equal(together[2], full[2])
    assert [len(image) for image in kept[3][0]] == [16]
    assert [len(image) for image in kept[3][2]] == [5, 5]


def test_several_calls_in_one_run(model: Any, family: Family) -> None:
    expected, runs = [], []
    for rows in (ROWS, ROWS[2:], ROWS[1:2]):
        with lightvlm.attach(model, PLANS[-1]) as run:
            expected.append(generate(model, family.batch(rows), 8))
        runs.append(run.report())
    with lightvlm.attach(model, PLANS[-1]) as run:
        for rows, tokens in zip((ROWS, ROWS[2:], ROWS[1:2]), expected, strict=True):
            assert torch.equal(generate(model, family.batch(rows), 8), tokens)
    assert run.report().prefills == 4 + 2 + 1
    for name, calls in run.report().op_calls.items():
        assert calls == sum(part.op_calls.get(name, 0) for part in runs)


def test_the_same_input_gives_the_same_bits(model: Any, family: Family) -> None:
    found = []
    for _ in range(2):
        with lightvlm.attach(model, PLANS[-1]):
            found.append(generate_logits(model, family.batch(ROWS), 8)[1])
    assert torch.equal(*found)


@pytest.mark.parametrize("plan", [lightvlm_plan(), lightvlm.method("vl_cache", keep=0.3, min_tokens=4)])
def test_a_chunk_that_is_padding_in_a_row(model: Any, family: Family, plan: lightvlm.Plan) -> None:
    """The first chunk holds the whole image of one row, and none of the other, which is left as it is."""
    if family is QWEN and not NEWER:
        pytest.skip(
            "this transformers numbers each chunk on its own, and a row without tokens is too much for it"
        )
    rows = [[1, 2, Image(0), *range(3, 14)], [*range(6, 15)]]
    with lightvlm.attach(model, plan):
        # transformers 5.0 wants a cache for chunks
        together, alone = (
            generate(model, family.batch(part), 6, prefill_chunk_size=20, past_key_values=DynamicCache())
            for part in (rows, rows[:1])
        )
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], generate(model, family.batch(rows[1:]), 6)[0])
    assert not torch.equal(alone, generate(model, family.batch(rows[:1]), 6))
