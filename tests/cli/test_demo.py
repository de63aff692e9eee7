"""lightvlm demo: what its numbers mean, its pictures, and the clock that times all cases alike."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections import Counter

import lightvlm
import numpy as np
import pytest
import torch
from lightvlm import demo, reference_vlm
from lightvlm.cli import main
from lightvlm.pictures import Shown, draw_kept, fade, kept_mask
from lightvlm.reference_vlm.questions import KINDS
from lightvlm.trial import Clock, allocated_bytes, cache_bytes, cases, put
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

OPS = {"importance", "select", "select_diverse", "gather_tokens", "merge_tokens", "compact_kv_"}
QUICK = ("--questions", 6, "--rounds", 1, "--decode-tokens", 70)


@pytest.fixture(scope="module")
def loaded(untrained):
    """The untrained model, its processor and a batch of five prompts of different lengths."""
    model = AutoModelForImageTextToText.from_pretrained(untrained, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(untrained)
    return model, processor, demo.encode(processor, *demo.draw(5))


@pytest.fixture(scope="module")
def shown(untrained, tmp_path_factory):
    """What a short demo of the untrained model printed as JSON, and what it prints of that as tables."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    words = [str(word) for word in ("demo", *QUICK, "--out", out, "--json")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(reference_vlm, "path", lambda: untrained)
        assert main(words) == 0
    found = json.loads(stdout.getvalue())
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        demo.show(found)
    return found, stdout.getvalue()


def test_demo(shown):
    found, _ = shown
    assert found["questions"] == 6
    assert [(row["method"], row["keep"]) for row in found["rows"]] == [
        ("full", 1.0), ("lightvlm", 0.35), ("lightvlm", 0.15), ("lightvlm", 0.03), ("random", 0.35), ("random", 0.15),
        ("random", 0.03),
    ]  # fmt: skip
    full, *rows = found["rows"]
    assert (full["image_tokens"], full["final_image_tokens"], full["flops_share"]) == (256.0, 256, 1.0)
    for row in rows:
        assert row["final_image_tokens"] == int(row["keep"] * 256 + 0.5)
        assert row["final_image_tokens"] < row["image_tokens"] < 256
        assert 0 < row["flops_share"] < 1
        assert row["kv_bytes"] < full["kv_bytes"]
        assert not row["stepped_aside"]
    for row in found["rows"]:
        assert 0 < row["prefill_seconds"] <= row["total_seconds"]
        assert 0 <= row["accuracy"] <= 1
    for mine, random in zip(rows[:3], rows[3:], strict=True):  # random dropping may do more work, never less
        assert mine["final_image_tokens"] == random["final_image_tokens"]
        assert all(mine[key] < random[key] for key in ("image_tokens", "flops_share", "kv_bytes"))
    assert set(found["op_calls"]) >= OPS
    whole, compacted, both = found["decode"]["rows"]
    assert found["decode"]["new_tokens"] == 70
    assert compacted["compactions"] == both["compactions"] == 1
    assert (
        both["kv_bytes_used"]
        <= compacted["kv_bytes_used"]
        < whole["kv_bytes_used"]
        <= whole["kv_bytes_allocated"]
    )
    assert both["kv_bytes_allocated"] < compacted["kv_bytes_allocated"]
    assert len(found["pictures"]) == 3
    for path in found["pictures"]:
        assert min(Image.open(path).size) > 800
    for path in found["scenes"]:
        assert Image.open(path).size == (128, 128)


def test_demo_prints_tables(shown):
    found, text = shown
    for word in (
        "6 questions",
        "lightvlm",
        "random",
        "35%",
        "KV allocated",
        "compact_kv_",
        *found["pictures"],
    ):
        assert word in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--questions", "0"], "--questions must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--threads", "-1"], "--threads must be at least 1, got -1"),
        (["--decode-tokens", "1"], "--decode-tokens must be from 2 to 512, got 1"),
        (["--decode-tokens", "513"], "--decode-tokens must be from 2 to 512, got 513"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used"),
        (["--out", __file__], "--out"),
    ],
)
def test_bad_input(call, words, said):
    result = call("demo", *words, "--json")
    assert result.status == 1
    assert said in result.err
    assert result.err.count("\n") == 1
    assert not result.out


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_a_missing_package_is_named(call, monkeypatch, tmp_path, module, package):
    real = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == module else real(name))
    result = call("demo", "--out", tmp_path)
    assert (result.status, result.err) == (
        1,
        f"lightvlm: lightvlm demo needs {package}: pip install 'lightvlm[demo]'\n",
    )


def test_missing_weights_are_named(call, monkeypatch, tmp_path):
    monkeypatch.setattr(reference_vlm, "__file__", str(tmp_path / "__init__.py"))
    result = call("demo", "--out", tmp_path / "out")
    assert result.status == 1
    assert "weights are missing" in result.err
    assert not (tmp_path / "out").exists()


def test_the_kinds_take_turns():
    scenes, questions = demo.draw(12)
    assert len(scenes) == len(questions) == 12
    assert set(Counter(question.kind for question in questions)) == set(KINDS)


# -- the clock -----------------------------------------------------------------------------------------------------


def test_clock_counts_what_the_prompt_left(loaded):
    """The same bytes by two ways: the cache after the prompt, and a forward call of the prompt alone."""
    model, _, inputs = loaded
    valid = int(inputs["attention_mask"].sum())
    assert valid < inputs["attention_mask"].numel()
    config = model.config.text_config
    token = 2 * config.num_key_value_heads * config.head_dim * 4
    with Clock(model) as clock, torch.inference_mode():
        for case in cases():
            with put(model, case.plan) as handle:
                _, prefill, total = clock.generate(inputs, 3, min_new_tokens=3)
            assert 0 < prefill < total
            if handle is None:
                assert clock.kv_bytes == valid * token * config.num_hidden_layers
            else:
                assert (
                    clock.kv_bytes
                    == round(sum(handle.report().tokens_per_layer) * len(inputs["input_ids"])) * token
                )
    assert not model._forward_hooks


def test_clock_changes_no_answer(loaded):
    model, _, inputs = loaded
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    with Clock(model) as clock:
        timed, _, _ = clock.generate(inputs, 5)
    assert torch.equal(plain, timed)


def test_bytes_of_a_plain_cache():
    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.zeros(2, 4, 10, 8), torch.zeros(2, 4, 10, 6), layer)
    assert cache_bytes(cache, 20) == 3 * 20 * 4 * (8 + 6) * 4
    assert cache_bytes(cache, 15) == 3 * 15 * 4 * (8 + 6) * 4
    assert allocated_bytes(cache) == 3 * 20 * 4 * (8 + 6) * 4


# -- pictures ------------------------------------------------------------------------------------------------------


def test_fading_touches_dropped_patches_only():
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    mask = kept_mask([0, 17, 255], 16)
    shown = fade(image, mask)
    inside = np.kron(mask, np.ones((8, 8), dtype=bool))
    assert np.array_equal(shown[inside], image[inside])
    assert inside.sum() == 3 * 64
    assert shown[~inside].min() > 200
    assert np.array_equal(fade(image, np.ones((16, 16), dtype=bool)), image)


def test_a_picture_of_one_scene_and_no_stage(tmp_path):
    image = np.zeros((128, 128, 3), np.uint8)
    scenes = [Shown(image, "what $colour$ is the 5 ?", "red", [("full", "", False)], {})]
    draw_kept(tmp_path / "one.png", scenes, 1.0)
    draw_kept(tmp_path / "all.png", [Shown(image, "q", "a", [], {1: list(range(256)), 5: []})], 0.5)
    assert Image.open(tmp_path / "one.png").size[0] < Image.open(tmp_path / "all.png").size[0]


# -- the trained weights -------------------------------------------------------------------------------------------


def test_the_trained_model_in_a_fresh_process(tmp_path):
    """What a user sees: one object on standard output, a model that answers, and less work under a method."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = ["--questions", "40", "--rounds", "1", "--decode-tokens", "66", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "lightvlm", "demo", "--json", "--threads", "1", *words],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    found = json.loads(done.stdout)
    accuracy = {(row["method"], row["keep"]): row["accuracy"] for row in found["rows"]}
    assert accuracy["full", 1.0] >= 0.8
    assert accuracy["lightvlm", 0.35] > accuracy["random", 0.03]
    assert set(found["op_calls"]) >= OPS


def test_the_trained_model_answers_from_the_command_line(call, tmp_path):
    scenes, questions = demo.draw(8)
    right = 0
    for number, (scene, question) in enumerate(zip(scenes, questions, strict=True)):
        Image.fromarray(scene.image).save(tmp_path / f"{number}.png")
        words = ("--image", tmp_path / f"{number}.png", "--prompt", question.prompt, "--keep", 0.5, "--json")
        result = call("generate", "--model", "reference", *words)
        assert result.status == 0, result.err
        right += result.json["text"] == question.answer
    assert right >= 5


def test_attach_of_a_case_is_undone(loaded):
    model = loaded[0]
    with put(model, lightvlm.LightVLM(keep=0.15)):
        pass
    with put(model, None) as handle:
        assert handle is None
