"""Handwritten digits: the split by sample index, and anti-aliased glyphs rendered from the 8x8 originals.

The digits are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set (1,797
images of 8x8 pixels, CC BY 4.0). A sample belongs to exactly one of the splits train, val and test, so a
digit on a test scene has never been seen in training in any rendering.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
CANVAS = 30
"""Side of a rendered glyph in pixels; the digit itself takes 24 to 28 of them."""
_VAL_COUNT, _TEST_COUNT = 200, 300
_SPLIT_SEED = 20240


def check_split(split: str) -> int:
    """Return the position of `split` in `SPLITS`; ValueError if it is none of them."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS.index(split)


@cache
def load_digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return all images, float32 (1797, 8, 8) in [0, 1], and their digits, int64 (1797,).

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the reference VLM's scenes need scikit-learn: pip install 'lightvlm[demo]'"
        ) from error
    data = datasets.load_digits()
    return (data.images / 16.0).astype(np.float32), data.target.astype(np.int64)


@cache
def split_indices(split: str) -> NDArray[np.int64]:
    """Return the sorted sample indices of a split; each digit has the same share in every split."""
    position = check_split(split)
    _, labels = load_digits()
    # RandomState, not Generator: its stream is frozen by NumPy's policy, so the split can never drift.
    random = np.random.RandomState(_SPLIT_SEED)
    rank = np.empty(len(labels))
    for digit in range(10):
        members = random.permutation(np.flatnonzero(labels == digit))
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.argsort(rank, kind="stable")
    test, val, train = np.split(order, [_TEST_COUNT, _TEST_COUNT + _VAL_COUNT])
    return np.sort((train, val, test)[position])


def render_glyphs(
    samples: NDArray[np.int64], rng: np.random.Generator, strength: float
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Render samples as coverage maps under random affine, elastic, stroke and contrast changes.

    Args:
        samples: sample indices, int64 (N,).
        rng: source of every random number.
        strength: 1 for the full augmentation of training (rotation 15 degrees, shear 0.2, aspect 15 %, shift
            1.5 px,
            elastic 1.5 px), 0 for none; the size is drawn from 24 to 28 px always.

    Returns:
        Coverage uint8 (N, CANVAS, CANVAS), 255 = ink, and the nominal size in pixels int64 (N,).
    """
    images, _ = load_digits()
    count = len(samples)
    source = torch.from_numpy(images[samples])[:, None]
    # A margin of one cell, so that the bicubic enlargement of strokes at the border fades out instead of
    # being cut.
    source = F.interpolate(F.pad(source, (1, 1, 1, 1)), size=(40, 40), mode="bicubic", align_corners=False)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, *shape)).astype(np.float32))

    size = rng.integers(24, 29, count)
    angle = uniform(-15, 15) * (strength * math.pi / 180)
    shear = uniform(-0.2, 0.2) * strength
    aspect = torch.exp(uniform(-0.15, 0.15) * strength)
    # Output pixel -> source coordinate, in units where the 10-cell padded source spans [-1, 1].
    unit = torch.from_numpy((CANVAS / size * 0.8).astype(np.float32))
    cosine, sine = torch.cos(angle), torch.sin(angle)
    matrix = torch.stack(
        [
            torch.stack([cosine * aspect, -sine + shear, uniform(-1.5, 1.5) * strength * 2 / CANVAS], -1),
            torch.stack([sine, cosine / aspect, uniform(-1.5, 1.5) * strength * 2 / CANVAS], -1),
        ],
        1,
    )
    grid = F.affine_grid(matrix * unit[:, None, None], [count, 1, CANVAS, CANVAS], align_corners=False)
    bend = uniform(-1.5, 1.5, 2, 4, 4) * strength * 2 / CANVAS
    bend = F.interpolate(bend, size=(CANVAS, CANVAS), mode="bicubic", align_corners=False)
    grid = grid + bend.permute(0, 2, 3, 1)
    ink = F.grid_sample(source, grid, mode="bilinear", align_corners=False)

    # Stroke thickness: blend towards the local maximum (thicker) or minimum (thinner).
    thickness = uniform(-0.5, 0.45)[:, None, None, None] * strength
    thicker = F.max_pool2d(ink, 3, 1, 1)
    thinner = -F.max_pool2d(-ink, 3, 1, 1)
    ink = torch.where(thickness > 0, ink + thickness * (thicker - ink), ink - thickness * (thinner - ink))
    # Contrast: a soft threshold whose level and slope vary.
    level = 0.38 + uniform(-0.1, 0.1)[:, None, None, None] * strength
    slope = 2.5 * torch.exp(uniform(-0.5, 0.5)[:, None, None, None] * strength)
    ink = ((ink - level) * slope + 0.5).clamp_(0, 1)
    return (ink[:, 0] * 255).round().to(torch.uint8).numpy(), size
