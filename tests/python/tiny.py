"""Tiny random VLMs and batches for them: a LLaVA with a Llama decoder (GQA), an InternVL, and a Qwen2.5-VL with
M-RoPE."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention

IMAGE_ID, VIDEO_ID, VISION_START, VOCABULARY = 60, 61, 58, 64
DEPTH = 5
_SPREAD = 0.25
"""Standard deviation of the weights. Wide enough that attention is far from uniform and tokens differ."""


@dataclass(frozen=True)
class Image:
    """A picture of noise of height x width tokens; LLaVA's, and InternVL's tiles, are always 4 x 4."""

    seed: int
    height: int = 4
    width: int = 4

    @property
    def tokens(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Video:
    """Frames of noise of height x width tokens, each like the one before but for some; Qwen's only."""

    seed: int
    frames: int = 3
    height: int = 2
    width: int = 3

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width


Row = Sequence[int | Image | Video]
"""A prompt: text tokens, images and videos, in reading order."""


class Family:
    """How to build a model of a family, and what its inputs look like."""

    name: str

    def build(
        self, dtype: torch.dtype = torch.float32, attention: str | None = None, **decoder: Any
    ) -> nn.Module:
        """A model in eval mode whose generate() never stops early. ``decoder``: options of the text decoder, and as
        ``tower`` those of the vision tower."""
        torch.manual_seed(3)
        model = self.make(decoder)
        # Built in fp32 and then cast, so that every dtype has the same weights.
        model = model.to(dtype).eval()
        if attention is not None:
            model.set_attn_implementation(attention)
        model.generation_config.eos_token_id = VOCABULARY  # assisted decoding needs one
        model.generation_config.pad_token_id = 0
        model.generation_config.suppress_tokens = [VISION_START, IMAGE_ID, VIDEO_ID]
        return model

    def make(self, decoder: dict[str, Any]) -> Any:
        raise NotImplementedError

    def positions(self, model: Any, mask: Tensor, new: int) -> Tensor:
        """position_ids of the last ``new`` tokens, as generate() passes them to the model."""
        return (mask.cumsum(-1) - 1).clamp_min(0)[:, -new:]

    def pixels(self, images: Sequence[Image], dtype: torch.dtype) -> dict[str, Tensor]:
        raise NotImplementedError

    def batch(
        self, rows: Sequence[Row], dtype: torch.dtype = torch.float32, left: bool = True
    ) -> dict[str, Tensor]:
        """Inputs of a batch; shorter rows are padded, on the left unless told otherwise."""
        lists = [[token for item in row for token in _tokens(item)] for row in rows]
        length = max(map(len, lists))
        ids, mask = [], []
        for tokens in lists:
            pad = [0] * (length - len(tokens))
            ids.append(pad + tokens if left else tokens + pad)
            mask.append(pad + [1] * len(tokens) if left else [1] * len(tokens) + pad)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        images = [item for row in rows for item in row if isinstance(item, Image)]
        return inputs | (self.pixels(images, dtype) if images else {})


class Llava(Family):
    """LlavaForConditionalGeneration."""

    name = "llava"

    def make(self, decoder: dict[str, Any]) -> Any:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            initializer_range=_SPREAD,
        )
        vision.update(decoder.pop("tower", {}))
        options = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 512,
            "initializer_range": _SPREAD,
        }
        text = decoder.pop("config", None) or LlamaConfig(**options | decoder)
        config = LlavaConfig(
            vision_config=vision, text_config=text, image_token_id=IMAGE_ID, vision_feature_layer=-1
        )
        return LlavaForConditionalGeneration(config)

    def pixels(self, images: Sequence[Image], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([_noise(image, 3, 16, 16) for image in images]).to(dtype)}


class InternVL(Family):
    """InternVLForConditionalGeneration: an image is one tile, whose patches are merged two by two."""

    name = "internvl"

    def make(self, decoder: dict[str, Any]) -> Any:
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [4, 4],
            "initializer_range": _SPREAD,
        } | decoder.pop("tower", {})
        text = {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 512,
            "initializer_range": _SPREAD,
        }
        config = InternVLConfig(
            vision_config=vision, text_config=text | decoder, image_token_id=IMAGE_ID, image_seq_length=16
        )
        return InternVLForConditionalGeneration(config)

    def pixels(self, images: Sequence[Image], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([_noise(image, 3, 32, 32) for image in images]).to(dtype)}


class Qwen(Family):
    """Qwen2_5_VLForConditionalGeneration: images of any size."""

    name = "qwen"

    def make(self, decoder: dict[str, Any]) -> Any:
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        vision = {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
            "window_size": 16,
            "initializer_range": _SPREAD,
        } | decoder.pop("tower", {})
        text = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 512,
            "initializer_range": _SPREAD,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 1]},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        config = Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text | decoder,
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            vision_start_token_id=VISION_START,
            vision_end_token_id=59,
        )
        return Qwen2_5_VLForConditionalGeneration(config)

    def positions(self, model: Any, mask: Tensor, new: int) -> Tensor:
        if not self.token_types(mask):  # the deltas of older transformers count padding
            mask = torch.ones_like(mask)
        return super().positions(model, mask, new).expand(3, -1, -1) + model.model.rope_deltas

    def batch(
        self, rows: Sequence[Row], dtype: torch.dtype = torch.float32, left: bool = True
    ) -> dict[str, Tensor]:
        inputs = super().batch(rows, dtype, left)
        ids = inputs["input_ids"]
        # older transformers finds images by the token before them
        for token in (IMAGE_ID, VIDEO_ID):
            before = (ids[:, 1:] == token) & (ids[:, :-1] != token)
            ids[:, :-1][before] = VISION_START
        videos = [item for row in rows for item in row if isinstance(item, Video)]
        if videos:
            inputs["pixel_values_videos"] = torch.cat([_frames(video) for video in videos]).to(dtype)
            sides = [[video.frames, 2 * video.height, 2 * video.width] for video in videos]
            inputs["video_grid_thw"] = torch.tensor(sides)
        return inputs | self.token_types(ids)

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        """Which tokens are images and videos, where the model wants to be told."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

        if "mm_token_type_ids" not in inspect.signature(Qwen2_5_VLModel.forward).parameters:
            return {}
        return {"mm_token_type_ids": (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()}

    def pixels(self, images: Sequence[Image], dtype: torch.dtype) -> dict[str, Tensor]:
        patches = [_noise(image, 4 * image.tokens, 3 * 2 * 4 * 4) for image in images]
        grid = torch.tensor([[1, 2 * image.height, 2 * image.width] for image in images])
        return {"pixel_values": torch.cat(patches).to(dtype), "image_grid_thw": grid}


LLAVA, INTERNVL, QWEN = Llava(), InternVL(), Qwen()


def take_decoding(calls: dict[str, int]) -> int:
    """How often our attention decoded a layer, by either op; they are taken out of a report's op_calls."""
    return calls.pop("decode_attention", 0) + calls.pop("append_attend_", 0)


def _tokens(item: int | Image | Video) -> list[int]:
    if isinstance(item, int):
        return [item]
    return [IMAGE_ID if isinstance(item, Image) else VIDEO_ID] * item.tokens


def _frames(video: Video) -> Tensor:
    """Qwen's patches (frames * patches, values) of a video."""
    generator = torch.Generator().manual_seed(video.seed)
    shape = (4 * video.height * video.width, 3 * 2 * 4 * 4)
    first = torch.randn(*shape, generator=generator)
    changes = torch.randn(video.frames, *shape, generator=generator)
    return (first + 0.5 * changes.cumsum(dim=0)).flatten(0, 1)


def _noise(image: Image, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(image.seed))


def require_same(found: Tensor, expected: Tensor) -> None:
    """The same bits, where transformers' SDPA attends a decoding step as ours does: the heads of a group as rows of a
    query. Before, it repeated keys: the same within rounding."""
    if NEWER or found.dtype != torch.float32:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


NEWER = hasattr(sdpa_attention, "pack_gqa")
"""Whether transformers is newer than 5.17. Until then its beams repeat pictures one by one: the first beams of a row
with two pictures see the first one twice."""


def generate(model: Any, inputs: dict[str, Tensor], tokens: int, **options: Any) -> Tensor:
    """Newly generated tokens (B, T), greedy unless told otherwise."""
    options = {"do_sample": False, **options}
    out = model.generate(**inputs, max_new_tokens=tokens, **options)
    prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return out[:, prompt:]


def generate_logits(
    model: Any, inputs: dict[str, Tensor], tokens: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, T), and the logits (B, T, V) that chose them."""
    out = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def extend(family: Family, model: Any, mask: Tensor, tokens: Tensor, **options: Any) -> tuple[Any, Tensor]:
    """One call of forward() with more tokens (B, S) on a cache; returns its output and the longer mask."""
    mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    positions = family.positions(model, mask, tokens.shape[1])
    return model(input_ids=tokens, attention_mask=mask, position_ids=positions, **options), mask
