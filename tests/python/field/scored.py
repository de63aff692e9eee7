"""Slow versions of methods that rank image tokens by attention, in float64, and how they are compared."""

from __future__ import annotations

import math
from typing import Any

import lightvlm
import torch
from python.slow import SlowDecoder
from python.test_prefill import noise, slow_options
from python.tiny import Family, Image, generate_logits
from torch import Tensor

ROWS = [
    [1, 2, Image(0), 3, 4, 5],
    [6, 7, 8],
    [1, Image(1), 9, Image(2), *range(10, 20)],
]
UNEVEN = [
    [1, Image(0, 9, 7), 3, 4, 5, 6, 7],
    [6, 7, 8],
    [2, Image(1, 1, 1), 3, Image(2, 6, 8), 4, Image(3, 10, 5), 8, 11, 12],
]
"""For Qwen, whose images have any size: large enough for several clusters, and one token alone."""


class SlowScored(SlowDecoder):
    """The highest scores stay, and the others vanish; the last row's attention, mean over heads, is the score.

    ``margin`` is the smallest relative distance between two numbers whose order decided something. Exact ties do not
    count: they go to the lower index, in whatever precision.
    """

    margin = math.inf

    def compare(self, high: Any, low: Any) -> None:
        high, low = float(high), float(low)
        if high != low:
            self.margin = min(self.margin, abs(high - low) / max(abs(high), abs(low)))

    def _score(self, weights: Tensor, segment: Any) -> Tensor:
        return weights[:, -1].mean(dim=0)

    def ordered(self, tokens: list[int], scores: Tensor, *cuts: int) -> list[int]:
        """Tokens by falling score; what lies before and behind each cut must not be all but equal."""
        order = sorted(tokens, key=lambda i: (-float(scores[i]), i))
        for cut in cuts:
            if 0 < cut < len(order):
                self.compare(scores[order[cut - 1]], scores[order[cut]])
        return order

    def _choose(self, tokens: list[int], scores: Tensor, hidden: Tensor, budget: int) -> list[int]:
        return sorted(self.ordered(tokens, scores, budget)[:budget])

    def _merge(self, out: Tensor, hidden: Tensor, scores: Tensor, kept: Any, dropped: Any) -> None:
        pass


def check(
    model: Any, family: Family, slow_model: type[SlowScored], plan: lightvlm.Plan, rows: Any, steps: int = 4
) -> None:
    """A left-padded batch against the slow decoder row by row: kept tokens, and logits of the prompt's last token and
    of generated ones."""
    with lightvlm.attach(model, plan, trace=True) as run:
        tokens, logits = generate_logits(model, family.batch(rows), steps)
    off = noise(model, family, rows)
    for b, row in enumerate(rows):
        slow = slow_model(model, slow_options(plan.prefill))
        expected = [slow.read(family.batch([row]))[-1]]
        expected += [slow.step(token) for token in tokens[b, :-1].tolist()]
        # fp32 decides as float64 does where more lies between two numbers than fp32 costs the logits
        assert slow.margin > 4 * off / float(logits.abs().max()), (
            "two scores are too close; take other images"
        )
        assert {layer: kept[b] for layer, kept in run.kept.items() if kept[b]} == slow.kept
        assert (logits[b] - torch.stack(expected)).abs().max() <= 4 * off + 1e-5
    assert run.report().stepped_aside == {}
    assert any(any(kept) for kept in run.kept.values())
