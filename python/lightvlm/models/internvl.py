"""InternVL (the classes native to transformers): a picture is cut into tiles, each the same number of tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .base import Adapter, modules_at

if TYPE_CHECKING:
    from ..layout import Grid


class InternVL(Adapter):
    """InternVLForConditionalGeneration: its tiles stand side by side in the prompt, and each keeps its share."""

    classes = ("InternVLForConditionalGeneration",)

    def pixel_sizes(self, inputs: dict[str, Any]) -> list[int] | None:
        pixels = inputs.get("pixel_values")
        return None if pixels is None else [self.model.config.image_seq_length] * pixels.shape[0]

    @property
    def tower_has_class_token(self) -> bool:
        return True

    def tower_attentions(self) -> list[nn.Module]:
        return modules_at(self.tower, ("encoder.layer",), "attention")

    def tower_tokens(self, patches: Tensor, grid: Grid | None) -> Tensor:
        # without the class token; the pixel shuffle joins squares of a square picture
        pictures, channels = len(patches), patches.shape[-1]
        side, joined = math.isqrt(patches.shape[1] - 1), round(1 / self.model.config.downsample_ratio)
        squares = patches[:, 1:].reshape(pictures, side // joined, joined, side // joined, joined, channels)
        return squares.mean((2, 4)).flatten(1, 2)
