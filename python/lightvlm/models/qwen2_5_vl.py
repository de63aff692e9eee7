"""Qwen2-VL and Qwen2.5-VL: images of any size, positions with three axes (M-RoPE)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .base import Adapter

if TYPE_CHECKING:
    from torch import Tensor

    from ..layout import Grid


class Qwen2_5_VL(Adapter):
    """Qwen2_5_VLForConditionalGeneration and Qwen2VLForConditionalGeneration; images and videos."""

    classes = ("Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration")

    def image_token_ids(self) -> tuple[int, ...]:
        config = self.model.config
        return (int(config.image_token_id), int(config.video_token_id))

    def image_grids(self, inputs: dict[str, Any], sizes: list[int] | None) -> list[Grid | None] | None:
        # generate() takes the grids away once it has encoded the pictures; then the positions tell them
        present = self._token_grids(inputs)
        return None if sizes is None or present is None else [*present]

    def rotary_tables(self, hidden: Tensor, positions: Tensor) -> Any:
        axes = positions if positions.dim() == 3 else positions[None]
        return self.decoder.rotary_emb(hidden, axes.expand(3, -1, -1))

    def pixel_sizes(self, inputs: dict[str, Any]) -> list[int] | None:
        grids = self._token_grids(inputs)
        return None if grids is None else [math.prod(grid) for grid in grids]

    def _token_grids(self, inputs: dict[str, Any]) -> list[Grid] | None:
        """The grids that come with pixels, in tokens."""
        grids = [inputs.get("image_grid_thw"), inputs.get("video_grid_thw")]
        present = [grid for grid in grids if grid is not None]
        if len(present) != 1:  # images and videos mixed: their order is in the prompt, not in the grids
            return None
        merge = self.model.config.vision_config.spatial_merge_size
        return [(frames, rows // merge, columns // merge) for frames, rows, columns in present[0].tolist()]
