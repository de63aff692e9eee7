"""Qwen2-VL and Qwen2.5-VL: images of any size, positions with three axes (M-RoPE)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..host import upload
from .base import Adapter, modules_at

if TYPE_CHECKING:
    from ..layout import Grid


class Qwen2_5_VL(Adapter):
    """Qwen2_5_VLForConditionalGeneration and Qwen2VLForConditionalGeneration; images and videos."""

    classes = ("Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration")

    def image_token_ids(self) -> tuple[int, ...]:
        config = self.model.config
        return (int(config.image_token_id), int(config.video_token_id))

    def image_shapes(self, inputs: dict[str, Any]) -> tuple[list[int] | None, list[Grid | None] | None]:
        # generate() takes the grids away once it has encoded the pictures; then the positions tell them
        grids, encoded = self._token_grids(inputs), self.encoded(inputs)
        if encoded:
            sizes = self.encoded_sizes(encoded)
        else:
            sizes = None if grids is None else [math.prod(grid) for grid in grids]
        return sizes, None if sizes is None or grids is None else [*grids]

    def rotary_tables(self, hidden: Tensor, positions: Tensor) -> Any:
        axes = positions if positions.dim() == 3 else positions[None]
        return self.decoder.rotary_emb(hidden, axes.expand(3, -1, -1))

    def _token_grids(self, inputs: dict[str, Any]) -> list[Grid] | None:
        """The grids that come with pixels, in tokens; reads the device."""
        grids = [inputs.get("image_grid_thw"), inputs.get("video_grid_thw")]
        present = [grid for grid in grids if grid is not None]
        if len(present) != 1:  # images and videos mixed: their order is in the prompt, not in the grids
            return None
        merge = self.model.config.vision_config.spatial_merge_size
        return [(frames, rows // merge, columns // merge) for frames, rows, columns in present[0].tolist()]

    @property
    def tower(self) -> Any:
        return self.base.visual

    def tower_attentions(self) -> list[nn.Module]:
        return modules_at(self.tower, ("blocks",), "attn")

    def tower_layer(self, layer: int) -> int:
        full = getattr(self.tower.config, "fullatt_block_indexes", None)
        if full is None:  # Qwen2-VL has no windows
            return layer
        if not full:
            raise ValueError("plan reads the vision tower, which has no layer in which a whole frame attends")
        return min(sorted(full), key=lambda one: abs(one - layer))

    def tower_grids(self, inputs: dict[str, Any]) -> list[Grid] | None:
        return [(int(t), int(h), int(w)) for t, h, w in inputs["grid_thw"].tolist()]

    def tower_tokens(self, patches: Tensor, grid: Grid | None) -> Tensor:
        assert grid is not None
        config, merge = self.tower.config, self.tower.config.spatial_merge_size
        tokens = patches.unflatten(0, (-1, merge**2)).mean(1)  # patches of a token stand side by side
        size = getattr(config, "window_size", None)
        if size is None:
            return tokens
        order = _window_order(grid[0], grid[1] // merge, grid[2] // merge, size // merge // config.patch_size)
        return tokens.index_select(0, upload(order.argsort(), tokens.device, torch.int64))


def _window_order(frames: int, height: int, width: int, size: int) -> Tensor:
    """Tokens of a grid in the order in which the tower has them: window after window of size x size, each row-major."""
    row = torch.arange(height)[:, None].expand(height, width)
    column = torch.arange(width)[None].expand(height, width)
    across, down = -(-width // size), -(-height // size)
    frame = torch.arange(frames)[:, None, None] * across * down
    return (frame + row // size * across + column // size).flatten().argsort(stable=True)
