"""StreamingLLM: the first tokens, which attention uses as a sink, and the last ones.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453: 4 sinks and a window
of recent tokens (the published script's default: 2000) are all that the cache holds, of the prompt and of what is
generated. The paper evicts after every token (``interval=1``); by default we let 64 come together.
Where we deviate: the paper numbers positions by the place in the cache, by rotating keys anew at every step, so
that a stream may be longer than the positions the model was trained on. Here keys keep the positions they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..host import upload
from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import CachePart, PromptChoice, PromptInput, PromptLayer
from .eviction import LEAST, budget, check_share

if TYPE_CHECKING:
    from ..cache_layer import CompactLayer


@register_part("cache", "streaming_llm")
@dataclass(frozen=True)
class StreamingLLMCache(CachePart):
    """Keep sinks and a window of recent tokens, in the prompt and while decoding."""

    evicts_prompt = True
    rows = recent = 0

    keep: float | None = option(
        None, "share of the sequence that stays, sinks included; None: sinks + window"
    )
    sinks: int = option(4, "first tokens of a row that stay", low=0)
    window: int = option(2000, "last tokens that stay, where keep is not set", low=1)
    interval: int = option(64, "evict every so many generated tokens; the paper: 1", low=1)
    min_tokens: int = option(LEAST, "tokens of a row that stay at least, where keep is set", low=1)

    def __post_init__(self) -> None:
        check_share(self.keep)
        check_options(self)

    def budget(self, logical: int) -> int:
        """Tokens of a row that may stay when ``logical`` have been seen; more than the sinks."""
        return max(self.sinks + 1, budget(logical, self.keep, self.sinks + self.window, self.min_tokens))

    def tail(self, kept: list[int]) -> int:
        return max(0, min(kept) - self.sinks)

    def observe_prompt(self, prompt: PromptInput) -> torch.device:
        return prompt.key.device

    def choose_prompt(self, seen: Sequence[tuple[PromptLayer, torch.device]]) -> list[PromptChoice | None]:
        return [
            self._choose(prompt.starts, [prompt.length] * len(prompt.rows), prompt.prompt, device)
            for prompt, device in seen
        ]

    def choose(self, layer: CompactLayer, leftpad: list[int]) -> tuple[Tensor, Tensor, list[int]] | None:
        logical, device = [layer.seen - pad for pad in leftpad], layer.key_storage.device
        found = self._choose(layer.starts, layer.ends, logical, device)
        return None if found is None else (found.index, upload(found.kept, device), found.kept)

    def _choose(
        self, starts: list[int], ends: list[int], logical: list[int], device: torch.device
    ) -> PromptChoice | None:
        """The first ``sinks`` places of each row, and its last ones up to the budget."""
        tokens = [end - start for start, end in zip(starts, ends, strict=True)]
        kept = [min(count, self.budget(seen)) for count, seen in zip(tokens, logical, strict=True)]
        if kept == tokens:
            return None
        start, end, count = upload([starts, ends, kept], device)[..., None]
        at = torch.arange(max(kept), dtype=torch.int32, device=device)
        index = torch.where(at < self.sinks, start + at, end - count + at)
        return PromptChoice(torch.where(at < count, index, -1).to(torch.int32), kept, self.tail(kept))


def StreamingLLM(
    keep: float | None = None, *, keep_for_later: KeepForLater = "offload", **options: object
) -> Plan:
    """A plan that keeps sinks and recent tokens.

    Options: see :class:`StreamingLLMCache`, and ``keep_for_later``: :class:`lightvlm.Plan`.
    """
    return Plan(
        cache=StreamingLLMCache(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
