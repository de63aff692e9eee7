"""Training layout: the tokens of the processor, the computation of a conversation on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightvlm.reference_vlm.build import build_model, build_processor
from lightvlm.reference_vlm.evaluate import messages
from lightvlm.reference_vlm.layout import PREFIX, TEXT, branch_tokens, pack
from lightvlm.reference_vlm.questions import conversation
from lightvlm.reference_vlm.scenes import make_scenes
from lightvlm.reference_vlm.targets import patch_targets, pixels
from lightvlm.reference_vlm.train import answer_logits, draw_conversations, image_tokens, multiply_patches


@pytest.fixture(scope="module")
def model():
    return build_model(0).eval()


def test_template_gives_the_training_tokens():
    processor = build_processor()
    rng = np.random.default_rng(0)
    for scene in make_scenes("val", 5, 0):
        turns = conversation(scene, rng, 3)
        expected = pack([[turns]], torch.float32).tokens[0, : PREFIX + len(branch_tokens(turns)[0])]
        # Everything up to the last question, then its answer as generate() would append it.
        chat = [part for turn in turns for part in (turn, turn.answer)]
        whole = processor.apply_chat_template(messages(chat))
        asked = processor.apply_chat_template(messages(chat[:-1]), add_generation_prompt=True)
        whole_ids, asked_ids = (
            processor(text=[text], images=[scene.image], return_tensors="pt").input_ids[0]
            for text in (whole, asked)
        )
        assert torch.equal(whole_ids, expected)
        assert torch.equal(asked_ids, expected[: len(asked_ids)])
        assert len(expected) - len(asked_ids) == len(turns[-1].answer.split()) + 1


def test_processor_gives_the_training_pixels():
    scenes = make_scenes("val", 2, 0)
    processor = build_processor()
    given = processor(text=["<image>"] * 2, images=[s.image for s in scenes], return_tensors="pt")[
        "pixel_values"
    ]
    assert torch.allclose(given, pixels(scenes), atol=1e-6)


@torch.no_grad()
def test_branches_do_not_see_each_other(model):
    scenes = make_scenes("val", 2, 0)
    rng = np.random.default_rng(0)
    conversations = [draw_conversations(scene, rng) for scene in scenes]
    rows = pack(conversations, torch.float32)
    together = answer_logits(model, image_tokens(model, pixels(scenes)), rows)
    alone = []
    for scene, branches in zip(scenes, conversations, strict=True):
        used = 0
        for turns in branches:
            length = len(branch_tokens(turns)[0])
            if used + length > TEXT:
                continue
            used += length
            single = pack([[turns]], torch.float32)
            ids = single.tokens[:, : PREFIX + length]
            logits = model(input_ids=ids, pixel_values=pixels([scene])).logits
            alone.append(logits[0, single.where[1] - 1])
    assert torch.allclose(torch.cat(alone), together, atol=1e-4)


@torch.no_grad()
def test_patch_product_equals_the_convolution(model):
    images = pixels(make_scenes("val", 2, 0))
    before = image_tokens(model, images)
    multiply_patches(model)
    after = image_tokens(model, images)
    del model.model.vision_tower.embeddings.patch_embedding.forward
    assert torch.allclose(before, after, atol=1e-4)


def test_patch_targets_cover_every_digit():
    scenes = make_scenes("val", 10, 0)
    classes, centres = patch_targets(scenes)
    for row, scene in enumerate(scenes):
        for digit in scene.digits:
            mine = (centres[row] == torch.tensor([digit.x / 128, digit.y / 128])).all(-1)
            assert 2 <= int(mine.sum()) <= 16
            assert (classes[row, mine, 0] == digit.digit + 1).all()
        assert int((classes[row, :, 0] > 0).sum()) == int((centres[row].sum(-1) > 0).sum())
