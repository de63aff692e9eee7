"""Qwen2-VL and Qwen2.5-VL: images of any size, positions with three axes (M-RoPE)."""

from __future__ import annotations

from typing import Any

from .base import Adapter


class Qwen2_5_VL(Adapter):
    """Qwen2_5_VLForConditionalGeneration and Qwen2VLForConditionalGeneration; images and videos."""

    classes = ("Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration")

    def image_token_ids(self) -> tuple[int, ...]:
        config = self.model.config
        return (int(config.image_token_id), int(config.video_token_id))

    def pixel_sizes(self, inputs: dict[str, Any]) -> list[int] | None:
        grids = [inputs.get("image_grid_thw"), inputs.get("video_grid_thw")]
        present = [grid for grid in grids if grid is not None]
        if len(present) != 1:  # images and videos mixed: their order is in the prompt, not in the grids
            return None
        merge = self.model.config.vision_config.spatial_merge_size
        return [int(size) // merge**2 for size in present[0].prod(dim=-1).tolist()]
