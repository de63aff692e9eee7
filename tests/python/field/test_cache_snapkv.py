"""SnapKV and PyramidKV against their formulas, token by token."""

from __future__ import annotations

import re
from typing import Any

import lightvlm
import pytest
from lightvlm import Plan
from lightvlm.methods.pyramidkv import PyramidKVCache
from lightvlm.methods.snapkv import SnapKVCache
from python.field.slow_cache import Kept, Seen, SlowCache, check_decoding, check_prompt, count_of, highest
from python.test_prefill import ENDS, ROWS, lightvlm_plan
from python.tiny import Family

OPTIONS: dict[str, dict[str, Any]] = {
    "share": {"keep": 0.4, "window": 3, "min_tokens": 1},
    "capacity": {"capacity": 12, "window": 4, "kernel": 3},
    "no-pool": {"keep": 0.2, "window": 1, "kernel": 1, "min_tokens": 5},
    "wide-pool": {"keep": 0.5, "window": 2, "kernel": 7, "min_tokens": 1},
    "budget-below-window": {"capacity": 4, "window": 8},
    "together": {"keep": 0.4, "window": 3, "min_tokens": 1, "per_head": False},
}


def snapkv(seen: list[Seen], options: dict[str, Any], budgets: list[int] | None = None) -> list[Kept]:
    window, kernel = options.get("window", 32), options.get("kernel", 5)
    found = []
    for index, one in enumerate(seen):
        budget = budget_of(one.prompt, options) if budgets is None else budgets[index]
        prefix = max(0, one.tokens - window)
        heads = []
        for head in range(len(one.keys)):
            scores = one.received(head, list(range(prefix, one.tokens)))
            near = [
                sum(scores[j] for j in range(i - kernel // 2, i + kernel // 2 + 1) if 0 <= j < prefix)
                / kernel
                for i in range(prefix)
            ]
            heads.append(near)
        if not options.get("per_head", True):
            heads = [[sum(column) / len(heads) for column in zip(*heads, strict=True)]] * len(heads)
        last = list(range(one.tokens - min(window, budget, one.tokens), one.tokens))
        if budget >= one.tokens:
            found.append([list(range(one.tokens))] * len(heads))
            continue
        found.append([highest(near, list(range(prefix)), budget - len(last)) + last for near in heads])
    return found


def budget_of(tokens: int, options: dict[str, Any]) -> int:
    if "keep" not in options:
        return options["capacity"]
    return max(options["min_tokens"], count_of(tokens, options["keep"]))


@pytest.mark.parametrize("name", OPTIONS)
def test_snapkv_keeps_what_it_says(model: Any, family: Family, name: str) -> None:
    part = SnapKVCache(**OPTIONS[name])
    check_prompt(model, family, part, lambda seen: snapkv(seen, OPTIONS[name]), [*ROWS, *ENDS])


@pytest.mark.parametrize("reduce", [False, True], ids=["whole", "reduced"])
def test_what_follows(model: Any, family: Family, reduce: bool) -> None:
    """Every step's logits, also where a prefill part has shortened the later layers."""
    options = OPTIONS["share"]
    plan = Plan(lightvlm_plan().prefill if reduce else None, SnapKVCache(**options))
    check_decoding(
        model,
        family,
        plan,
        lambda prefill: SlowCache(model, lambda seen: snapkv(seen, options), prefill),
        ROWS,
    )


PYRAMIDS: dict[str, dict[str, Any]] = {
    "pyramid": {"keep": 0.3, "window": 2, "beta": 5, "min_tokens": 1},
    "first-layer-is-full": {"keep": 0.45, "window": 2, "beta": 20, "min_tokens": 1},
    "too-short-for-one": {"keep": 0.8, "window": 2, "min_tokens": 1},
    "capacity": {"capacity": 9, "window": 3, "beta": 3},
    "budget-below-window": {"capacity": 3, "window": 8},
}


def pyramid(tokens: int, layers: int, options: dict[str, Any]) -> list[int]:
    """Budgets of all layers."""
    mean, window = budget_of(tokens, options), options["window"]
    if mean <= window or tokens < 2 * (mean - window):
        return [mean] * layers
    least = (mean - window) // options.get("beta", 20)
    most = 2 * (mean - window) - least
    if most >= tokens - window:
        most = tokens - window
        least = 2 * (mean - window) - most
    return [window + int(most - layer * (most - least) / (layers - 1) + 0.5) for layer in range(layers)]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramidkv_keeps_what_it_says(model: Any, family: Family, name: str) -> None:
    options = PYRAMIDS[name]

    def method(seen: list[Seen]) -> list[Kept]:
        return snapkv(seen, options, pyramid(seen[0].prompt, len(seen), options))

    check_prompt(model, family, PyramidKVCache(**options), method, ROWS)


@pytest.mark.parametrize("tokens", [200, 300, 999, 4000])
@pytest.mark.parametrize("keep", [0.05, 0.2, 0.35, 0.5, 0.7])
def test_a_pyramid_has_the_mean_that_was_asked_for(tokens: int, keep: float) -> None:
    from lightvlm.methods.base import PromptLayer

    part, layers = PyramidKVCache(keep=keep), 28
    found = [part.budgets(PromptLayer(layer, layers, (), tokens, [tokens]))[0] for layer in range(layers)]
    assert found == sorted(found, reverse=True)
    assert max(found) <= tokens
    mean = max(64, count_of(tokens, keep))
    assert abs(sum(found) / layers - mean) <= 0.5  # each layer is rounded


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep must be in (0, 1], got 0"),
        ({"keep": "all"}, TypeError, "keep must be a number in (0, 1], got 'all'"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"kernel": 4}, ValueError, "kernel must be odd, got 4"),
        ({"min_tokens": 0}, ValueError, "min_tokens must be at least 1, got 0"),
        ({"per_head": 1}, TypeError, "per_head must be bool, got 1"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for make in (lightvlm.SnapKV, lightvlm.PyramidKV):
        with pytest.raises(error, match=re.escape(message)):
            make(**options)


def test_published_defaults() -> None:
    part = lightvlm.SnapKV().cache
    assert isinstance(part, SnapKVCache)
    assert (part.window, part.capacity, part.kernel, part.keep) == (32, 2048, 5, None)
    assert isinstance(pyramid_part := lightvlm.PyramidKV().cache, PyramidKVCache)
    assert (pyramid_part.beta, pyramid_part.capacity) == (20, 2048)
