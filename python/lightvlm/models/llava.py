"""LLaVA 1.5 and models of its shape: every image is the same number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import Adapter, modules_at

if TYPE_CHECKING:
    from ..layout import Grid


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

    @property
    def tower_has_class_token(self) -> bool:
        return self.tower.config.model_type == "clip_vision_model"

    def tower_attentions(self) -> list[nn.Module]:
        if self.tower.config.model_type not in ("clip_vision_model", "siglip_vision_model"):
            return super().tower_attentions()
        # transformers before 5.4 or so have the encoder one module further down
        return modules_at(self.tower, ("encoder.layers", "vision_model.encoder.layers"), "self_attn")

    def tower_tokens(self, patches: Tensor, grid: Grid | None) -> Tensor:
        drops = self.model.config.vision_feature_select_strategy == "default"  # the first, whatever it is
        return patches[:, 1:] if drops else patches
