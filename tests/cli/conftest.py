"""Tiny models in folders, and the command line called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightvlm import reference_vlm
from lightvlm.cli import main
from PIL import Image

QWEN_SPECIAL = [
    "<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<unk>",
]  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


class Result(NamedTuple):
    """What a call of the command line left."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small for more, and where others compute too, threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line in this process."""

    def run(*words: object) -> Result:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image file."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (150, 210, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen2.5-VL of 6 layers, its image processor and a word-level tokenizer."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("qwen")
    words = [
        *QWEN_SPECIAL,
        "user",
        "assistant",
        "what",
        "is",
        "this",
        "picture",
        "?",
        "and",
        "that",
        "a",
        "b",
    ]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=QWEN_SPECIAL[1:7],
        padding_side="left",
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    # As in the folders on the hub, which name a class that needs torchvision in some versions of transformers.
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 56**2, "max_pixels": 224**2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
        },
        text_config={
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reference VLM before training: a LLaVA with its processor."""
    from lightvlm.reference_vlm.build import build_model, save

    folder = tmp_path_factory.mktemp("untrained")
    save(build_model(0), folder)
    return folder


@pytest.fixture
def reference_is_untrained(monkeypatch: pytest.MonkeyPatch, untrained: Path) -> None:
    """Puts the untrained model in the place of the reference VLM, where answers do not matter."""
    monkeypatch.setattr(reference_vlm, "path", lambda: untrained)
