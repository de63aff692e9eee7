"""LLaVA 1.5 and models of its shape: every image is the same number of tokens."""

from __future__ import annotations

from typing import Any

from .base import Adapter


class Llava(Adapter):
    """LlavaForConditionalGeneration, with any Llama-like text decoder."""

    classes = ("LlavaForConditionalGeneration",)

    def pixel_sizes(self, inputs: dict[str, Any]) -> list[int] | None:
        pixels = inputs.get("pixel_values")
        if pixels is None or inputs.get("image_sizes") is not None:
            return None
        vision = self.model.config.vision_config
        patch = vision.patch_size
        tokens = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        if self.model.config.vision_feature_select_strategy == "full":
            tokens += 1
        return [tokens] * pixels.shape[0]
