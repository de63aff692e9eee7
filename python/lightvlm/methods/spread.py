"""An order of an image's tokens of which every beginning is spread evenly over the image.

Ordered dithering (Bayer 1973): on a grid whose sides are the next power of two, the bits of row and column are
interleaved, in reverse; the tokens' own grid is a part of that. The first quarter is every other token of every other
row, and so on; no share falls into the rhythm of the raster, as every fourth token of a row of 16 would. Videos have
the same tokens in every frame. An image of unknown grid is one row of tokens.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..host import rectangular, upload
from ..layout import Grid
from .base import StageInput


@functools.lru_cache(maxsize=64)
def spread_rank(tokens: int, grid: Grid | None) -> tuple[int, ...]:
    """Place of each token in the order."""
    frames, height, width = grid if grid is not None else (1, 1, tokens)
    bits = max(height - 1, width - 1, 1).bit_length()

    def value(row: int, column: int) -> int:
        found = 0
        for bit in range(bits):
            r, c = row >> bit & 1, column >> bit & 1
            found = found << 2 | (r ^ c) << 1 | r  # the lowest bits become the highest
        return found

    values = frames * [value(row, column) for row in range(height) for column in range(width)]
    rank = [0] * tokens
    for place, token in enumerate(sorted(range(tokens), key=values.__getitem__)):
        rank[token] = place
    return tuple(rank)


def spread_scores(stage: StageInput) -> Tensor:
    """Scores (B, M) fp32 of which the highest are spread evenly over each original image, whatever is left of it."""
    tables: list[list[int]] = []
    firsts: list[list[int]] = []
    for pictures in stage.pictures:
        tables.append([])
        firsts.append([])
        for picture in pictures:
            firsts[-1].append(len(tables[-1]))
            tables[-1] += spread_rank(picture.original, picture.grid)
    device = stage.segment.device
    table = upload(rectangular(tables), device, torch.float32)
    first = upload(rectangular(firsts), device)
    place = first.gather(1, stage.segment.clamp_min(0).long()) + stage.within
    return -table.gather(1, place.clamp_max(table.shape[1] - 1).long())
