"""VL-Cache against its formulas, token by token."""

from __future__ import annotations

import re
from typing import Any

import lightvlm
import pytest
from lightvlm import Plan
from lightvlm.methods.vl_cache import VLCachePart
from python.field.slow_cache import Kept, Seen, SlowCache, check_decoding, check_prompt, count_of, highest
from python.test_prefill import ENDS, ROWS, lightvlm_plan
from python.tiny import Family

OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {"keep": 0.4, "min_tokens": 1},
    "few-queries": {"keep": 0.3, "limit": 2, "recent_share": 0.5, "min_tokens": 3},
    "threshold": {"keep": 0.3, "threshold": 0.2, "min_tokens": 1},
    "together": {"keep": 0.4, "per_head": False, "min_tokens": 1},
    "small": {"keep": 0.02, "min_tokens": 1},
}


def speaking(one: Seen, limit: int) -> list[int]:
    """The text after the last image, or the last token."""
    last = max((at for at in range(one.tokens) if one.image[at]), default=-1)
    return list(range(last + 1, one.tokens))[-limit:] or [one.tokens - 1]


def spread(one: Seen, rows: list[int], threshold: float) -> float:
    """1 - sparsity."""
    low = number = 0
    for own in one.weights:
        for head in own:
            for row in rows:
                seen = head[row, : row + 1].tolist()
                low += sum(weight < threshold * max(seen) for weight in seen)
                number += len(seen)
    return 1 - low / number


def vl_cache(seen: list[Seen], options: dict[str, Any]) -> list[Kept]:
    rows = [speaking(one, options.get("limit", 64)) for one in seen]
    spreads = [spread(one, own, options.get("threshold", 0.01)) for one, own in zip(seen, rows, strict=True)]
    found = []
    for one, own, part in zip(seen, rows, spreads, strict=True):
        share = min(1.0, max(0.01, part / sum(spreads) * options["keep"] * len(seen)))
        budget = max(options["min_tokens"], count_of(one.prompt, share))
        if budget >= one.tokens:
            found.append([list(range(one.tokens))] * len(one.keys))
            continue
        recent = max(1, int(options.get("recent_share", 0.1) * budget + 0.5))
        scores = [one.received(head, own) for head in range(len(one.keys))]
        if not options.get("per_head", True):
            scores = [[sum(column) / len(scores) for column in zip(*scores, strict=True)]] * len(scores)
        old, last = list(range(one.tokens - recent)), list(range(one.tokens - recent, one.tokens))
        found.append([highest(by, old, budget - recent) + last for by in scores])
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_it_keeps_what_it_says(model: Any, family: Family, name: str) -> None:
    check_prompt(
        model,
        family,
        VLCachePart(**OPTIONS[name]),
        lambda seen: vl_cache(seen, OPTIONS[name]),
        [*ROWS, *ENDS],
    )


@pytest.mark.parametrize("reduce", [False, True], ids=["whole", "reduced"])
def test_what_follows(model: Any, family: Family, reduce: bool) -> None:
    options = OPTIONS["usual"]
    plan = Plan(lightvlm_plan().prefill if reduce else None, VLCachePart(**options))
    check_decoding(
        model,
        family,
        plan,
        lambda prefill: SlowCache(model, lambda seen: vl_cache(seen, options), prefill),
        ROWS,
    )


def test_layers_get_different_budgets(model: Any, family: Family) -> None:
    """The formula above would be the same for all of them if attention were equally sparse everywhere."""
    slow = SlowCache(model, lambda seen: vl_cache(seen, OPTIONS["usual"]))
    slow.read(family.batch([ROWS[2]]))
    assert len({len(layer[0]) for layer in slow.chosen}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": -1}, "keep must be in (0, 1], got -1"),
        ({"threshold": 0.0}, "threshold must be above 0, got 0.0"),
        ({"threshold": 2.0}, "threshold must be at most 1, got 2.0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"recent_share": -0.1}, "recent_share must be at least 0, got -0.1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        lightvlm.VLCache(**options)


def test_published_defaults() -> None:
    part = lightvlm.VLCache().cache
    assert isinstance(part, VLCachePart)
    assert (part.keep, part.threshold, part.recent_share) == (0.1, 0.01, 0.1)
