"""Models of the families that are built otherwise than the tiny ones: towers, decoders, videos; and what is refused."""

from __future__ import annotations

from typing import Any

import lightvlm
import pytest
import torch
from python.test_prefill import ROWS, lightvlm_plan
from python.tiny import IMAGE_ID, LLAVA, QWEN, VIDEO_ID, VISION_START, Image, generate
from torch import Tensor

_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llava(tower: Any, strategy: str = "default", decoder: Any = None) -> Any:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=tower,
        text_config=decoder or LlamaConfig(**_DECODER),
        image_token_id=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.generation_config.suppress_tokens = [IMAGE_ID]
    return model


def tower(kind: str) -> Any:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    build = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[kind]
    return build(image_size=16, patch_size=4, **_TOWER)


@pytest.mark.parametrize(
    ("kind", "strategy", "tokens"),
    [("clip", "default", 16), ("clip", "full", 17), ("siglip", "full", 16), ("siglip", "default", 15)],
)
def test_tokens_of_a_tower(kind: str, strategy: str, tokens: int) -> None:
    """Known in generate(), which runs the tower first, and in forward(), where the configuration says it."""
    model = llava(tower(kind), strategy)
    ids = torch.tensor([[1] + [IMAGE_ID] * 2 * tokens + [2, 3]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= LLAVA.pixels([Image(0), Image(1)], torch.float32)
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan(), trace=True) as run:
        generate(model, inputs, 2)
        generated = run.kept
        model(**inputs)
    assert run.kept == generated
    assert [len(image) for image in run.kept[3][0]] == [int(0.3 * tokens + 0.5)] * 2
    assert run.report().stepped_aside == {}


def test_rows_of_an_image_that_are_parted_by_tokens_step_aside() -> None:
    """Pixtral ends every row of patches with a token of text: there is no telling where one image ends."""
    from transformers import PixtralVisionConfig

    model = llava(PixtralVisionConfig(image_size=16, patch_size=4, head_dim=8, **_TOWER), "full")
    ids = torch.tensor([[1] + ([IMAGE_ID] * 4 + [7]) * 3 + [2, 3]])
    pixels = LLAVA.pixels([Image(0)], torch.float32)["pixel_values"][:, :, :12]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    inputs["image_sizes"] = torch.tensor([[12, 16]])
    expected = generate(model, inputs, 3)
    with torch.no_grad(), lightvlm.attach(model, lightvlm_plan()) as run:
        assert torch.equal(generate(model, inputs, 3), expected)
        model(**inputs)
    assert run.report().stepped_aside == {
        "an image's placeholder tokens are interrupted by text, or too few": 2
    }


@pytest.mark.parametrize("name", ["MistralConfig", "Qwen2Config", "Qwen3Config", "GemmaConfig"])
def test_other_decoders(name: str) -> None:
    """Any decoder that is built like Llama: a batch gives what its rows give, and keeping all is the baseline."""
    import transformers

    options = _DECODER | {"head_dim": 8, "initializer_range": 0.2}
    if name == "MistralConfig":
        options["sliding_window"] = None
    model = llava(tower("clip"), decoder=getattr(transformers, name)(**options))
    model.generation_config.suppress_tokens = [IMAGE_ID]
    inputs = LLAVA.batch(ROWS)
    expected = generate(model, inputs, 6)
    with lightvlm.attach(model, lightvlm.LightVLM(keep=1, decode_keep=None)):
        assert torch.equal(generate(model, inputs, 6), expected)
    plan = lightvlm.LightVLM(
        keep=0.3, min_image_tokens=0, decode_keep=0.3, decode_interval=2, decode_recent=4
    )
    with lightvlm.attach(model, plan) as run:
        together = generate(model, inputs, 6)
        alone = [generate(model, LLAVA.batch([row]), 6)[0] for row in ROWS]
    assert torch.equal(together, torch.stack(alone))
    assert run.report().compactions == 2 * 4  # the row of three tokens does not need any by itself
    assert run.report().stepped_aside == {}


def _gpt_neox() -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )


def _gemma2() -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(head_dim=8, layer_types=["full_attention"] * 5, **_DECODER)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (_gpt_neox, "model has a GPTNeoXModel whose layers are not where lightvlm looks"),
        (_gemma2, "model caps its attention logits"),
    ],
)
def test_decoders_that_are_refused(decoder: Any, message: str) -> None:
    model = llava(tower("clip"), decoder=decoder())
    with pytest.raises(ValueError, match=message):
        lightvlm.attach(model, lightvlm_plan())


def test_several_devices_are_refused() -> None:
    model = LLAVA.build()
    model.model.language_model.layers[3].to("meta")
    with pytest.raises(ValueError, match=r"decoder layers on several devices \(cpu, meta\)"):
        lightvlm.attach(model, lightvlm_plan())


def test_tensor_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLAVA.build()
    monkeypatch.setattr(type(model), "tp_size", 2)
    with pytest.raises(ValueError, match="model is split by tensor parallelism"):
        lightvlm.attach(model, lightvlm_plan())


# -- videos


def video(frames: int, height: int, width: int) -> dict[str, Tensor]:
    """A video of frames x height x width tokens."""
    patches = torch.randn(
        frames * 4 * height * width, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)
    )
    grid = torch.tensor([[frames, 2 * height, 2 * width]])
    return {"pixel_values_videos": patches, "video_grid_thw": grid, "second_per_grid_ts": torch.tensor([1.0])}


def video_prompt(before: list[int], tokens: int, after: list[int]) -> dict[str, Tensor]:
    ids = torch.tensor([[*before, VISION_START, *[VIDEO_ID] * tokens, *after]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **QWEN.token_types(ids)}


def test_a_video_is_reduced_as_one(qwen: Any) -> None:
    inputs = video_prompt([1], 24, [3, 4, 5]) | video(2, 3, 4)
    full = generate(qwen, inputs, 6)
    with torch.no_grad(), lightvlm.attach(qwen, lightvlm_plan(), trace=True) as run:
        reduced = generate(qwen, inputs, 6)
        kept = run.kept[3]
        qwen(**inputs)
    assert run.kept[3] == kept
    assert [len(image) for image in kept[0]] == [7]  # 0.3 of 24
    assert run.report().stepped_aside == {}
    assert not torch.equal(reduced, full)


def test_a_video_and_an_image(qwen: Any) -> None:
    inputs = video_prompt([VISION_START, *[IMAGE_ID] * 16], 24, [3, 4, 5])
    inputs |= video(2, 3, 4) | QWEN.pixels([Image(0)], torch.float32)
    with torch.no_grad(), lightvlm.attach(qwen, lightvlm_plan(), trace=True) as run:
        generate(qwen, inputs, 4)
        kept = run.kept[3]
        qwen(**inputs)
    assert run.kept[3] == kept
    assert [len(image) for image in kept[0]] == [5, 7]
    assert run.report().stepped_aside == {}


def test_qwen2_vl() -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1,
            "patch_size": 4, "spatial_merge_size": 2,
        },
        text_config=_DECODER | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 1]},
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2,
        },
        image_token_id=IMAGE_ID, video_token_id=VIDEO_ID, vision_start_token_id=58, vision_end_token_id=59,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    model.generation_config.suppress_tokens = [58, 59, IMAGE_ID, VIDEO_ID]
    inputs = QWEN.batch(ROWS)
    expected = generate(model, inputs, 6)
    with lightvlm.attach(model, lightvlm.LightVLM(keep=1, decode_keep=None)):
        assert torch.equal(generate(model, inputs, 6), expected)
    with lightvlm.attach(model, lightvlm_plan()) as run:
        together = generate(model, inputs, 6)
        alone = [generate(model, QWEN.batch([row]), 6)[0] for row in ROWS]
    assert torch.equal(together, torch.stack(alone))
    assert run.report().image_tokens_kept[-1] == pytest.approx(20 / 3)
