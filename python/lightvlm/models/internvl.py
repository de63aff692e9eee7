"""InternVL (the classes native to transformers): a picture is cut into tiles, each the same number of tokens."""

from __future__ import annotations

from typing import Any

from .base import Adapter


class InternVL(Adapter):
    """InternVLForConditionalGeneration: its tiles stand side by side in the prompt, and each keeps its share."""

    classes = ("InternVLForConditionalGeneration",)

    def pixel_sizes(self, inputs: dict[str, Any]) -> list[int] | None:
        pixels = inputs.get("pixel_values")
        return None if pixels is None else [self.model.config.image_seq_length] * pixels.shape[0]
