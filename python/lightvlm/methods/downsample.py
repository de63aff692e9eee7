"""Average pooling of image tokens over the image's grid: what a smaller picture would give, without the vision tower
having to run again. A baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..host import upload
from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import (
    Picture,
    PrefillPart,
    Reduced,
    Stage,
    StageInput,
    check_keep,
    drop,
    pyramid_stages,
    shrinking,
)
from .places import mark, select_marked


@register_part("prefill", "downsample")
@dataclass(frozen=True)
class DownsamplePrefill(PrefillPart):
    """Average the image tokens of each cell of a coarser grid, before the decoder unless told otherwise.

    An image of h x w tokens becomes one of h' x w' tokens (:func:`smaller_grid`), each the mean of the tokens in rows
    floor(i h / h') to ceil((i + 1) h / h') - 1 and columns likewise: cells overlap where the sides do not divide. A
    pooled token stands at the place, and has the position, of the token in the middle of its cell. Frames of a video
    are pooled one by one, and each keeps at least one token. Images whose grid is not known are rows of tokens.
    """

    keep: float = option(0.35, "most that may be left of each image's tokens")
    layer: int = option(0, "reduce at the input of this layer", low=0)
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)

    def stages(self, layers: int) -> tuple[Stage, ...]:
        return pyramid_stages(layers, self.keep, (self.layer,), None, lambda depth: (self.layer,))

    def counts(self, stage: Stage, pictures: Sequence[Picture]) -> list[int]:
        """The cells of each image's coarser grid: as a rule some tokens fewer than ``keep`` of the original ones."""
        return [math.prod(smaller_grid(_grid(picture), stage.keep)) for picture in pictures]

    def reduce(self, stage: StageInput) -> Reduced:
        assert stage.stage is not None
        hidden, keep = stage.hidden.clone(), stage.stage.keep
        for row, picture in shrinking(stage):
            middles = upload(_middles(picture, keep), hidden.device, torch.int64)
            hidden[row, middles] = _pool(
                stage.hidden[row, picture.start : picture.stop], _grid(picture), keep
            )
        places = [[place for picture in row for place in _middles(picture, keep)] for row in stage.pictures]
        return drop(stage, select_marked(stage, mark(stage, places)), hidden)


def smaller_grid(grid: tuple[int, int, int], keep: float) -> tuple[int, int, int]:
    """The largest grid of about the same shape whose frames have at most ``keep`` of the tokens, and at least one.

    One side is sqrt(keep) of what it was, rounded down or up, and the other as long as it may be. Of these four the one
    of the most cells is taken; then the one whose shape differs least; then the one of fewer rows.
    """
    frames, height, width = grid
    cells, side = keep * height * width + 1e-9, math.sqrt(keep)
    found = {(1, 1)}
    for rounded in (math.floor, math.ceil):
        rows, columns = max(1, rounded(side * height)), max(1, rounded(side * width))
        found |= {(rows, min(width, int(cells / rows))), (min(height, int(cells / columns)), columns)}
    fitting = [size for size in found if min(size) >= 1]

    def order(size: tuple[int, int]) -> tuple[float, ...]:
        return -size[0] * size[1], abs(math.log(size[0] / size[1] * width / height)), size[0]

    rows, columns = min(fitting, key=order)
    return frames, rows, columns


def _grid(picture: Picture) -> tuple[int, int, int]:
    """The grid of an image's tokens, where it is known; else a row. There is one stage, so they are all there."""
    return picture.grid if picture.grid is not None else (1, 1, picture.tokens)


def _middles(picture: Picture, keep: float) -> list[int]:
    """Where the pooled tokens of an image stand in the row of M; they ascend, as the edges of cells do."""
    if picture.keep == picture.tokens:
        return list(range(picture.start, picture.stop))
    frames, height, width = _grid(picture)
    _, rows, columns = smaller_grid((frames, height, width), keep)
    return [
        picture.start + (frame * height + _middle(i, height, rows)) * width + _middle(j, width, columns)
        for frame in range(frames)
        for i in range(rows)
        for j in range(columns)
    ]


def _middle(cell: int, side: int, cells: int) -> int:
    """The token in the middle of a cell along one side; the earlier of two."""
    return (cell * side // cells - (-(cell + 1) * side // cells) - 1) // 2


def _pool(tokens: Tensor, grid: tuple[int, int, int], keep: float) -> Tensor:
    """The means (n', C) of the cells of an image's tokens (n, C)."""
    frames, height, width = grid
    picture = tokens.view(frames, height, width, -1).permute(0, 3, 1, 2)
    pooled = functional.adaptive_avg_pool2d(picture.float(), smaller_grid(grid, keep)[1:])
    return pooled.permute(0, 2, 3, 1).reshape(-1, tokens.shape[-1]).to(tokens.dtype)


def Downsample(keep: float = 0.35, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """A plan that averages image tokens over a coarser grid; options: see :class:`DownsamplePrefill`, and
    ``keep_for_later``: :class:`lightvlm.Plan`."""
    return Plan(
        prefill=DownsamplePrefill(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
