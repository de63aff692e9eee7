"""Pictures of what each stage kept of an image."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GREEN, _RED, _GREY = "#1a7f37", "#c62828", "#57606a"
_PAPER = 255  # what dropped patches fade to
_FADE = 0.82
# In inches: the column of questions, an image, the space between two, what stands above an image, and above all.
_TEXT, _CELL, _GAP, _CAPTION, _TITLE = 2.6, 2.0, 0.12, 0.28, 0.5


@dataclass(frozen=True)
class Shown:
    """A scene in a picture.

    Attributes:
        image: uint8 (side, side, 3) RGB.
        question, answer: the prompt and the right answer.
        answers: (method, its answer, whether that is right).
        stages: decoder layer -> indices, in row-major order of patches, of what it kept.
    """

    image: NDArray[np.uint8]
    question: str
    answer: str
    answers: list[tuple[str, str, bool]]
    stages: dict[int, list[int]]


def kept_mask(kept: list[int], grid: int) -> NDArray[np.bool_]:
    """Patches (grid, grid) that were kept."""
    mask = np.zeros(grid * grid, dtype=bool)
    mask[kept] = True
    return mask.reshape(grid, grid)


def fade(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image with the patches outside the mask (grid, grid) faded to paper."""
    patch = image.shape[0] // mask.shape[0]
    keep = np.kron(mask, np.ones((patch, patch), dtype=bool))[..., None]
    faded = image * (1 - _FADE) + _PAPER * _FADE
    return np.where(keep, image, faded).astype(np.uint8)


def draw_kept(path: Path, shown: list[Shown], keep: float, grid: int = 16) -> None:
    """Write a PNG: a row for each scene with its question and answers, the image, and what each stage kept."""
    from matplotlib.figure import Figure

    stages = list(shown[0].stages)
    width = _TEXT + _CELL * (1 + len(stages)) + _GAP
    height = _TITLE + (_CELL + _CAPTION) * len(shown)
    figure = Figure(figsize=(width, height))
    figure.text(
        0.5, 1 - 0.5 * _TITLE / height, f"What LightVLM keeps of {grid * grid} image tokens at keep = {keep:.0%}",
        ha="center", va="center", fontsize=13, fontweight="bold",
    )  # fmt: skip
    for number, scene in enumerate(shown):
        bottom = height - _TITLE - (_CELL + _CAPTION) * (number + 1) + _GAP

        def cell(left: float, wide: float, bottom: float = bottom) -> Any:
            return figure.add_axes(
                (left / width, bottom / height, (wide - _GAP) / width, (_CELL - _GAP) / height)
            )

        _draw_text(cell(_GAP, _TEXT - _GAP), scene)
        _draw_image(cell(_TEXT, _CELL), scene.image, "image")
        for column, layer in enumerate(stages):
            mask = kept_mask(scene.stages[layer], grid)
            axis = cell(_TEXT + _CELL * (1 + column), _CELL)
            _draw_image(axis, fade(scene.image, mask), f"from layer {layer} on: {int(mask.sum())} tokens")
            _outline(axis, mask, scene.image.shape[0] // grid)
    figure.savefig(path, dpi=130, facecolor="white")


def _draw_text(axis: Any, scene: Shown) -> None:
    axis.axis("off")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.text(0, 1, "\n".join(textwrap.wrap(scene.question, 24)), fontsize=11, fontweight="bold", va="top")
    axis.text(0, 0.62, "right", fontsize=9.5, color=_GREY, va="top")
    axis.text(0.38, 0.62, scene.answer, fontsize=9.5, color=_GREY, va="top")
    for number, (method, text, right) in enumerate(scene.answers):
        y = 0.46 - 0.16 * number
        axis.text(
            0, y, f"{'✓' if right else '✗'} {method}", fontsize=9.5, color=_GREEN if right else _RED, va="top"
        )
        axis.text(
            0.38, y, textwrap.shorten(text, 20, placeholder=" …") or "(nothing)", fontsize=9.5, va="top"
        )


def _draw_image(axis: Any, image: NDArray[np.uint8], title: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=9, color=_GREY)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_color("#d0d7de")


def _outline(axis: Any, mask: NDArray[np.bool_], patch: int) -> None:
    """A thin line wherever a kept patch touches a dropped one."""
    padded = np.pad(mask, 1)
    rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    axis.hlines(
        rows * patch - 0.5, columns * patch - 0.5, (columns + 1) * patch - 0.5, color="#24292f", lw=0.7
    )
    rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    axis.vlines(columns * patch - 0.5, rows * patch - 0.5, (rows + 1) * patch - 0.5, color="#24292f", lw=0.7)
