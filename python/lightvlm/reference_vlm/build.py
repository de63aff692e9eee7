"""The reference VLM's configuration, tokenizer and processor: a LLaVA of about 2.3 million parameters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .backgrounds import SIDE
from .scenes import NAMES

if TYPE_CHECKING:
    from pathlib import Path

PATCH = 8
GRID = SIDE // PATCH
IMAGE_TOKENS = GRID * GRID
MEAN = STD = 0.5
"""Pixel normalisation, the same for the three channels."""
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
_PROMPTS = "which digit is what colour the how many digits are there read all from left to right"
_WORDS = ("user", "assistant", "?", *_PROMPTS.split())
VOCABULARY = (*SPECIAL, *_WORDS, *(str(d) for d in range(10)), *NAMES)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ' ' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image> ' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over `VOCABULARY`: lower-cases, splits off punctuation, pads on the left."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _image_processor_class() -> Any:
    """CLIP's image processor that works on PIL images, without torchvision."""
    try:
        module = import_module("transformers.models.clip.image_processing_pil_clip")
        return module.CLIPImageProcessorPil
    except ImportError:  # transformers 5.0 has it under the plain name
        return import_module("transformers.models.clip.image_processing_clip").CLIPImageProcessor


def build_processor() -> LlavaProcessor:
    """Processor: images to (3, 128, 128) in [-1, 1], `<image>` to 256 placeholders, and the chat template."""
    side = {"height": SIDE, "width": SIDE}
    image_processor = _image_processor_class()(
        size=side,
        crop_size=side,
        do_center_crop=False,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config() -> LlavaConfig:
    """CLIP tower of 3 layers, 128 wide, and a Llama decoder of 8 layers, 128 wide, 4 query and 2 KV heads."""
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=128,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
        pad_token_id=ids["<pad>"],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )


_FREQUENCIES = torch.linspace(0.05, 1.6, 32)
# The eight of them, 0.4 and up, with which a head finds a neighbour.
_NEAR = torch.tensor([7, 10, 13, 17, 20, 24, 27, 31])
_GAIN = 1.8
_SIDEWAYS = ((0, 1), (0, -1), (1, 0), (-1, 0))
_DIAGONAL = ((1, 1), (1, -1), (-1, 1), (-1, -1))


def _position_codes() -> torch.Tensor:
    """Sines and cosines of the row, then of the column, (256, 128)."""
    phase = torch.arange(GRID, dtype=torch.float32)[:, None] * _FREQUENCIES
    wave = torch.cat([torch.sin(phase), torch.cos(phase)], -1)
    rows, columns = wave[:, None].expand(GRID, GRID, -1), wave[None].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], -1).reshape(IMAGE_TOKENS, -1)


def _look_at(offset: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key weights, (32, 128) each, of a head whose logit peaks at the patch `offset` (down, right)
    away.

    The query copies the codes of its position, the key turns its own back by the offset, so the logit is a
    sum of cos(f (distance - offset)), as in ConViT's convolutional initialisation (d'Ascoli et al., 2021).
    """
    query, key = torch.zeros(32, 128), torch.zeros(32, 128)
    half = len(_FREQUENCIES)
    for axis, step in enumerate(offset):
        sine = axis * 2 * half + _NEAR
        cosine = sine + half
        out = axis * 16 + torch.arange(8)
        turn = _FREQUENCIES[_NEAR] * step
        query[out, sine] = query[out + 8, cosine] = 1.0
        key[out, sine], key[out, cosine] = torch.cos(turn), -torch.sin(turn)
        key[out + 8, sine], key[out + 8, cosine] = torch.sin(turn), torch.cos(turn)
    return _GAIN * query, _GAIN * key


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """A randomly initialised model, float32, whose tower starts out like a small convolutional network.

    Each head of the tower first looks at one neighbouring patch; without that, a tower of this size needs
    several times as many images before it can tell digits apart.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config())
    vision = model.model.vision_tower
    with torch.no_grad():
        for name, parameter in vision.named_parameters():
            # CLIP's own initialisation of 0.01 to 0.02 is meant for widths of 768 and more.
            if parameter.ndim == 2 and "position" not in name:
                torch.nn.init.normal_(parameter, std=0.6 / parameter.shape[1] ** 0.5)
        torch.nn.init.normal_(vision.embeddings.patch_embedding.weight, std=1.0 / (3 * PATCH * PATCH) ** 0.5)
        vision.embeddings.position_embedding.weight[1:] = _position_codes()
        for layer, offsets in zip(vision.encoder.layers, (_SIDEWAYS, _DIAGONAL, _SIDEWAYS), strict=True):
            weights = [_look_at(offset) for offset in offsets]
            layer.self_attn.q_proj.weight.copy_(torch.cat([query for query, _ in weights]))
            layer.self_attn.k_proj.weight.copy_(torch.cat([key for _, key in weights]))
        for part in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            torch.nn.init.normal_(part.weight, std=1.0 / part.weight.shape[1] ** 0.5)
    model.generation_config.pad_token_id = 0
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = 2
    model.generation_config.max_new_tokens = 12
    model.generation_config.do_sample = False
    return model


def save(model: LlavaForConditionalGeneration, directory: Path) -> None:
    """Write fp16 weights, configuration, tokenizer and processor for AutoModel and AutoProcessor to load.

    The tower's tensors get the names of published LLaVA checkpoints, which every transformers from 5.0 on reads;
    newer versions write shorter ones that older versions leave out.
    """
    model.half().save_pretrained(directory)
    file = directory / "model.safetensors"
    old, new = "vision_tower.", "vision_tower.vision_model."
    tensors = {
        name if name.startswith(new) else name.replace(old, new, 1): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    build_processor().save_pretrained(directory)
