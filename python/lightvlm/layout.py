"""Where the image tokens of a batch are, read from the device once per prefill.

A row of a prompt is a list of runs: text, an image, text, another image ... Because every reduction keeps
    order and
decides its counts on the host, the runs alone tell where each token stands after every stage, without asking
the device again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Grid = tuple[int, int, int]

PADDING, TEXT, FIRST_IMAGE = 0, 1, 2
"""Codes of a token's kind: padding, text, or image number ``code - FIRST_IMAGE`` of its row."""


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one kind: ``image`` is None for text, else the number of the image in its row.

    grid: (frames, height, width) of the image's original tokens, where it is known.
    """

    image: int | None
    tokens: int
    grid: Grid | None = None


@dataclass(frozen=True)
class RowLayout:
    """One row of the batch: ``leftpad`` padding tokens, then the runs."""

    leftpad: int
    runs: tuple[Run, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(run.tokens for run in self.runs)

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Tokens of each image of the row."""
        return tuple(run.tokens for run in self.runs if run.image is not None)

    @property
    def grids(self) -> tuple[Grid | None, ...]:
        """Grid of each image of the row."""
        return tuple(run.grid for run in self.runs if run.image is not None)

    @property
    def trailing_text(self) -> int:
        """Text tokens after the last image token (all tokens where there is no image)."""
        last = self.runs[-1] if self.runs else None
        return last.tokens if last is not None and last.image is None else 0

    def text_positions(self) -> list[int]:
        """Positions (from the first token that is not padding) of text tokens."""
        return self._text_positions(True)

    def text_positions_after_image(self) -> list[int]:
        """Positions (from the first token that is not padding) of text tokens that can see an image."""
        return self._text_positions(False)

    def _text_positions(self, seen: bool) -> list[int]:
        positions: list[int] = []
        at = 0
        for run in self.runs:
            if run.image is not None:
                seen = True
            elif seen:
                positions.extend(range(at, at + run.tokens))
            at += run.tokens
        return positions


@dataclass(frozen=True)
class BatchLayout:
    """The layout of a whole batch.

    ``codes`` (B, S) int32 on the CPU: kind of each token (see :data:`PADDING`). ``within`` (B, S) int32 on
    the CPU: index of an image token in its image, 0 elsewhere.
    """

    rows: tuple[RowLayout, ...]
    codes: Tensor
    within: Tensor

    @property
    def length(self) -> int:
        """Length of the padded rows."""
        return self.codes.shape[1]

    @property
    def has_images(self) -> bool:
        """Whether any row has an image token."""
        return any(row.image_sizes for row in self.rows)

    @property
    def max_images(self) -> int:
        """The largest number of images in a row."""
        return max((len(row.image_sizes) for row in self.rows), default=0)


class LayoutError(ValueError):
    """A batch whose layout no plan can work on; the message says why."""


def read_layout(
    is_image: Tensor,
    valid: Tensor,
    sizes: list[int] | None,
    grids: Sequence[Grid | None] | None = None,
    positions: Tensor | None = None,
) -> BatchLayout:
    """Read the layout of a batch.

    Args:
        is_image (B, S) bool on the CPU: image placeholder tokens.
        valid (B, S) bool on the CPU: tokens that are not padding.
        sizes: tokens of each image, in reading order over the batch; None: every run of image tokens is an
            image.
        grids: (frames, height, width) of each image, in the same order; None: not known.
        positions (3, B, S) on the CPU: frame, row and column of each token (M-RoPE), which say the grids where
            ``grids`` does not.

    Raises:
        LayoutError: padding that is not on the left, or image sizes that do not match the placeholders.
    """
    batch, length = is_image.shape
    leftpad = length - valid.sum(dim=1)
    if not torch.equal(valid, torch.arange(length)[None] >= leftpad[:, None]):
        raise LayoutError("the attention mask is not left padding (holes or padding on the right)")
    is_image = is_image & valid
    codes = torch.full((batch, length), TEXT, dtype=torch.int32)
    within = torch.zeros((batch, length), dtype=torch.int32)
    rows, pending = [], list(sizes) if sizes is not None else None
    for b in range(batch):
        pad = int(leftpad[b])
        codes[b, :pad] = PADDING
        rows.append(RowLayout(pad, tuple(_row_runs(is_image[b], pad, pending, codes[b], within[b]))))
    if pending:
        raise LayoutError(f"{len(pending)} images have no placeholder tokens in the prompt")
    return BatchLayout(_with_grids(rows, grids, positions), codes, within)


def _with_grids(
    rows: list[RowLayout], grids: Sequence[Grid | None] | None, positions: Tensor | None
) -> tuple[RowLayout, ...]:
    """The rows with the grid of each image, where it is known and fits the image's tokens."""
    given = iter(grids) if grids is not None else None
    found = []
    for b, row in enumerate(rows):
        runs, at = [], row.leftpad
        for run in row.runs:
            if run.image is not None:
                grid = next(given, None) if given is not None else None
                if grid is None and positions is not None:
                    grid = _grid_of(positions[:, b, at : at + run.tokens])
                if grid is not None and math.prod(grid) == run.tokens:
                    run = replace(run, grid=grid)
            runs.append(run)
            at += run.tokens
        found.append(replace(row, runs=tuple(runs)))
    return tuple(found)


def _grid_of(positions: Tensor) -> Grid:
    """Grid of an image whose tokens have these frames, rows and columns (3, n)."""
    low, high = positions.aminmax(dim=1)
    height, width = (high - low + 1)[1:].tolist()
    return positions.shape[1] // max(1, height * width), height, width


def layout_of(codes: Tensor, grids: Sequence[Sequence[Grid | None]] | None = None) -> BatchLayout:
    """The layout that ``codes`` (B, S) int32 on the CPU say: :attr:`BatchLayout.codes`, padding on the left.

    ``grids``: of each row's images.
    """
    within = torch.zeros_like(codes)
    rows = []
    for row, index in zip(codes, within, strict=True):
        kinds, counts = torch.unique_consecutive(row, return_counts=True)
        runs, at, leftpad = [], 0, 0
        for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
            if kind == PADDING:
                leftpad = count
            elif kind == TEXT:
                runs.append(Run(None, count))
            else:
                runs.append(Run(kind - FIRST_IMAGE, count))
                index[at : at + count] = torch.arange(count, dtype=torch.int32)
            at += count
        rows.append(RowLayout(leftpad, tuple(runs)))
    flat = None if grids is None else [grid for row in grids for grid in row]
    return BatchLayout(_with_grids(rows, flat, None), codes, within)


def _row_runs(
    is_image: Tensor, pad: int, pending: list[int] | None, codes: Tensor, within: Tensor
) -> list[Run]:
    """Runs of one row; takes the images it uses from ``pending`` and fills the row's codes and indices."""
    flags = is_image.int()
    edges = (torch.nonzero(flags[1:] != flags[:-1]).flatten() + 1).tolist()
    bounds = [pad, *[edge for edge in edges if edge > pad], is_image.shape[0]]
    runs: list[Run] = []
    image = 0
    for begin, end in itertools.pairwise(bounds):
        if begin < end and not flags[begin]:
            runs.append(Run(None, end - begin))
            continue
        while begin < end:  # adjacent images have no text between them, so one stretch may hold several
            size = end - begin if pending is None else _next_size(pending)
            if size > end - begin:
                raise LayoutError("an image's placeholder tokens are interrupted by text, or too few")
            runs.append(Run(image, size))
            codes[begin : begin + size] = FIRST_IMAGE + image
            within[begin : begin + size] = torch.arange(size, dtype=torch.int32)
            image, begin = image + 1, begin + size
    return runs


def _next_size(pending: list[int]) -> int:
    if not pending:
        raise LayoutError("the prompt has more image placeholders than the images have tokens")
    return pending.pop(0)
