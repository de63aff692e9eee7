"""H2O and StreamingLLM against their formulas, token by token, in the prompt and while decoding."""

from __future__ import annotations

import re
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import Plan
from lightvlm.methods.h2o import H2OCache
from lightvlm.methods.streaming_llm import StreamingLLMCache
from python.field.slow_cache import Kept, Seen, SlowCache, check_decoding, check_prompt, count_of, highest
from python.test_prefill import ROWS, lightvlm_plan
from python.tiny import Family
from torch import Tensor

H2O: dict[str, dict[str, Any]] = {
    "usual": {"keep": 0.4, "interval": 4, "min_tokens": 1},
    "every-token": {"keep": 0.3, "interval": 1, "min_tokens": 3},
    "limited": {"keep": 0.5, "interval": 3, "limit": 9, "recent_share": 0.25, "min_tokens": 1},
    "together": {"keep": 0.4, "interval": 2, "min_tokens": 1, "per_head": False},
    "hitters-alone": {"keep": 0.3, "interval": 5, "recent_share": 0.0, "min_tokens": 2},
}


class SlowH2O(SlowCache):
    """What each head's tokens have received goes on from the prompt, and with it the evictions."""

    def __init__(self, model: Any, options: dict[str, Any], prefill: dict[str, Any] | None = None) -> None:
        super().__init__(model, self.first, prefill)
        self.options, self.decode = options, {"interval": options["interval"]}
        self.received: list[list[list[float]]] = []

    def first(self, seen: list[Seen]) -> list[Kept]:
        self.received = [
            [one.received(head, list(range(one.tokens))) for head in range(len(one.keys))] for one in seen
        ]
        return [self.select(one.layer, one.prompt) for one in seen]

    def select(self, layer: int, logical: int) -> Kept:
        """What the heads of a layer keep; their scores are cut to it."""
        scores, options = self.received[layer], self.options
        tokens = len(scores[0])
        budget = max(options["min_tokens"], count_of(logical, options["keep"]))
        budget = min(tokens, budget, options.get("limit", budget))
        recent = int(options.get("recent_share", 0.5) * budget + 0.5)
        together = [sum(column) / len(scores) for column in zip(*scores, strict=True)]
        kept = []
        for own in scores:
            by = own if options.get("per_head", True) else together
            old = highest(by, list(range(tokens - recent)), budget - recent)
            kept.append(old + list(range(tokens - recent, tokens)))
        self.received[layer] = [
            [own[token] for token in left] for own, left in zip(scores, kept, strict=True)
        ]
        return kept

    def _receive(self, index: int, weights: Tensor) -> None:
        heads = len(self.received[index])
        for head, own in enumerate(weights.unflatten(0, (heads, -1))):
            more = own[:, -8:].sum(1).mean(0).tolist()
            before = self.received[index][head]
            before += [0.0] * (len(more) - len(before))
            self.received[index][head] = [a + b for a, b in zip(before, more, strict=True)]

    def _compact(self, index: int) -> None:
        kept = self.select(index, self.seen)
        for states in (self.keys, self.values):
            states[index] = torch.stack([states[index][head, own] for head, own in enumerate(kept)])


@pytest.mark.parametrize("name", H2O)
def test_h2o_keeps_what_it_says(model: Any, family: Family, name: str) -> None:
    slow = SlowH2O(model, H2O[name])
    check_prompt(model, family, H2OCache(**H2O[name]), slow.first, ROWS)


@pytest.mark.parametrize("reduce", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize("name", H2O)
def test_h2o_decodes(model: Any, family: Family, name: str, reduce: bool) -> None:
    plan = Plan(lightvlm_plan().prefill if reduce else None, H2OCache(**H2O[name]))
    check_decoding(model, family, plan, lambda prefill: SlowH2O(model, H2O[name], prefill), ROWS, 19)


STREAMS: dict[str, dict[str, Any]] = {
    "share": {"keep": 0.4, "sinks": 2, "interval": 4, "min_tokens": 1},
    "window": {"sinks": 3, "window": 6, "interval": 1},
    "no-sinks": {"sinks": 0, "window": 5, "interval": 3},
    "more-sinks-than-budget": {"keep": 0.1, "sinks": 6, "interval": 2, "min_tokens": 1},
}


class SlowStream(SlowCache):
    """Sinks, and the last tokens."""

    def __init__(self, model: Any, options: dict[str, Any], prefill: dict[str, Any] | None = None) -> None:
        super().__init__(model, self.first, prefill)
        self.options, self.decode = options, {"interval": options["interval"]}

    def first(self, seen: list[Seen]) -> list[Kept]:
        return [[self.left(one.tokens, one.prompt)] * len(one.keys) for one in seen]

    def left(self, tokens: int, logical: int) -> list[int]:
        options = self.options
        sinks = options["sinks"]
        budget = sinks + options.get("window", 0)
        if "keep" in options:
            budget = max(options["min_tokens"], count_of(logical, options["keep"]), sinks + 1)
        if tokens <= budget:
            return list(range(tokens))
        return [*range(sinks), *range(tokens - budget + sinks, tokens)]

    def _receive(self, index: int, weights: Tensor) -> None:
        """Nobody asks."""

    def _compact(self, index: int) -> None:
        left = self.left(self.keys[index].shape[1], self.seen)
        self.keys[index], self.values[index] = self.keys[index][:, left], self.values[index][:, left]


@pytest.mark.parametrize("name", STREAMS)
def test_streaming_llm_keeps_what_it_says(model: Any, family: Family, name: str) -> None:
    options = STREAMS[name]
    check_prompt(model, family, StreamingLLMCache(**options), SlowStream(model, options).first, ROWS)
    plan = Plan(cache=StreamingLLMCache(**options))
    check_decoding(model, family, plan, lambda prefill: SlowStream(model, options, prefill), ROWS, 19)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lightvlm.H2O, {"keep": 1.5}, "keep must be in (0, 1], got 1.5"),
        (lightvlm.H2O, {"recent_share": 1.5}, "recent_share must be at most 1, got 1.5"),
        (lightvlm.H2O, {"interval": 0}, "interval must be at least 1, got 0"),
        (lightvlm.H2O, {"limit": 10}, "limit must be at least min_tokens (64), got 10"),
        (lightvlm.StreamingLLM, {"keep": 0.0}, "keep must be in (0, 1], got 0.0"),
        (lightvlm.StreamingLLM, {"sinks": -1}, "sinks must be at least 0, got -1"),
        (lightvlm.StreamingLLM, {"window": 0}, "window must be at least 1, got 0"),
    ],
)
def test_bad_options(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**options)


def test_published_defaults() -> None:
    part, stream = lightvlm.H2O().cache, lightvlm.StreamingLLM().cache
    assert isinstance(part, H2OCache)
    assert (part.keep, part.recent_share) == (0.2, 0.5)
    assert isinstance(stream, StreamingLLMCache)
    assert (stream.sinks, stream.window) == (4, 2000)
