"""PruMerge and PruMerge+ against a slow implementation, fed by the tower's own attention in float64."""

from __future__ import annotations

import math
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.prumerge import PruMergePrefill
from python.field.test_visionzip import rows_of, stage_of
from python.talk import ANSWER, QUESTION, Conversation, check
from python.test_host_reads import counted_reads
from python.test_prefill import ROWS, noise, prompt
from python.tiny import INTERNVL, LLAVA, QWEN, Family, generate
from python.towers import deep, features, oracle, read_shorter
from torch import Tensor


def slow(
    x: Tensor, score: Tensor, key: Tensor, keep: int, plus: bool = False, neighbours: int = 32
) -> tuple[list[int], Tensor]:
    """What stays of an image x (T, C), ascending, and what becomes of it."""
    tokens = len(x)
    if keep >= tokens:
        return list(range(tokens)), x
    chosen = keep - 1 if keep > 1 else 1
    ranked = sorted(range(tokens), key=lambda i: (-float(score[i]), i))
    most = max(1, math.floor(chosen / 4 + 0.5)) if plus else chosen
    top = ranked[:most]
    others = [i for i in range(tokens) if i not in top]
    top += [others[number * len(others) // (chosen - most)] for number in range(chosen - most)]
    unit = torch.nn.functional.normalize(key, dim=-1)
    out = {}
    for i in top:
        near = sorted((j for j in range(tokens) if j != i), key=lambda j: (-float(unit[i] @ unit[j]), j))
        out[i] = x[i] + sum(score[j] * x[j] for j in near[:neighbours])
    dropped = [i for i in range(tokens) if i not in top]
    if keep > 1:
        out[dropped[-1]] = torch.stack([score[j] * x[j] for j in dropped]).sum(0)
    return sorted(out), torch.stack([out[i] for i in sorted(out)])


@pytest.fixture(scope="module", params=[LLAVA, INTERNVL, QWEN], ids=lambda family: family.name)
def pair(request: pytest.FixtureRequest) -> tuple[Family, Any]:
    return request.param, deep(request.param)


@pytest.mark.parametrize("keep", [0.01, 0.055, 0.25, 0.6, 0.99])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("neighbours", [0, 1, 32])
def test_one_stage(keep: float, plus: bool, neighbours: int) -> None:
    stage = stage_of([[40, 3], [], [1, 17, 64], [30]], keep)
    before = stage.hidden.clone()
    found = PruMergePrefill(keep=keep, plus=plus, neighbours=neighbours).reduce(stage)
    assert torch.equal(stage.hidden, before)
    assert stage.tower_scores is not None
    assert stage.tower_keys is not None
    for b, row in enumerate(stage.pictures):
        expected, values = [], []
        for place in range(stage.hidden.shape[1]):
            if stage.text[b, place]:
                expected.append(place)
                values.append(stage.hidden[b, place].double())
            picture = next((picture for picture in row if picture.start == place), None)
            if picture is not None:
                part = slice(picture.start, picture.stop)
                inputs = (stage.hidden[b, part], stage.tower_scores[b, part], stage.tower_keys[b, part])
                kept, x = slow(*(x.double() for x in inputs), picture.keep, plus, neighbours)
                assert len(kept) == picture.keep
                expected += [picture.start + i for i in kept]
                values += x
        count = int(found.selection.count[b])
        assert found.selection.index[b, :count].tolist() == expected
        assert count == len(expected)
        hidden = found.hidden[b, stage.capacity - count :]
        assert (hidden - torch.stack(values)).abs().max() <= 1e-5  # a sum of 64 numbers of about 1 in fp32
        assert (found.hidden[b, : stage.capacity - count] == 0).all()


def test_ties_go_to_the_lower_index() -> None:
    """All scores and keys are equal: the first tokens are chosen, and the first are everybody's neighbours."""
    stage = stage_of([[32]], 0.1)
    assert stage.tower_scores is not None
    assert stage.tower_keys is not None
    stage.tower_scores.fill_(0.5)
    stage.tower_keys.fill_(1.0)
    found = PruMergePrefill(keep=0.1, neighbours=2).reduce(stage)
    assert found.selection.index[0].tolist() == [0, 1, 2, 3, 33, 34, 35]
    x = stage.hidden[0, 2:34]
    for place, near in ((0, (1, 2)), (1, (0, 2))):
        expected = x[place] + 0.5 * (x[near[0]] + x[near[1]])
        assert (found.hidden[0, 2 + place] - expected).abs().max() <= 1e-5
    assert (found.hidden[0, 4] - 0.5 * x[2:].sum(0)).abs().max() <= 1e-5


def test_plus_spaces_tokens() -> None:
    """The scores rise, so that the last token is chosen by them, and the others stand equally far apart."""
    stage = stage_of([[26]], 0.25)
    assert stage.tower_scores is not None
    stage.tower_scores[0, 2:28] = torch.arange(26) / 26
    found = PruMergePrefill(keep=0.25, plus=True).reduce(stage)
    assert stage.pictures[0][0].keep == 7
    chosen = found.selection.index[0, 2:-2] - 2
    # two of six by score (24, 25), four of the 24 others in steps of 6; the extra one at the last dropped token's place
    assert chosen.tolist() == [0, 6, 12, 18, 23, 24, 25]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options", [{"keep": 0.2}, {"plus": True, "keep": 0.5, "neighbours": 4}], ids=["plain", "plus"]
)
def test_the_prompt_is_a_shorter_one(
    pair: tuple[Family, Any], attention: str, options: dict[str, Any]
) -> None:
    """Kept tokens are those of the slow implementation, and logits those of a prompt with its features."""
    family, model = pair
    rows = rows_of(family)
    model.set_attn_implementation({"vision_config": attention})
    plan = lightvlm.PruMerge(**options, min_image_tokens=0)
    inputs = prompt(family, rows)
    with torch.no_grad(), lightvlm.attach(model, plan, trace=True) as run:
        logits = model(**inputs).logits[:, -1]
        kept = run.kept[0]
        generated = generate(model, family.batch(rows), 4)
        assert run.kept[0] == kept
        alone = [generate(model, family.batch([row]), 4)[0] for row in rows]
    model.set_attn_implementation({"vision_config": "sdpa"})
    assert run.report().stepped_aside == {}
    assert torch.equal(generated, torch.stack(alone))
    limit = 4 * noise(model, family, rows) + 1e-5
    keep, plus, neighbours = options["keep"], options.get("plus", False), options.get("neighbours", 32)
    for b, row in enumerate(rows):
        one = family.batch([row])
        images: list[tuple[list[int], Tensor]] = []
        if any(not isinstance(item, int) for item in row):
            shown = oracle(model, one, -1, "class")
            for x, (score, key) in zip(features(model, one), shown, strict=True):
                count = max(1, math.floor(keep * len(x) + 0.5))
                images.append(slow(x, score, key, count, plus, neighbours))
        assert kept[b] == [image[0] for image in images]
        assert (read_shorter(model, family, one, images) - logits[b]).abs().max() <= limit


def test_later_questions(pair: tuple[Family, Any]) -> None:
    family, model = pair
    limit = 4 * noise(model, family, ROWS) + 1e-5
    plan = lightvlm.PruMerge(0.3, plus=True, min_image_tokens=0)
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        talk = Conversation(model, family, ROWS)
        talk.read()
        talk.answer(ANSWER)
        check(talk, QUESTION, ANSWER, limit)
        assert run.report().reread == 1
        assert run.report().stepped_aside == {}


@pytest.mark.parametrize("plus", [False, True])
def test_no_reads_between_layers(
    pair: tuple[Family, Any], plus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, model = pair
    plan = lightvlm.PruMerge(0.3, plus=plus, min_image_tokens=0)
    with lightvlm.attach(model, plan), counted_reads(model, monkeypatch) as found:
        generate(model, family.batch(ROWS), 3)
    assert found == []


def test_options() -> None:
    assert lightvlm.PruMerge().prefill.keep == 0.055  # type: ignore[union-attr]
    assert lightvlm.PruMerge(plus=True).prefill.keep == 0.25  # type: ignore[union-attr]
    assert lightvlm.method("prumerge", keep=0.2, plus=True) == lightvlm.PruMerge(0.2, plus=True)
    plan = lightvlm.PruMerge(0.2, plus=True, neighbours=3, positions="keep")
    assert lightvlm.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="neighbours must be at least 0, got -1"):
        lightvlm.PruMerge(neighbours=-1)
    with pytest.raises(TypeError, match="plus must be bool, got 1"):
        lightvlm.PruMerge(plus=1)  # type: ignore[arg-type]
