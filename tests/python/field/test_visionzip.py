"""VisionZip against a slow implementation, fed by the tower's own attention in float64."""

from __future__ import annotations

import math
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm.methods.base import Picture, Stage, StageInput
from lightvlm.methods.visionzip import VisionZipPrefill
from python.talk import ANSWER, QUESTION, Conversation, check
from python.test_host_reads import counted_reads
from python.test_prefill import ENDS, ROWS, UNEVEN, noise, prompt
from python.tiny import INTERNVL, LLAVA, QWEN, Family, generate
from python.towers import deep, features, oracle, read_shorter
from torch import Tensor


def slow(
    x: Tensor, score: Tensor, key: Tensor, keep: int, share: float = 10 / 64
) -> tuple[list[int], Tensor]:
    """What stays of an image x (T, C), ascending, and what becomes of it."""
    tokens = len(x)
    if keep >= tokens:
        return list(range(tokens)), x
    contextual = min(keep - 1, math.floor(share * keep + 0.5))
    ranked = sorted(range(tokens), key=lambda i: (-float(score[i]), i))
    dominant = ranked[: keep - contextual]
    rest = [i for i in range(tokens) if i not in dominant]
    targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual]
    unit = torch.nn.functional.normalize(key, dim=-1)
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets and targets:
            members[max(targets, key=lambda t: (float(unit[i] @ unit[t]), -t))].append(i)
    out = {i: x[i] for i in dominant}
    for target, assigned in members.items():
        out[target] = x[target] + (x[assigned].mean(0) if assigned else 0)
    return sorted(out), torch.stack([out[i] for i in sorted(out)])


@pytest.fixture(scope="module", params=[LLAVA, INTERNVL, QWEN], ids=lambda family: family.name)
def pair(request: pytest.FixtureRequest) -> tuple[Family, Any]:
    return request.param, deep(request.param)


def rows_of(family: Family) -> Any:
    return UNEVEN if family is QWEN else ROWS


# -- one stage


def stage_of(sizes: list[list[int]], keep: float, seed: int = 0, channels: int = 12) -> StageInput:
    """A stage of rows flush right, with two tokens of text before, between and after images of these sizes."""
    torch.manual_seed(seed)
    part = VisionZipPrefill(keep=keep)
    lengths = [sum(row) + 2 * (len(row) + 1) for row in sizes]
    length = max(lengths)
    segment = torch.full((len(sizes), length), -1, dtype=torch.int32)
    text = torch.zeros(len(sizes), length, dtype=torch.bool)
    within = torch.zeros_like(segment)
    pictures = []
    for b, row in enumerate(sizes):
        at = length - lengths[b]
        text[b, at:] = True
        found = []
        for image, tokens in enumerate(row):
            at += 2
            segment[b, at : at + tokens] = image
            text[b, at : at + tokens] = False
            within[b, at : at + tokens] = torch.arange(tokens)
            picture = Picture(image, at, at + tokens, tokens, tokens)
            (kept,) = part.counts(Stage(0, keep), [picture])
            found.append(Picture(image, at, at + tokens, tokens, kept))
            at += tokens
        pictures.append(tuple(found))
    images = max(len(row) for row in sizes)
    counts = [[picture.keep for picture in row] + [0] * (images - len(row)) for row in pictures]
    after = [size - sum(p.tokens - p.keep for p in row) for size, row in zip(lengths, pictures, strict=True)]
    return StageInput(
        hidden=torch.randn(len(sizes), length, channels) * (text | (segment >= 0))[..., None],
        scores=None,
        segment=segment,
        within=within,
        text=text,
        keep=torch.tensor(counts, dtype=torch.int32),
        capacity=max(after),
        stage=Stage(0, keep),
        pictures=tuple(pictures),
        tower_scores=torch.rand(len(sizes), length) * (segment >= 0),
        tower_keys=torch.randn(len(sizes), length, 5) * (segment >= 0)[..., None],
    )


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("share", [0.0, 10 / 64, 0.5, 1.0])
def test_one_stage(keep: float, share: float) -> None:
    stage = stage_of([[40, 3], [], [1, 17, 64], [30]], keep)
    found = VisionZipPrefill(keep=keep, contextual=share).reduce(stage)
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
                kept, x = slow(*(x.double() for x in inputs), picture.keep, share)
                expected += [picture.start + i for i in kept]
                values += x
        count = int(found.selection.count[b])
        assert found.selection.index[b, :count].tolist() == expected
        assert count == len(expected)
        hidden = found.hidden[b, stage.capacity - count :]
        assert (hidden - torch.stack(values)).abs().max() <= 1e-5  # a mean of 64 numbers of about 1 in fp32
        assert (found.hidden[b, : stage.capacity - count] == 0).all()


def test_ties_go_to_the_lower_index() -> None:
    """All scores and keys are equal: the first tokens are dominant, and the first target gets everything."""
    stage = stage_of([[32]], 0.25)
    assert stage.tower_scores is not None
    assert stage.tower_keys is not None
    stage.tower_scores.fill_(0.5)
    stage.tower_keys.fill_(1.0)
    found = VisionZipPrefill(keep=0.25, contextual=0.25).reduce(stage)
    # 6 dominant, 2 targets among 26: the first and the 13th after it
    assert found.selection.index[0].tolist() == [0, 1, *range(2, 8), 8, 21, 34, 35]
    x = stage.hidden[0, 2:34]
    others = [i for i in range(6, 32) if i not in (6, 19)]
    assert (found.hidden[0, 8] - (x[6] + x[others].mean(0))).abs().max() <= 1e-5
    assert torch.equal(found.hidden[0, 9], x[19])  # nothing arrives


def test_the_papers_numbers() -> None:
    """Of LLaVA 1.5's 576 tokens: 54 + 10, 108 + 20 and 162 + 30."""
    for share, dominant, contextual in ((1 / 9, 54, 10), (2 / 9, 108, 20), (1 / 3, 162, 30)):
        stage = stage_of([[576]], share)
        assert stage.pictures[0][0].keep == dominant + contextual
        counts = VisionZipPrefill(keep=share)._counts(stage)
        assert counts[0].tolist() == [[dominant]]
        assert counts[2].tolist() == [[contextual]]


# -- in the model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [0.25, 0.6])
def test_the_prompt_is_a_shorter_one(pair: tuple[Family, Any], attention: str, keep: float) -> None:
    """Kept tokens are those of the slow implementation, and logits those of a prompt with its features."""
    family, model = pair
    rows = rows_of(family)
    model.set_attn_implementation({"vision_config": attention})
    plan = lightvlm.VisionZip(keep, min_image_tokens=0, tower_layer=-1)
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
    for b, row in enumerate(rows):
        one = family.batch([row])
        images: list[tuple[list[int], Tensor]] = []
        if any(not isinstance(item, int) for item in row):
            shown = oracle(model, one, -1, "class")
            for x, (score, key) in zip(features(model, one), shown, strict=True):
                images.append(slow(x, score, key, max(1, math.floor(keep * len(x) + 0.5))))
        assert kept[b] == [image[0] for image in images]
        assert (read_shorter(model, family, one, images) - logits[b]).abs().max() <= limit


@pytest.mark.parametrize("positions", ["keep", "renumber_prompt"])
def test_other_positions(pair: tuple[Family, Any], positions: Any) -> None:
    """The same tokens stay; a batch is the same as its rows."""
    family, model = pair
    plan = lightvlm.VisionZip(0.3, min_image_tokens=0, positions=positions)
    with torch.no_grad(), lightvlm.attach(model, plan, trace=True) as run:
        together = generate(model, family.batch(ROWS), 5)
        kept = run.kept
        alone = [generate(model, family.batch([row]), 5)[0] for row in ROWS]
        assert torch.equal(together, torch.stack(alone))
    with (
        torch.no_grad(),
        lightvlm.attach(model, lightvlm.VisionZip(0.3, min_image_tokens=0), trace=True) as run,
    ):
        generate(model, family.batch(ROWS), 5)
        assert run.kept == kept


def test_prompts_that_end_with_an_image(pair: tuple[Family, Any]) -> None:
    family, model = pair
    with torch.no_grad(), lightvlm.attach(model, lightvlm.VisionZip(0.3, min_image_tokens=0)) as run:
        together = generate(model, family.batch(ENDS), 5)
        alone = [generate(model, family.batch([row]), 5)[0] for row in ENDS]
    assert torch.equal(together, torch.stack(alone))
    assert run.report().stepped_aside == {}


def test_rows_below_min_image_tokens_are_left_alone(pair: tuple[Family, Any]) -> None:
    """One row has two images and is reduced, the others are not."""
    family, model = pair
    with torch.no_grad(), lightvlm.attach(model, lightvlm.VisionZip(0.3), trace=True) as run:
        generate(model, family.batch(ROWS), 2)
        kept = [[len(image) for image in row] for row in run.kept[0]]
    assert kept == [[16], [], [5, 5], [16]]


def test_later_questions(pair: tuple[Family, Any]) -> None:
    family, model = pair
    limit = 4 * noise(model, family, ROWS) + 1e-5
    plan = lightvlm.VisionZip(0.3, min_image_tokens=0)
    with torch.no_grad(), lightvlm.attach(model, plan) as run:
        talk = Conversation(model, family, ROWS)
        talk.read()
        talk.answer(ANSWER)
        check(talk, QUESTION, ANSWER, limit)
        assert run.report().reread == 1
        assert run.report().stepped_aside == {}


def test_no_reads_between_layers(pair: tuple[Family, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    family, model = pair
    plan = lightvlm.VisionZip(0.3, min_image_tokens=0)
    with lightvlm.attach(model, plan), counted_reads(model, monkeypatch) as found:
        generate(model, family.batch(ROWS), 3)
    assert found == []


def test_options() -> None:
    assert lightvlm.method("visionzip", keep=0.2) == lightvlm.VisionZip(0.2)
    assert lightvlm.VisionZip().prefill.positions == "renumber"  # type: ignore[union-attr]
    assert VisionZipPrefill(keep=1).stages(5) == ()
    plan = lightvlm.VisionZip(0.2, contextual=0.5, positions="keep", tower_layer=-3)
    assert lightvlm.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match=r"contextual must be at most 1, got 1\.5"):
        lightvlm.VisionZip(contextual=1.5)
    with pytest.raises(
        ValueError, match="positions must be one of 'keep', 'renumber', 'renumber_prompt', got 'new'"
    ):
        lightvlm.VisionZip(positions="new")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep must be in"):
        lightvlm.VisionZip(0)
