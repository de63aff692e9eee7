"""Questions about a scene, conversations of several turns, and how an answer is scored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from .scenes import Digit, Scene

KINDS = ("colour_to_digit", "digit_to_colour", "count", "read")


@dataclass(frozen=True)
class Question:
    """A question's kind (one of `KINDS`), its prompt and the right answer, words separated by spaces."""

    kind: str
    prompt: str
    answer: str


def _colour_to_digit(digit: Digit) -> Question:
    return Question("colour_to_digit", f"which digit is {digit.colour} ?", str(digit.digit))


def _digit_to_colour(digit: Digit) -> Question:
    return Question("digit_to_colour", f"what colour is the {digit.digit} ?", digit.colour)


def _count(scene: Scene) -> Question:
    return Question("count", "how many digits are there ?", str(len(scene.digits)))


def _read(scene: Scene) -> Question:
    values = " ".join(str(digit.digit) for digit in scene.digits)
    return Question("read", "read all digits from left to right", values)


def _unique(scene: Scene) -> list[Digit]:
    """The digits whose value occurs once in the scene: only of these can one ask for the colour."""
    occurrences = Counter(digit.digit for digit in scene.digits)
    return [digit for digit in scene.digits if occurrences[digit.digit] == 1]


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Every question that the scene allows, in random order, each meant to be asked alone."""
    found = [_colour_to_digit(digit) for digit in scene.digits]
    found += [_digit_to_colour(digit) for digit in _unique(scene)]
    found += [_count(scene), _read(scene)]
    return [found[i] for i in rng.permutation(len(found))]


def conversation(scene: Scene, rng: np.random.Generator, turns: int) -> list[Question]:
    """Draw up to `turns` questions, at least one, in which no answer occurs as a word of an earlier turn.

    Each question is about another digit of the scene; reading comes only first or after counting, and ends
    the conversation, since it would give the other answers away.

    Raises:
        ValueError: `turns` is below 1.
    """
    if turns < 1:
        raise ValueError(f"turns must be at least 1, got {turns}")
    chosen: list[Question] = []
    words: set[str] = set()
    unique = set(_unique(scene))
    pool: list[Question] = [_count(scene)] if rng.random() < 0.5 else []
    for digit in scene.digits:
        by_colour = digit in unique and rng.random() < 0.45
        pool.append(_digit_to_colour(digit) if by_colour else _colour_to_digit(digit))
    for index in rng.permutation(len(pool)):
        question = pool[index]
        if question.answer in words:
            continue
        chosen.append(question)
        words.update(question.prompt.split(), question.answer.split())
        if len(chosen) == turns:
            return chosen
        if chosen == [question] and question.kind == "count" and rng.random() < 0.5:
            return [question, _read(scene)]
    return chosen


def pairs(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Training aids, not asked in conversations: "red 7 cyan 3 ..." and "3 cyan 7 red ...", in random order.

    Every second word is to be predicted from the word before it, its cue. Looking up one word in the image
    is a single step, which a decoder learns long before the two of a question (find the cue, look it up).
    """
    order = [scene.digits[i] for i in rng.permutation(len(scene.digits))]
    unique = set(_unique(scene))
    by_colour = [word for d in order for word in (d.colour, str(d.digit))]
    by_digit = [word for d in order if d in unique for word in (str(d.digit), d.colour)]
    return [Question("pairs", "", " ".join(words)) for words in (by_colour, by_digit) if words]


def score(question: Question, text: str) -> float:
    """Score a generated answer in [0, 1]: 1 for the right words; reading counts digits right by position.

    Reading scores matches / max(length of the answer, length of the text), so both omissions and additions
    cost.
    """
    given, right = text.split(), question.answer.split()
    if question.kind != "read":
        return float(given == right)
    matches = sum(a == b for a, b in zip(given, right, strict=False))
    return matches / max(len(given), len(right))
