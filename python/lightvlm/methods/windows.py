"""Windows of an image's tokens, for LightKV: how many tokens each has, and how many are merged, on the host.

Which tokens a stage merges the device decides; how many, follows from the number of tokens alone, so that every later
layer can be planned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .base import Picture

Raster = Literal["square", "grid"]


@dataclass(frozen=True)
class Windows:
    """Windows of one image at one stage.

    of (n,) int64 on the CPU: number of the window of a token; n are the tokens left, in their order, on a square
        raster, and the original ones on the image's own grid.
    sizes: tokens in each window.   merged: pairs merged in each.
    """

    of: Tensor
    sizes: list[int]
    merged: list[int]

    @property
    def left(self) -> int:
        """Tokens after the stage."""
        return sum(self.sizes) - sum(self.merged)


def windows_of(
    pictures: Sequence[Picture], sides: Sequence[Sequence[int]], ratios: Sequence[float], raster: Raster
) -> list[Windows] | None:
    """The windows of a row's images at the last of several stages; None: the stage leaves the row alone.

    A stage is skipped where an image has fewer than 8 tokens a window, as in LightKV's code.

    Args:
        pictures: the images; what they had at first counts, and their grid.
        sides: for each image, windows a side at each stage so far.   ratios: share merged at each.
    """
    images = [_Image(picture, raster, side[0]) for picture, side in zip(pictures, sides, strict=True)]
    found: list[Windows] | None = None
    for number, ratio in enumerate(ratios):
        at = [side[number] for side in sides]
        if any(one.tokens < 8 * one.frames * side**2 for one, side in zip(images, at, strict=True)):
            found = None
            continue
        found = [one.merge(side, ratio) for one, side in zip(images, at, strict=True)]
    return found


class _Image:
    """One image on its way through the stages."""

    def __init__(self, picture: Picture, raster: Raster, side: int) -> None:
        self.tokens, self.frames = picture.original, 1
        self._cell: Tensor | None = None
        if raster == "square" or picture.grid is None:
            return
        # Its own grid: the windows of the first stage are cells, and later windows are whole numbers of them, so that
        # what is left in each is known.
        self.frames, height, width = picture.grid
        self._side = side
        rows, columns = (torch.arange(size) * side // size for size in (height, width))
        cell = rows[:, None] * side + columns
        self._cell = (torch.arange(self.frames)[:, None, None] * side**2 + cell).flatten()
        self._counts = torch.bincount(self._cell, minlength=self.frames * side**2).tolist()

    def merge(self, side: int, ratio: float) -> Windows:
        """The windows of the next stage, after which the image has fewer tokens."""
        if self._cell is None:
            of = _square(self.tokens, side)
            sizes = torch.bincount(of, minlength=side**2).tolist()
            merged = [_pairs(size, ratio) for size in sizes]
            self.tokens -= sum(merged)
            return Windows(of, sizes, merged)
        cells = range(len(self._counts))
        window = [self._window(cell, side) for cell in cells]
        sizes = [0] * (self.frames * side**2)
        for cell in cells:
            sizes[window[cell]] += self._counts[cell]
        merged = [_pairs(size, ratio) for size in sizes]
        of = torch.tensor(window)[self._cell]
        self.tokens -= sum(merged)
        # from here on only sums over whole windows are known, and are asked for
        first = {at: cell for cell, at in reversed(list(enumerate(window)))}
        self._counts = [0] * len(self._counts)
        for at, cell in first.items():
            self._counts[cell] = sizes[at] - merged[at]
        return Windows(of, sizes, merged)

    def _window(self, cell: int, side: int) -> int:
        frame, inside = divmod(cell, self._side**2)
        row, column = divmod(inside, self._side)
        step = self._side // side
        return frame * side**2 + row // step * side + column // step


def _pairs(size: int, ratio: float) -> int:
    """Pairs that a window of so many tokens merges: as many as it has destinations at most."""
    return min(math.floor(ratio * size + 1e-9), size // 2)


def _square(tokens: int, side: int) -> Tensor:
    """Window of each of so many tokens, laid row by row on the smallest square that holds them; the first parts of a
    side are longer where it cannot be cut evenly."""
    edge = math.isqrt(max(0, tokens - 1)) + 1
    short, longer = divmod(edge, side)
    at = torch.arange(edge)
    border = longer * (short + 1)
    part = torch.where(at < border, at // (short + 1), longer + (at - border) // max(1, short))
    return (part[:, None] * side + part).flatten()[:tokens]
