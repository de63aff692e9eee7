"""PyramidKV: SnapKV's choice, with more of the budget for early layers than for late ones.

Source: Cai et al., "PyramidKV", arXiv 2406.02069, and its code. With C tokens a layer on average, a window of w tokens
and beta = 20, layer l of L keeps the window and

    B_l = B_max - l (B_max - B_min) / (L - 1),    B_min = (C - w) / beta,    B_max = 2 (C - w) - B_min

other tokens. As in the code: a prompt of T < 2 (C - w) tokens is too short for a pyramid, and every layer keeps C;
where the first layer would keep more than there is, B_max is T - w and B_min what leaves the mean at C. The code rounds
the step between layers down; here each B_l is rounded, so that the mean is C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..plan import KeepForLater, Plan, option, register_part
from .base import PromptLayer
from .snapkv import SnapKVCache


@register_part("cache", "pyramidkv")
@dataclass(frozen=True)
class PyramidKVCache(SnapKVCache):
    """Keep a window at the end of the prompt and what it attends to, more of it in early layers."""

    beta: int = option(20, "the last layer's share of the budget is about one part in so many", low=1)

    def budgets(self, prompt: PromptLayer) -> list[int]:
        means = super().budgets(prompt)
        return [self._budget(prompt, tokens, mean) for tokens, mean in zip(prompt.prompt, means, strict=True)]

    def _budget(self, prompt: PromptLayer, tokens: int, mean: int) -> int:
        """Tokens that a layer keeps of a prompt of so many, where ``mean`` is the mean over layers."""
        own = mean - self.window
        if own <= 0 or tokens < 2 * own or prompt.layers == 1:
            return mean
        most = min(2 * own - own // self.beta, tokens - self.window)
        least = 2 * own - most
        step = prompt.layer * (most - least) / (prompt.layers - 1)
        return self.window + math.floor(most - step + 0.5)


def PyramidKV(
    keep: float | None = None, *, keep_for_later: KeepForLater = "offload", **options: object
) -> Plan:
    """A plan that evicts from the prompt as PyramidKV does.

    Options: see :class:`PyramidKVCache`, and ``keep_for_later``: :class:`lightvlm.Plan`.
    """
    return Plan(
        cache=PyramidKVCache(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
