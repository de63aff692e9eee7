"""Images as the model takes them, and what each of their patches shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .backgrounds import SIDE
from .build import GRID, MEAN, PATCH, STD
from .scenes import NAMES, Scene

if TYPE_CHECKING:
    from collections.abc import Sequence


def pixels(scenes: Sequence[Scene]) -> torch.Tensor:
    """Images as the processor makes them: float32 (B, 3, 128, 128)."""
    batch = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    return (batch.float() / 255 - MEAN) / STD


def patch_targets(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Per patch: digit + 1 and colour + 1 (0: none), int64 (B, 256, 2), and the digit's centre / 128, (B,
    256, 2).

    A patch belongs to a digit if the digit's box, three quarters as wide as high, covers at least half of it.
    """
    edges = np.arange(GRID) * PATCH
    classes = np.zeros((len(scenes), GRID, GRID, 2), dtype=np.int64)
    centres = np.zeros((len(scenes), GRID, GRID, 2), dtype=np.float32)
    for row, scene in enumerate(scenes):
        for digit in scene.digits:
            half = digit.size * 0.4
            across, down = (
                np.clip(np.minimum(edges + PATCH, c + h) - np.maximum(edges, c - h), 0, PATCH) / PATCH
                for c, h in ((digit.x, 0.75 * half), (digit.y, half))
            )
            inside = down[:, None] * across[None, :] >= 0.5
            classes[row, inside] = (digit.digit + 1, NAMES.index(digit.colour) + 1)
            centres[row, inside] = (digit.x / SIDE, digit.y / SIDE)
    return torch.from_numpy(classes).flatten(1, 2), torch.from_numpy(centres).flatten(1, 2)
