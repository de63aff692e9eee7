"""Cache methods once more: in float64, with the softmax weights of the whole prompt, token by token, head by head.

It shares no code with the package. A method is a function of :class:`Seen` that says which tokens each key/value head
of a layer keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightvlm import CompactCache, Plan, attach
from lightvlm.plan import Part
from python.slow import SlowDecoder, _weights
from python.test_prefill import noise, prompt, slow_options
from python.tiny import IMAGE_ID, Family, generate_logits
from torch import Tensor

Kept = list[list[int]]
"""For each key/value head the tokens that stay, ascending."""


@dataclass(frozen=True)
class Seen:
    """A layer's prompt. weights: for each key/value head its query heads' attention (g, M, M).   image: which of the M
    tokens are an image's.   prompt: tokens before any reduction.   keys, values (Hkv, M, D)."""

    layer: int
    layers: int
    weights: list[Tensor]
    image: list[bool]
    prompt: int
    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        return len(self.image)

    def received(self, head: int, rows: list[int]) -> list[float]:
        """What each token receives from these rows: summed, mean over the query heads."""
        own = self.weights[head]
        return [
            sum(float(own[query, row, token]) for row in rows for query in range(len(own))) / len(own)
            for token in range(self.tokens)
        ]


Method = Callable[[list[Seen]], list[Kept]]


def count_of(tokens: int, share: float) -> int:
    return max(1, math.floor(share * tokens + 0.5))


def highest(scores: list[float], among: list[int], number: int) -> list[int]:
    """The tokens that score highest, ties to the lower."""
    return sorted(sorted(among, key=lambda token: (-scores[token], token))[:number])


class SlowCache(SlowDecoder):
    """One row, evicted from by a method once its prompt was read.

    ``merge``: (seen, kept, head) -> keys and values of the tokens that stay, or None.
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        prefill: dict[str, Any] | None = None,
        merge: Callable[[Seen, list[int], int], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__(model, prefill)
        self.method, self.merge = method, merge
        self.prompt_queries: list[Tensor] = []
        self.chosen: list[Kept] = []

    def _project(self, layer: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = super()._project(layer, hidden, positions)
        if len(self.prompt_queries) < len(self.layers):
            self.prompt_queries.append(found[0])
        return found

    def read(self, inputs: dict[str, Tensor]) -> Tensor:
        logits = super().read(inputs)
        seen = [self.look_at(index, inputs["input_ids"][0].tolist()) for index in range(len(self.layers))]
        self.chosen = self.method(seen)
        for index, (one, kept) in enumerate(zip(seen, self.chosen, strict=True)):
            parts = [
                (self.keys[index][head, own], self.values[index][head, own])
                if self.merge is None
                else self.merge(one, own, head)
                for head, own in enumerate(kept)
            ]
            self.keys[index] = torch.stack([key for key, _ in parts])
            self.values[index] = torch.stack([value for _, value in parts])
        return logits

    def look_at(self, index: int, ids: list[int]) -> Seen:
        keys, layer = self.keys[index], self.layers[index]
        weights = _weights(self.prompt_queries[index], keys, layer.self_attn.scaling)
        group = len(weights) // len(keys)
        stages = [stage for stage in self.kept if stage <= index]
        image = [token == IMAGE_ID for token in ids]
        if stages:  # of each image, what the last stage left
            image = []
            left = iter(self.kept[max(stages)])
            sizes = iter(self.sizes)
            at = 0
            while at < len(ids):
                if ids[at] == IMAGE_ID:
                    image += [True] * len(next(left))
                    at += next(sizes)
                else:
                    image.append(False)
                    at += 1
        return Seen(
            index,
            len(self.layers),
            [weights[head * group : (head + 1) * group] for head in range(len(keys))],
            image,
            len(ids),
            keys,
            self.values[index],
        )

    def _embed(self, inputs: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
        hidden, sizes = super()._embed(inputs)
        if sizes:
            self.sizes = sizes
        return hidden, sizes


def places(stored: CompactCache, whole: CompactCache, row: int) -> list[Kept]:
    """Which of a prompt's tokens a cache holds in each layer and head, by their keys, bit for bit."""
    found = []
    for layer, full in zip(stored.layers, whole.layers, strict=True):
        assert layer.keys is not None
        assert full.keys is not None
        keys, every = (
            one.keys[row, :, one.starts[row] : one.ends[row]]  # type: ignore[index]
            for one in (layer, full)
        )
        same = (keys[:, :, None] == every[:, None]).all(-1)  # (Hkv, M', M)
        assert (same.sum(-1) == 1).all()
        found.append(same.int().argmax(-1).tolist())
    return found


def check_prompt(model: Any, family: Family, part: Part, method: Method, rows: Any) -> None:
    """The tokens that each layer and head of a padded batch keeps."""
    inputs = prompt(family, rows)
    with torch.no_grad():
        whole, stored = CompactCache(model.config), CompactCache(model.config)
        with attach(model, Plan()):
            model(**inputs, past_key_values=whole)
        with attach(model, Plan(cache=part)):
            model(**inputs, past_key_values=stored)
    gone = 0
    for b, row in enumerate(rows):
        slow = SlowCache(model, method)
        slow.read(family.batch([row]))
        assert places(stored, whole, b) == slow.chosen
        gone += sum(slow.seen - len(head) for layer in slow.chosen for head in layer)
    assert gone  # or nothing was tested


def check_decoding(
    model: Any,
    family: Family,
    plan: Plan,
    make: Callable[[dict[str, Any] | None], SlowDecoder],
    rows: Any,
    steps: int = 12,
) -> None:
    """Every step's logits of a padded batch, and what is stored at the end."""
    cache = CompactCache(model.config)
    with attach(model, plan) as run:
        tokens, logits = generate_logits(model, family.batch(rows), steps, past_key_values=cache)
    limit = 4 * noise(model, family, rows) + 1e-5
    for b, row in enumerate(rows):
        slow = make(slow_options(plan.prefill) if plan.prefill is not None else None)
        expected = [slow.read(family.batch([row]))[-1]]
        expected += [slow.step(token) for token in tokens[b, :-1].tolist()]
        assert (logits[b] - torch.stack(expected)).abs().max() <= limit
        for layer, keys, values in zip(cache.layers, slow.keys, slow.values, strict=True):
            at = slice(layer.starts[b], layer.ends[b])
            for states, wanted in ((layer.keys, keys), (layer.values, values)):
                assert states is not None
                assert states[b, :, at].shape == wanted.shape
                assert (states[b, :, at] - wanted).abs().max() <= limit
    assert run.report().stepped_aside == {}
