"""SnapKV: each head keeps the prompt's last tokens, and those that these look at.

Source: Li et al., "SnapKV", arXiv 2404.14469. Once the prompt was read, a key's score is the attention that it
receives from the last w tokens, summed over them, and averaged over k neighbouring keys (zeros beyond both ends, as the
published code pools); a head keeps the window and the C - w highest. Generated tokens all stay. Heads that share keys
choose together, by their mean (the published code repeats the keys for each query head, and stores more). Where the
budget is below the window, only the last tokens of the window stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import PromptCachePart, PromptChoice, PromptInput, PromptLayer
from .eviction import LEAST, budget, check_share, keep_highest, received


@register_part("cache", "snapkv")
@dataclass(frozen=True)
class SnapKVCache(PromptCachePart):
    """Keep a window at the end of the prompt and what it attends to."""

    keep: float | None = option(None, "share of the prompt's tokens that stay; None: capacity")
    capacity: int = option(2048, "tokens of a prompt that stay, where keep is not set", low=1)
    window: int = option(32, "last tokens, which score the others and stay", low=1)
    kernel: int = option(5, "neighbouring scores that are averaged; odd", low=1)
    per_head: bool = option(True, "each key/value head keeps tokens of its own")
    min_tokens: int = option(LEAST, "tokens of a row that stay at least, where keep is set", low=1)

    def __post_init__(self) -> None:
        check_share(self.keep)
        check_options(self)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    def budgets(self, prompt: PromptLayer) -> list[int]:
        """Tokens of each row that a layer may keep, by the prompt's tokens before any reduction."""
        return [budget(tokens, self.keep, self.capacity, self.min_tokens) for tokens in prompt.prompt]

    def observe_prompt(self, prompt: PromptInput) -> Tensor:
        scores = received(prompt, self.window)
        scores[:, :, -self.window :] = 0  # those stay in any case, and are no neighbours
        return pooled(scores, self.kernel)

    def choose_prompt(self, seen: Sequence[tuple[PromptLayer, Tensor]]) -> list[PromptChoice | None]:
        found = []
        for prompt, scores in seen:
            batch = len(prompt.rows)
            ends, recent = [prompt.length] * batch, [self.window] * batch
            found.append(
                keep_highest(scores, prompt.starts, ends, self.budgets(prompt), recent, self.per_head)
            )
        return found


def pooled(scores: Tensor, kernel: int) -> Tensor:
    """Mean of ``kernel`` neighbours of (B, H, M), zeros beyond the ends; the same bits wherever in M a token stands."""
    length, around = scores.shape[2], F.pad(scores, (kernel // 2, kernel // 2))
    total = around[:, :, :length].clone()
    for shift in range(1, kernel):
        total += around[:, :, shift : shift + length]
    return total / kernel


def SnapKV(keep: float | None = None, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """A plan that evicts from the prompt as SnapKV does.

    Options: see :class:`SnapKVCache`, and ``keep_for_later``: :class:`lightvlm.Plan`.
    """
    return Plan(
        cache=SnapKVCache(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
