"""Images and a prompt into a model's inputs: transformers' processor, or one composed of its parts.

Some processor classes cannot be built without torchvision, because they want a video processor. Their image processor
and tokenizer can, and what the class adds for images is little: the placeholder of an image becomes as many tokens as
the image has features.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, PretrainedConfig

COMPOSED = ("qwen2_vl", "qwen2_5_vl")
"""Model types whose processor is composed where torchvision is missing."""


def load_processor(name_or_path: str, config: PretrainedConfig, **options: Any) -> Any:
    """The processor of a model: its own class, or a :class:`QwenImages` where that needs torchvision.

    Args:
        name_or_path: folder or hub id.
        config: the model's configuration.
        options: for ``from_pretrained``.

    Raises:
        ValueError: no image processor there.
        ImportError: a class that cannot be built here.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    # Asked beforehand, because what the class raises without torchvision differs between versions of transformers.
    if config.model_type in COMPOSED and importlib.util.find_spec("torchvision") is None:
        return QwenImages(
            AutoImageProcessor.from_pretrained(name_or_path, **options),
            AutoTokenizer.from_pretrained(name_or_path, **options),
            config,
        )
    processor = AutoProcessor.from_pretrained(name_or_path, **options)
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"{name_or_path} has no image processor (preprocessor_config.json)")
    return processor


class QwenImages:
    """The image part of Qwen2VLProcessor and Qwen2_5_VLProcessor, with the same calls."""

    def __init__(self, image_processor: Any, tokenizer: Any, config: PretrainedConfig) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template
        self.image_token_id = int(config.image_token_id)
        self.image_token: str = tokenizer.convert_ids_to_tokens(self.image_token_id)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The conversation as text, one placeholder an image."""
        text: str = self.tokenizer.apply_chat_template(messages, **options)
        return text

    def __call__(self, *, text: Sequence[str], images: Sequence[Image], **options: Any) -> BatchFeature:
        """Tokens (B, S) and patches; the i-th placeholder over all texts stands for the i-th image.

        An image of t x h x w patches becomes t * h * w / merge_size ** 2 placeholders; ``mm_token_type_ids`` (B, S) is
        1 where they stand.

        Raises:
            ValueError: the texts have more or fewer placeholders than there are images.
        """
        import torch
        from transformers import BatchFeature

        wanted = sum(part.count(self.image_token) for part in text)
        if wanted != len(images):
            raise ValueError(f"the prompt has {wanted} image placeholders for {len(images)} images")
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        merged = self.image_processor.merge_size**2
        sizes = iter([int(size) // merged for size in pixels["image_grid_thw"].prod(dim=-1)])
        expanded = []
        for part in text:
            first, *rest = part.split(self.image_token)
            expanded.append(first + "".join(self.image_token * next(sizes) + after for after in rest))
        tokens = self.tokenizer(expanded, **{**options, "return_tensors": "pt"})
        types = (tokens["input_ids"] == self.image_token_id).to(torch.long)
        return BatchFeature({**tokens, **pixels, "mm_token_type_ids": types})

    def batch_decode(self, tokens: Any, **options: Any) -> list[str]:
        """Tokens (B, S) as text."""
        texts: list[str] = self.tokenizer.batch_decode(tokens, **options)
        return texts


def encode(processor: Any, images: Sequence[Image], prompt: str) -> BatchFeature:
    """Inputs of a model for one question about some images, batch 1.

    The chat template is used where the processor has one; else the text is a placeholder for each image and the prompt.
    """
    if processor.chat_template is not None:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = "".join(f"{processor.image_token}\n" for _ in images) + prompt
    # A template that writes the first token itself would get it twice.
    bos = processor.tokenizer.bos_token
    return processor(
        text=[text],
        images=list(images),
        add_special_tokens=not (bos and text.startswith(bos)),
        return_tensors="pt",
    )
