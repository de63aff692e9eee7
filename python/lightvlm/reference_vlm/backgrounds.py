"""Cluttered backgrounds in dull, dark colours: gradients, noise textures, strokes and shapes, dimmed
photographs.

The photographs are the two that scikit-learn bundles (china.jpg and flower.jpg, CC BY); each split crops from
its own region of them, so no pixel of a test background occurs in training.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from .digits import check_split

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 128
"""Side of an image in pixels."""
# Disjoint column ranges of the 640-pixel-wide photographs for train, val and test.
_COLUMNS = ((0, 360), (366, 498), (504, 640))


@cache
def _photographs() -> tuple[NDArray[np.uint8], ...]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the reference VLM's scenes need scikit-learn: pip install 'lightvlm[demo]'"
        ) from error
    return tuple(datasets.load_sample_image(name) for name in ("china.jpg", "flower.jpg"))


def _dull(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """`count` colours of low saturation, (count, 3), mostly between 15 and 110."""
    grey = rng.uniform(20, 100, (count, 1))
    return (grey + rng.uniform(-18, 18, (count, 3))).astype(np.float32)


def _gradient(rng: np.random.Generator) -> NDArray[np.float32]:
    first, second = _dull(rng, 2)
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)
    ramp = np.clip(np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None] + 0.5, 0, 1)
    return first + (second - first) * ramp[..., None]


def _texture(rng: np.random.Generator) -> NDArray[np.float32]:
    """Coloured noise over several octaves."""
    total = np.broadcast_to(_dull(rng, 1), (SIDE, SIDE, 3)).copy()
    for cells in (4, 8, 16, 32):
        noise = rng.normal(0, 1, (cells, cells, 3))
        noise = 0.6 * noise.mean(-1, keepdims=True) + 0.4 * noise
        coarse = Image.fromarray(np.clip(128 + 40 * noise, 0, 255).astype(np.uint8))
        fine = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
        total += (fine - 128) * rng.uniform(0.1, 0.6)
    return total


def _photograph(rng: np.random.Generator, split: str) -> NDArray[np.float32]:
    photographs = _photographs()
    photograph = photographs[rng.integers(len(photographs))]
    left, right = _COLUMNS[check_split(split)]
    side = int(rng.integers(80, SIDE + 1))
    x = int(rng.integers(left, right - side + 1))
    y = int(rng.integers(0, photograph.shape[0] - side + 1))
    crop = Image.fromarray(photograph[y : y + side, x : x + side])
    pixels = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    grey = pixels.mean(-1, keepdims=True)
    return (grey + (pixels - grey) * rng.uniform(0.2, 0.7)) * rng.uniform(0.25, 0.5)


def _clutter(pixels: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw dull lines, arcs, boxes and discs of a digit's stroke width over the picture."""
    canvas = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    count = int(rng.integers(3, 16))
    for shape, colour in zip(rng.integers(0, 4, count), _dull(rng, count), strict=True):
        ink = tuple(int(c) for c in np.clip(colour * 1.15, 0, 125))
        x, y = rng.integers(-10, SIDE + 10, 2).tolist()
        w, h = rng.integers(6, 40, 2).tolist()
        width = int(rng.integers(1, 5))
        if shape == 0:
            draw.line((x, y, x + w - 20, y + h - 20), fill=ink, width=width)
        elif shape == 1:
            start = int(rng.integers(0, 360))
            draw.arc((x, y, x + w, y + h), start, start + int(rng.integers(60, 300)), fill=ink, width=width)
        elif shape == 2:
            draw.rectangle((x, y, x + w // 2, y + h // 2), outline=ink, width=width)
        else:
            draw.ellipse((x, y, x + w // 2, y + w // 2), fill=ink)
    return np.asarray(canvas, dtype=np.float32)


def make_background(split: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return one background, uint8 (SIDE, SIDE, 3): gradient, texture or photograph, with clutter on most."""
    kind = rng.random()
    if kind < 0.3:
        pixels = _gradient(rng)
    elif kind < 0.65:
        pixels = _texture(rng)
    else:
        pixels = _photograph(rng, split)
    if rng.random() < 0.7:
        pixels = _clutter(pixels, rng)
    noisy = pixels + rng.normal(0, rng.uniform(0, 10), pixels.shape)
    return np.clip(noisy, 0, 130).astype(np.uint8)
