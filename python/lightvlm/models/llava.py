"""LLaVA 1.5 and models of its shape: every image is the same number of tokens."""

from __future__ import annotations

from typing import Any

import torch

from .base import Adapter


class Llava(Adapter):
    """LlavaForConditionalGeneration, with any Llama-like text decoder."""

    classes = ("LlavaForConditionalGeneration",)

    def pixel_sizes(self, inputs: dict[str, Any]) -> list[int] | None:
        pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
        if pixels is None:
            return None
        config, vision = self.model.config, self.model.config.vision_config
        patch = vision.patch_size
        if sizes is not None:  # Pixtral: images of any size, padded to one
            return [(height // patch) * (width // patch) for height, width in torch.as_tensor(sizes).tolist()]
        tokens = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        tokens += vision.model_type == "clip_vision_model"  # its class token
        tokens -= config.vision_feature_select_strategy == "default"  # drops the first token, whatever it is
        return [tokens] * pixels.shape[0]
