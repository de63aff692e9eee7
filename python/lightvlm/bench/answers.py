"""Scores of questions as text, so that results of several processes can be compared question by question."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

_LARGEST = 10_000
"""Denominator of a score at most: scores are right words over words, or means of such over a few seeds."""


def pack(scores: NDArray[np.float64]) -> str:
    """Scores in [0, 1] as "denominator:numerators": "1:0110", or "6:0 3 6" where the denominator is not 1."""
    fractions = [Fraction(float(score)).limit_denominator(_LARGEST) for score in scores]
    over = math.lcm(*(fraction.denominator for fraction in fractions))
    separator = "" if over == 1 else " "
    return f"{over}:" + separator.join(str(int(fraction * over)) for fraction in fractions)


def unpack(text: str) -> NDArray[np.float64]:
    """What :func:`pack` packed.

    Raises:
        ValueError: text that it cannot have made.
    """
    over, sign, numerators = text.partition(":")
    numbers = list(numerators) if over == "1" else numerators.split()
    if not sign or not over.isdecimal() or over == "0" or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"answers must be DENOMINATOR:NUMERATORS, got {text[:40]!r}")
    return np.array([int(number) / int(over) for number in numbers])


def digest(words: Sequence[str]) -> str:
    """Short fingerprint of the questions and their right answers."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
