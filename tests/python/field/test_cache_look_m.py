"""LOOK-M against its formulas, token by token: what stays, and what is merged into it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightvlm
import pytest
import torch
from lightvlm import CompactCache, Plan
from lightvlm.methods.look_m import LookMCache
from python.field.slow_cache import Kept, Seen, SlowCache, check_decoding, count_of
from python.test_prefill import ENDS, ROWS, lightvlm_plan
from python.tiny import QWEN, Family, Image, generate
from torch import Tensor

OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {"keep": 0.5, "min_tokens": 1},
    "average": {"keep": 0.5, "merge": "average", "min_tokens": 1},
    "no-room-for-text": {"keep": 0.2, "min_tokens": 1},
    "recent": {"keep": 0.4, "recent_share": 0.8, "min_tokens": 6},
    "none-recent": {"keep": 0.6, "recent_share": 0.0, "min_tokens": 1},
}


def look_m(seen: list[Seen], options: dict[str, Any]) -> list[Kept]:
    found = []
    for one in seen:
        budget = min(one.tokens, max(options["min_tokens"], count_of(one.prompt, options["keep"])))
        recent = int(options.get("recent_share", 0.5) * budget + 0.5)
        heads = []
        for head in range(len(one.keys)):
            scores = one.received(head, list(range(one.tokens)))
            old = list(range(one.tokens - recent))
            # text before images, and among each of them what received most
            ranked = sorted(old, key=lambda at: (one.image[at], -scores[at], at))
            heads.append(sorted([*ranked[: budget - recent], *range(one.tokens - recent, one.tokens)]))
        found.append(heads)
    return found


def merging(how: str) -> Callable[[Seen, list[int], int], tuple[Tensor, Tensor]]:
    def merge(one: Seen, kept: list[int], head: int) -> tuple[Tensor, Tensor]:
        key, value = one.keys[head], one.values[head]
        given: dict[int, list[int]] = {at: [] for at in kept}
        for token in range(one.tokens):
            if token not in given:
                likeness = [float(key[token] @ key[at] / key[token].norm() / key[at].norm()) for at in kept]
                given[kept[likeness.index(max(likeness))]].append(token)
        merged = []
        for states in (key, value):
            rows = []
            for at, tokens in given.items():
                arriving = [
                    (states[token] + states[at]) / 2 if how == "pivot" else states[token] for token in tokens
                ]
                rows.append(torch.stack([states[at], *arriving]).mean(0))
            merged.append(torch.stack(rows))
        return merged[0], merged[1]

    return merge


def slow_of(model: Any, name: str, prefill: dict[str, Any] | None) -> SlowCache:
    options = OPTIONS[name]
    return SlowCache(
        model, lambda seen: look_m(seen, options), prefill, merging(options.get("merge", "pivot"))
    )


@pytest.mark.parametrize("reduce", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_keeps_and_merges_as_it_says(model: Any, family: Family, name: str, reduce: bool) -> None:
    """Keys and values of every layer and head, and every step's logits."""
    plan = Plan(lightvlm_plan().prefill if reduce else None, LookMCache(**OPTIONS[name]))
    # how M-RoPE goes on right after an image, the slow decoder does not know
    rows = [*ROWS, *ENDS] if family is not QWEN else ROWS
    check_decoding(model, family, plan, lambda prefill: slow_of(model, name, prefill), rows, 6)


def test_nothing_is_merged_into_rows_that_keep_all(model: Any, family: Family) -> None:
    """In a batch with one that does not: its keys and values are those of the prompt, bit for bit."""
    rows = [[1, 2, 3], [1, Image(0), 2, 3, 4]]
    found = []
    for plan in (lightvlm.LookM(keep=0.5, min_tokens=5), Plan()):
        cache = CompactCache(model.config)
        with lightvlm.attach(model, plan):
            generate(model, family.batch(rows), 1, past_key_values=cache)
        found.append(cache)
    for layer, whole in zip(found[0].layers, found[1].layers, strict=True):
        assert layer.ends[1] - layer.starts[1] < whole.ends[1]
        own, all_ = slice(layer.starts[0], layer.ends[0]), slice(whole.ends[0] - 3, whole.ends[0])
        assert torch.equal(layer.keys[0, :, own], whole.keys[0, :, all_])
        assert torch.equal(layer.values[0, :, own], whole.values[0, :, all_])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 2}, "keep must be in (0, 1], got 2"),
        ({"merge": "drop"}, "merge must be one of 'pivot', 'average', got 'drop'"),
        ({"recent_share": 1.1}, "recent_share must be at most 1, got 1.1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        lightvlm.LookM(**options)
