"""Questions: right answers, nothing to copy from earlier turns, scoring."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from lightvlm.reference_vlm.questions import KINDS, Question, conversation, questions, score
from lightvlm.reference_vlm.scenes import make_scenes


@pytest.fixture(scope="module")
def scenes():
    return make_scenes("val", 30, 7)


def test_every_question_is_answered_by_the_scene(scenes):
    kinds = Counter()
    for scene in scenes:
        values = [digit.digit for digit in scene.digits]
        for question in questions(scene, np.random.default_rng(0)):
            kinds[question.kind] += 1
            if question.kind == "colour_to_digit":
                [digit] = [d for d in scene.digits if d.colour in question.prompt.split()]
                assert question.answer == str(digit.digit)
            elif question.kind == "digit_to_colour":
                [digit] = [d for d in scene.digits if str(d.digit) in question.prompt.split()]
                assert values.count(digit.digit) == 1
                assert question.answer == digit.colour
            elif question.kind == "count":
                assert question.answer == str(len(values))
            else:
                assert question.answer == " ".join(map(str, values))
    assert set(kinds) == set(KINDS)


def test_no_answer_can_be_copied_from_an_earlier_turn(scenes):
    rng = np.random.default_rng(1)
    first, lengths = set(), Counter()
    for scene in scenes * 20:
        turns = conversation(scene, rng, 3)
        first.add(turns[0].kind)
        lengths[len(turns)] += 1
        words: set[str] = set()
        for number, turn in enumerate(turns):
            assert turn.answer not in words
            if turn.kind == "read":
                assert number == len(turns) - 1
                assert all(earlier.kind == "count" for earlier in turns[:number])
            words |= {*turn.prompt.split(), *turn.answer.split()}
    assert first == {"colour_to_digit", "digit_to_colour", "count"}
    assert lengths[2] > 0
    assert lengths[3] > 0


def test_conversation_needs_a_turn(scenes):
    with pytest.raises(ValueError, match="turns"):
        conversation(scenes[0], np.random.default_rng(0), 0)


@pytest.mark.parametrize(
    ("kind", "answer", "text", "expected"),
    [
        ("count", "4", "4", 1.0),
        ("count", "4", " 4 ", 1.0),
        ("count", "4", "4 4", 0.0),
        ("count", "4", "", 0.0),
        ("digit_to_colour", "red", "blue", 0.0),
        ("read", "3 7 1", "3 7 1", 1.0),
        ("read", "3 7 1", "3 1 1", 2 / 3),
        ("read", "3 7 1", "3 7", 2 / 3),
        ("read", "3 7 1", "3 7 1 9", 0.75),
        ("read", "3 7 1", "", 0.0),
    ],
)
def test_score(kind, answer, text, expected):
    assert score(Question(kind, "?", answer), text) == pytest.approx(expected)
