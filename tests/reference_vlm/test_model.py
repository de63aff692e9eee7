"""The shipped model: loads, matches its hash, answers, and does not mind padding."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from lightvlm import reference_vlm
from lightvlm.reference_vlm.evaluate import answer_batch, summarise
from lightvlm.reference_vlm.layout import pack
from lightvlm.reference_vlm.probe import accuracy, ceiling, digit_features, fit
from lightvlm.reference_vlm.questions import KINDS, questions
from lightvlm.reference_vlm.scenes import make_scenes
from lightvlm.reference_vlm.targets import pixels
from lightvlm.reference_vlm.train import answer_logits, image_tokens


@pytest.fixture(scope="module")
def loaded():
    return reference_vlm.load()


@pytest.fixture(scope="module")
def asked():
    """60 test scenes, each with one question; the four kinds in equal numbers."""
    scenes, chosen = make_scenes("test", 60, 11), []
    for index, scene in enumerate(scenes):
        options = questions(scene, np.random.default_rng([5, index]))
        wanted = [q for q in options if q.kind == KINDS[index % 4]]
        chosen.append((wanted or options)[0])
    return scenes, chosen


def test_weights_are_those_that_were_measured():
    file = reference_vlm.path() / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == reference_vlm.WEIGHTS_SHA256
    assert file.stat().st_size < 20e6


def test_missing_weights_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(reference_vlm, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="weights are missing"):
        reference_vlm.path()


def test_loads_in_another_dtype():
    model, _ = reference_vlm.load(dtype=torch.bfloat16, attn_implementation="eager")
    assert next(model.parameters()).dtype is torch.bfloat16
    assert not model.training


def test_answers_held_out_questions(loaded, asked):
    scenes, chosen = asked
    _, scores = answer_batch(*loaded, scenes, chosen, batch_size=20)
    assert summarise(chosen, scores)["all"] >= 0.85


def test_left_padding_changes_nothing(loaded, asked):
    model, processor = loaded
    scenes, chosen = asked[0][:6], asked[1][:6]
    lengths = {len(question.prompt.split()) for question in chosen}
    assert len(lengths) > 1
    together, _ = answer_batch(model, processor, scenes, chosen, batch_size=6)
    alone, _ = answer_batch(model, processor, scenes, chosen, batch_size=1)
    assert together == alone


@torch.no_grad()
def test_generation_follows_teacher_forcing(loaded, asked):
    model, processor = loaded
    scenes, chosen = asked[0][:20], asked[1][:20]
    answers, _ = answer_batch(model, processor, scenes, chosen, batch_size=20)
    for scene, question, answer in zip(scenes, chosen, answers, strict=True):
        given = type(question)(question.kind, question.prompt, answer)
        rows = pack([[[given]]], torch.float32)
        guess = answer_logits(model, image_tokens(model, pixels([scene])), rows).argmax(-1)
        assert torch.equal(guess, rows.tokens[0, rows.where[1]])


def test_works_without_an_image(loaded):
    model, processor = loaded
    chat = [{"role": "user", "content": "which digit is red ?"}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[text], return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 8)
    output = model.generate(**inputs, max_new_tokens=3)
    assert output.shape[1] > 8


def test_probe_reads_the_tower(loaded):
    model, _ = loaded
    probe = fit(model, make_scenes("train", 150, 0))
    scenes = make_scenes("val", 30, 0)
    features = digit_features(model, scenes)
    digit, colour = accuracy(probe, features, scenes)
    assert digit >= 0.8
    assert colour >= 0.9
    chosen = [questions(scene, np.random.default_rng(0))[0] for scene in scenes]
    assert np.mean(ceiling(probe, features, chosen)) >= 0.8


def test_answer_batch_checks_its_arguments(loaded, asked):
    scenes, chosen = asked
    with pytest.raises(ValueError, match="one question a scene"):
        answer_batch(*loaded, scenes, chosen[:1])
    with pytest.raises(ValueError, match="batch_size"):
        answer_batch(*loaded, scenes[:1], chosen[:1], batch_size=0)
