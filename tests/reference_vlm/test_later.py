"""A second question about another digit: what was dropped for the first is there again, or is not."""

from __future__ import annotations

import dataclasses

import lightvlm
import pytest
import torch
from lightvlm import reference_vlm
from lightvlm.reference_vlm.later import ask_twice, talks

KEEP = lightvlm.LightVLM(keep=0.03, decode_interval=1, decode_keep=0.1, decode_recent=16)
"""Compaction follows the first answer at once, as it would follow a long one."""


@pytest.fixture(scope="module")
def answers():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    asked, loaded = talks("test", 60, 3), reference_vlm.load()
    found = {
        keep: ask_twice(*loaded, asked, dataclasses.replace(KEEP, keep_for_later=keep), batch=30)
        for keep in ("offload", "quantize", "drop")
    }
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("keep", ["offload", "quantize"])
def test_it_is_answered_as_afresh(answers, keep):
    found = answers[keep]
    figures = found.figures()
    assert figures["fresh"] >= 0.9
    assert figures["later"] >= figures["fresh"] - 0.03
    assert figures["same"] >= (1 if keep == "offload" else 0.95)
    assert found.report.reread == 2
    assert found.report.stepped_aside == {}


def test_what_is_dropped_is_missed(answers):
    """Also that the test above could fail."""
    figures = answers["drop"].figures()
    assert figures["later"] <= figures["fresh"] - 0.15
    assert answers["drop"].report.reread == 0
    (reason,) = answers["drop"].report.stepped_aside
    assert reason.endswith("(keep_for_later='drop')")


def test_conversations_are_about_two_digits():
    asked = talks("val", 30, 1)
    assert [talk[1:] for talk in asked] == [talk[1:] for talk in talks("val", 30, 1)]
    for talk in asked:
        assert talk.first.answer != talk.second.answer
        colours = {question.prompt.split()[3]: question.answer for question in (talk.first, talk.second)}
        assert len(colours) == 2
        assert colours.items() <= {digit.colour: str(digit.digit) for digit in talk.scene.digits}.items()
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        talks("val", 0, 1)
