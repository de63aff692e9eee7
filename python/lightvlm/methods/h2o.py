"""H2O: each head keeps the last tokens and the heavy hitters, which have received most attention so far.

Source: Zhang et al., "H2O", arXiv 2306.14048. A token's score is the attention that it has received from all tokens
after it, the prompt's and the generated ones, added up; half of the budget are recent tokens and half those before them
that score highest (published: a tenth of the sequence each). Scores go with the tokens; what is evicted is gone. The
paper evicts after every token (``interval=1``); by default we let 64 come together, as moving the cache costs a
launch and its bytes, so up to 64 tokens beyond the budget are stored in between. Heads that share keys choose together.

The budget is a share of the sequence at the time, so it grows with the answer; ``limit`` bounds it, as the published
code's fixed sizes do. A row keeps at least ``min_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..host import upload
from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import CachePart, PromptChoice, PromptInput, PromptLayer, check_keep
from .eviction import LEAST, budget, keep_highest, received, share_of

if TYPE_CHECKING:
    from ..cache_layer import CompactLayer


@register_part("cache", "h2o")
@dataclass(frozen=True)
class H2OCache(CachePart):
    """Keep recent tokens and those that received most attention, in the prompt and while decoding."""

    evicts_prompt = True
    starts_mass = True
    rows = 0

    keep: float = option(0.2, "share of the sequence that stays")
    recent_share: float = option(0.5, "share of that for the last tokens", low=0, high=1)
    limit: int | None = option(None, "keep at most so many tokens, however long the sequence", low=1)
    interval: int = option(64, "evict every so many generated tokens; the paper: 1", low=1)
    per_head: bool = option(True, "each key/value head keeps tokens of its own")
    min_tokens: int = option(LEAST, "tokens of a row that stay at least", low=1)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)
        if self.limit is not None and self.limit < self.min_tokens:
            raise ValueError(f"limit must be at least min_tokens ({self.min_tokens}), got {self.limit}")

    @property
    def wants_mass(self) -> bool:
        return True

    def budget(self, logical: int) -> int:
        """Tokens of a row that may stay when ``logical`` have been seen."""
        wanted = budget(logical, self.keep, 0, self.min_tokens)
        return wanted if self.limit is None else min(wanted, self.limit)

    def tail(self, kept: list[int]) -> int:
        return min(share_of(count, self.recent_share) for count in kept)

    def observe_prompt(self, prompt: PromptInput) -> Tensor:
        return received(prompt)

    def choose_prompt(self, seen: Sequence[tuple[PromptLayer, Tensor]]) -> list[PromptChoice | None]:
        return [
            self._choose(scores, prompt.starts, [prompt.length] * len(prompt.rows), prompt.prompt)
            for prompt, scores in seen
        ]

    def choose(self, layer: CompactLayer, leftpad: list[int]) -> tuple[Tensor, Tensor, list[int]] | None:
        assert layer.mass is not None
        logical = [layer.seen - pad for pad in leftpad]
        found = self._choose(layer.mass[:, :, : max(layer.ends)], layer.starts, layer.ends, logical)
        return None if found is None else (found.index, upload(found.kept, found.index.device), found.kept)

    def _choose(
        self, scores: Tensor, starts: list[int], ends: list[int], logical: list[int]
    ) -> PromptChoice | None:
        may_stay = [self.budget(tokens) for tokens in logical]
        tokens = [min(*row) for row in zip(may_stay, map(int.__sub__, ends, starts), strict=True)]
        recent = [share_of(count, self.recent_share) for count in tokens]
        return keep_highest(scores, starts, ends, may_stay, recent, self.per_head)


def H2O(keep: float = 0.2, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """A plan that evicts as H2O does.

    Options: see :class:`H2OCache`, and ``keep_for_later``: :class:`lightvlm.Plan`.
    """
    return Plan(
        cache=H2OCache(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
