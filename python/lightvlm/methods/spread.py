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

from ..host import upload
from ..layout import Grid
from .base import StageInput


@functools.lru_cache(maxsize=64)
def spread_rank(tokens: int, grid: Grid | None) -> Tensor:
    """Place of each token (tokens,) int64 in the order, on the CPU."""
    frames, height, width = grid if grid is not None else (1, 1, tokens)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    value = torch.zeros(height, width, dtype=torch.int64)
    bits = max(height - 1, width - 1, 1).bit_length()
    for bit in range(bits):
        row, column = rows >> bit & 1, columns >> bit & 1
        value |= (row ^ column) << 2 * (bits - 1 - bit) + 1 | row << 2 * (bits - 1 - bit)
    value = value[None].expand(frames, height, width).flatten()
    rank = torch.empty(tokens, dtype=torch.int64)
    rank[value.argsort(stable=True)] = torch.arange(tokens)
    return rank


def spread_scores(stage: StageInput) -> Tensor:
    """Scores (B, M) fp32 of which the highest are spread evenly over each original image, whatever is left of it."""
    tables: list[list[int]] = []
    firsts: list[list[int]] = []
    for pictures in stage.pictures:
        tables.append([])
        firsts.append([])
        for picture in pictures:
            firsts[-1].append(len(tables[-1]))
            tables[-1] += spread_rank(picture.original, picture.grid).tolist()
    device = stage.segment.device
    table = upload(_rectangular(tables), device, torch.float32)
    first = upload(_rectangular(firsts), device)
    place = first.gather(1, stage.segment.clamp_min(0).long()) + stage.within
    return -table.gather(1, place.clamp_max(table.shape[1] - 1).long())


def _rectangular(rows: list[list[int]]) -> list[list[int]]:
    width = max(1, *map(len, rows))
    return [row + [0] * (width - len(row)) for row in rows]
