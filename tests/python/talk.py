"""Conversations on one cache, and what they are when they are read afresh; plans that drop something."""

from __future__ import annotations

import copy
from typing import Any

import lightvlm
import torch
from lightvlm.methods import ZipVLPrefill
from python.test_decode import plan_of
from python.test_prefill import lightvlm_plan, prompt
from python.tiny import Family, extend
from torch import Tensor

QUESTION = torch.tensor([[21, 22, 23], [24, 25, 26], [27, 28, 29], [30, 31, 32]])
ANSWER = torch.tensor([[3, 4], [4, 5], [5, 6], [6, 7]])
ZIPVL = lightvlm.Plan(
    prefill=ZipVLPrefill(tau=0.6, recent_rows=4, random_rows=2, min_tokens=1, unimportant="drop")
)
PLANS = {
    "reduced": lightvlm_plan(),
    "compacted": plan_of("usual"),
    "compacted-only": plan_of("every-token", reduce=False),
    "every-token": plan_of("every-token"),
    "zipvl-drop": ZIPVL,
    "renumbered": lightvlm.LightKV(layers=(1, 2, 3), windows=(1,), positions="renumber", min_image_tokens=0),
}


class Conversation:
    """A batch of conversations on one cache, and what they are read afresh."""

    def __init__(self, model: Any, family: Family, rows: Any, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.family, self.rows, self.dtype = model, family, [list(row) for row in rows], dtype
        self.cache: Any = None
        self.mask = torch.empty(0)

    def read(self, **options: Any) -> Tensor:
        inputs = prompt(self.family, self.rows, self.dtype)
        out = self.model(**inputs, **options)
        self.cache, self.mask = out.past_key_values, inputs["attention_mask"]
        return out.logits

    def say(self, tokens: Tensor, **options: Any) -> Any:
        """All of the tokens (B, S) at once."""
        out, self.mask = extend(
            self.family, self.model, self.mask, tokens, past_key_values=self.cache, **options
        )
        assert out.past_key_values is self.cache
        for row, more in zip(self.rows, tokens.tolist(), strict=True):
            row += more
        return out

    def show(self, turn: Any, **options: Any) -> Any:
        """Images among the tokens of every row."""
        new = self.family.batch(turn, self.dtype)
        out, self.mask = extend(
            self.family,
            self.model,
            self.mask,
            new["input_ids"],
            pixel_values=new["pixel_values"],
            past_key_values=self.cache,
            **options,
        )
        for row, more in zip(self.rows, turn, strict=True):
            row += more
        return out

    def answer(self, tokens: Tensor) -> Tensor:
        """One after the other: logits (B, S, V)."""
        return torch.cat([self.say(token).logits for token in tokens.split(1, dim=1)], dim=1)

    def fork(self) -> Conversation:
        """The same conversation on a copy of the cache."""
        other = self.afresh()
        other.cache, other.mask = copy.deepcopy(self.cache), self.mask
        return other

    def afresh(self) -> Conversation:
        """The same conversation on an empty cache, nothing read yet."""
        return Conversation(self.model, self.family, self.rows, self.dtype)


def stored(cache: Any) -> list[list[int]]:
    """Tokens that each layer holds of each row."""
    return [
        [end - start for start, end in zip(layer.starts, layer.ends, strict=True)] for layer in cache.layers
    ]


def check(found: Conversation, tokens: Tensor, more: Tensor, limit: float) -> None:
    """A question, and the answer after it, are as on a cache that never held anything."""
    logits = found.say(tokens).logits
    assert logits.shape[1] == tokens.shape[1]
    expected = found.afresh()
    assert (expected.read()[:, -tokens.shape[1] :] - logits).abs().max() <= limit
    assert stored(found.cache) == stored(expected.cache)
    deltas = getattr(found.model.model, "rope_deltas", None)
    assert (expected.answer(more) - found.answer(more)).abs().max() <= limit
    assert stored(found.cache) == stored(expected.cache)
    assert found.cache.get_seq_length() == found.mask.shape[1]
    if deltas is not None:
        assert torch.equal(deltas, found.model.model.rope_deltas)
