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
from python.tiny import IMAGE_ID, LLAVA, generate, generate_logits
from torch import Tensor

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


def internvl() -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    sizes = {"intermediate_size": 32, "num_attention_heads": 4}
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "image_size": [32, 32], "patch_size": [4, 4], **sizes,
        },
        text_config={
            "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 5, "num_key_value_heads": 2,
            "vocab_size": 64, "initializer_range": 0.25, **sizes,
        },
        image_token_id=IMAGE_ID,
        image_seq_length=16,
    )  # fmt: skip
    model = InternVLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.generation_config.suppress_tokens = [IMAGE_ID]
    return model


def tiles(counts: list[int], texts: list[int]) -> dict[str, Tensor]:
    """Rows of a picture of so many tiles, and so many tokens of text."""
    rows = [[1, *[IMAGE_ID] * 16 * n, *range(2, 2 + text)] for n, text in zip(counts, texts, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    pixels = torch.randn(sum(counts), 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": (ids > 0).int(), "pixel_values": pixels}


def test_adding_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = internvl()
    with pytest.raises(
        TypeError, match="model is a InternVLForConditionalGeneration, which lightvlm does not know"
    ):
        lightvlm.attach(model, lightvlm.Plan())
    family = example("adding-a-model.md")["InternVL"]
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, family))

    inputs = tiles([2, 1], [3, 9])
    full = generate(model, inputs, 6)
    with lightvlm.attach(model, lightvlm.LightVLM(keep=1, decode_keep=None)):
        assert torch.equal(generate(model, inputs, 6), full)
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan(), trace=True) as run:
        together = generate(model, inputs, 6)
        kept = run.kept
        model(**inputs)
        assert run.kept == kept
        alone = []
        for row, pixels in enumerate(inputs["pixel_values"].split([2, 1])):
            real = inputs["attention_mask"][row].bool()
            ids = inputs["input_ids"][row : row + 1, real]
            one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
            alone.append(generate(model, one, 6)[0])
    assert [[len(tile) for tile in row] for row in kept[3]] == [[5, 5], [5]]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together, full)
    assert run.report().stepped_aside == {}
