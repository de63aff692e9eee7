"""Scenes: 2 to 6 handwritten digits, each in a colour of its own, on a cluttered background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .backgrounds import SIDE, make_background
from .digits import CANVAS, check_split, load_digits, render_glyphs, split_indices

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (35, 195, 60),
    "blue": (60, 90, 255),
    "yellow": (240, 225, 45),
    "cyan": (45, 220, 230),
    "magenta": (230, 55, 215),
    "orange": (250, 140, 25),
    "white": (240, 240, 240),
}
NAMES = tuple(COLOURS)
_RGB = np.array(list(COLOURS.values()), dtype=np.float32)
MIN_DIGITS, MAX_DIGITS = 2, 6
_MARGIN = CANVAS // 2
_MIN_X_GAP = 12
_MIN_DISTANCE = 28
_CANDIDATES = 32
# Held-out glyphs vary a little, as handwriting does; training glyphs vary more.
_STRENGTH = {"train": 1.0, "val": 0.3, "test": 0.3}


@dataclass(frozen=True)
class Digit:
    """One digit of a scene: value, colour name, centre (x, y) and side in pixels, and sample index."""

    digit: int
    colour: str
    x: int
    y: int
    size: int
    sample: int


@dataclass(frozen=True)
class Scene:
    """An image, uint8 (128, 128, 3) RGB, and its digits from left to right."""

    image: NDArray[np.uint8]
    digits: tuple[Digit, ...]


def place(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Centres (count, 2) as x, y from left to right: x at least 12 px apart, boxes of 28 px disjoint."""
    slack = SIDE - 2 * _MARGIN - _MIN_X_GAP * (count - 1)
    while True:
        # Rejection sampling, a few dozen candidates at a time.
        x = np.sort(rng.integers(0, slack + 1, (_CANDIDATES, count)), -1)
        x += _MARGIN + _MIN_X_GAP * np.arange(count)
        y = rng.integers(_MARGIN, SIDE - _MARGIN + 1, (_CANDIDATES, count))
        apart = [np.abs(axis[:, :, None] - axis[:, None, :]) for axis in (x, y)]
        distance = np.maximum(*apart) + np.eye(count, dtype=np.int64) * SIDE
        accepted = np.flatnonzero(distance.min((1, 2)) >= _MIN_DISTANCE)
        if len(accepted):
            return np.stack([x[accepted[0]], y[accepted[0]]], 1)


def compose(
    background: NDArray[np.uint8],
    glyphs: NDArray[np.uint8],
    samples: NDArray[np.int64],
    sizes: NDArray[np.int64],
    centres: NDArray[np.int64],
    rng: np.random.Generator,
) -> Scene:
    """Paint glyphs (n, CANVAS, CANVAS) at their centres in distinct, slightly varied colours."""
    _, labels = load_digits()
    image = background.astype(np.float32)
    names = rng.permutation(len(NAMES))[: len(samples)]
    digits = []
    for glyph, sample, size, (x, y), name in zip(glyphs, samples, sizes, centres, names, strict=True):
        colour = np.clip(_RGB[name] * rng.uniform(0.88, 1.0) + rng.uniform(-12, 12, 3), 0, 255)
        coverage = glyph[..., None].astype(np.float32) / 255
        window = image[y - _MARGIN : y + _MARGIN, x - _MARGIN : x + _MARGIN]
        window += coverage * (colour - window)
        digits.append(Digit(int(labels[sample]), NAMES[name], int(x), int(y), int(size), int(sample)))
    digits.sort(key=lambda digit: digit.x)
    return Scene(image.astype(np.uint8), tuple(digits))


def make_scenes(split: str, count: int, seed: int) -> list[Scene]:
    """Make `count` scenes of a split; scene i depends on (split, seed, i) only.

    Raises:
        ValueError: unknown split, or a negative count or seed.
        ImportError: scikit-learn is not installed.
    """
    position = check_split(split)
    if count < 0 or seed < 0:
        raise ValueError(f"count and seed must not be negative, got count={count}, seed={seed}")
    pool = split_indices(split)
    scenes = []
    for index in range(count):
        rng = np.random.default_rng([position, seed, index])
        number = int(rng.integers(MIN_DIGITS, MAX_DIGITS + 1))
        samples = rng.choice(pool, number, replace=False)
        glyphs, sizes = render_glyphs(samples, rng, _STRENGTH[split])
        scenes.append(compose(make_background(split, rng), glyphs, samples, sizes, place(number, rng), rng))
    return scenes


class TrainingScenes:
    """An endless, fast source of training scenes: glyphs and backgrounds come from banks rendered ahead.

    Args:
        seed: source of every random number.
        renderings: how often every training digit is in the bank of glyphs.
        backgrounds: size of the bank of backgrounds; each is used flipped and turned in eight ways.
    """

    def __init__(self, seed: int, renderings: int = 24, backgrounds: int = 4000) -> None:
        self.rng = np.random.default_rng([1000, seed])
        self._renderings = renderings
        self._backgrounds = np.stack([make_background("train", self.rng) for _ in range(backgrounds)])
        self.refresh()

    def refresh(self) -> None:
        """Render a new bank of glyphs."""
        self._samples = np.repeat(split_indices("train"), self._renderings)
        self._glyphs, self._sizes = render_glyphs(self._samples, self.rng, _STRENGTH["train"])

    def draw(self, count: int, low: int = MIN_DIGITS, high: int = MAX_DIGITS) -> list[Scene]:
        """Return `count` scenes of `low` to `high` digits each."""
        scenes = []
        for _ in range(count):
            rng = self.rng
            number = int(rng.integers(low, high + 1))
            chosen = rng.integers(0, len(self._samples), number)
            background = self._backgrounds[rng.integers(len(self._backgrounds))]
            background = np.rot90(background, int(rng.integers(4)))
            if rng.random() < 0.5:
                background = background[::-1]
            scenes.append(
                compose(
                    background,
                    self._glyphs[chosen],
                    self._samples[chosen],
                    self._sizes[chosen],
                    place(number, rng),
                    rng,
                )
            )
        return scenes
