"""The examples in the documentation do what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import models, plan
from python.test_prefill import ROWS, lightvlm_plan
from python.tiny import IMAGE_ID, LLAVA, Image, generate, generate_logits

DOCS = Path(__file__).resolve().parents[2] / "docs"


def example(name: str) -> dict[str, Any]:
    """What the Python block of a page defines."""
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)
    found: dict[str, Any] = {"__name__": f"docs_{name}"}
    exec(compile(block, str(DOCS / name), "exec"), found)
    return found


@pytest.fixture
def last_token() -> Iterator[Any]:
    import sys
    import types

    kinds = dict(plan._KINDS)
    # dataclasses look a string annotation up in the module that it came from
    module = types.ModuleType("docs_adding-a-method.md")
    sys.modules[module.__name__] = module
    yield example("adding-a-method.md")["LastToken"]
    del sys.modules[module.__name__]
    plan._KINDS.clear()
    plan._KINDS.update(kinds)


def test_adding_a_method(llava: Any, last_token: Any) -> None:
    """It is what LightVLM's options can be set to, and a plan like any other."""
    inputs = LLAVA.batch(ROWS)
    with lightvlm.attach(llava, lightvlm_plan(layers=(2,), probe_rows="last", selection="top", merge="drop")):
        expected = generate_logits(llava, inputs, 4)[1]
    found = last_token(0.3, min_image_tokens=0)
    assert lightvlm.Plan.from_json(found.to_json()) == found
    with lightvlm.attach(llava, found):
        assert torch.equal(generate_logits(llava, inputs, 4)[1], expected)
    with pytest.raises(ValueError, match="layer must be at least 1, got 0"):
        last_token(layer=0)


def vip_llava() -> Any:
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    config = VipLlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "num_hidden_layers": 2, "image_size": 16, "patch_size": 4, **sizes,
        },
        text_config={
            "model_type": "llama", "num_hidden_layers": 5, "num_key_value_heads": 2, "vocab_size": 64,
            "initializer_range": 0.25, **sizes,
        },
        image_token_index=IMAGE_ID,
        vision_feature_layers=[-1, -2],
    )  # fmt: skip
    model = VipLlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.generation_config.suppress_tokens = [IMAGE_ID]
    return model


def test_adding_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vip_llava()
    with pytest.raises(
        TypeError, match="model is a VipLlavaForConditionalGeneration, which lightvlm does not know"
    ):
        lightvlm.attach(model, lightvlm.Plan())
    family = example("adding-a-model.md")["VipLlava"]
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, family))

    rows = [[1, Image(0), Image(1), 2, 3], [1, Image(2), *range(2, 11)]]
    inputs = LLAVA.batch(rows)
    full = generate(model, inputs, 6)
    with lightvlm.attach(model, lightvlm.LightVLM(keep=1, decode_keep=None)):
        assert torch.equal(generate(model, inputs, 6), full)
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan(), trace=True) as run:
        together = generate(model, inputs, 6)
        kept = run.kept
        model(**inputs)
        assert run.kept == kept
        alone = [generate(model, LLAVA.batch([row]), 6)[0] for row in rows]
    assert [[len(image) for image in row] for row in kept[3]] == [[5, 5], [5]]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together, full)
    assert run.report().stepped_aside == {}


def test_a_paged_cache(llava: Any) -> None:
    """Two requests in turn are answered as they would be alone, and leave no page behind."""
    requests = [LLAVA.batch([row]) for row in (ROWS[0], ROWS[2])]
    plan = lightvlm.LightVLM(
        keep=0.3, min_image_tokens=0, decode_keep=0.3, decode_interval=3, decode_recent=6, decode_sinks=1
    )
    pages = lightvlm.KVPages(llava.config, pages=40, page_size=16)
    found = example("paged-cache.md")["in_turn"](llava, requests, plan, pages, 24)
    assert pages.available == 40
    with lightvlm.attach(llava, plan):
        for request, tokens in zip(requests, found, strict=True):
            assert torch.equal(generate(llava, request, 24), tokens)


def test_generate(llava: Any) -> None:
    inputs = LLAVA.batch(ROWS)
    out, report = example("generate.md")["answer"](llava, inputs)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 512
    assert report.prefills == len(ROWS)
