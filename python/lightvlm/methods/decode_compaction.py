"""Decode-time compaction: evict cached tokens, generated ones too, that recent queries no longer look at.

The policy behind LightVLM's decoding part, in our reading (arXiv 2509.00419 says only that unneeded entries are
removed): every ``interval`` tokens, keep the sinks, a recent window, and the tokens with the most attention, up to a
share of the sequence. Attention is added up over all generated tokens, as in H2O (Zhang et al., arXiv 2306.14048), here
for all heads of a layer together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightvlm_ext import ops

from ..host import upload
from ..plan import check_options, option, register_part
from .base import CachePart, check_keep

if TYPE_CHECKING:
    from ..cache_layer import CompactLayer


@register_part("cache", "decode_compaction")
@dataclass(frozen=True)
class DecodeCompaction(CachePart):
    """Keep ``keep`` of the sequence: sinks, a recent window, and what was attended to most."""

    keep: float = option(0.35, "share of the logical sequence kept in the cache at each compaction")
    interval: int = option(64, "compact every so many generated tokens", low=1)
    sinks: int = option(4, "first tokens of a row that always stay", low=0)
    recent: int = option(64, "last tokens of a row that always stay", low=1)
    rows: int = option(
        16, "score queries: the last so many queries, as far as they are generated tokens", low=1
    )
    limit: int | None = option(None, "keep at most so many tokens, however long the sequence", low=1)
    score: Literal["mass", "queries"] = option(
        "mass",
        "what a token is worth: attention from all generated tokens, added up in the decode pass (H2O), or from the "
        "last queries alone",
        choices=("mass", "queries"),
    )
    others: Literal["drop", "demote"] = option(
        "drop",
        "tokens beyond the budget are dropped or, where a precision part packs them, stored in 2 bits",
        choices=("drop", "demote"),
    )

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)
        always = self.sinks + self.recent
        if self.limit is not None and self.limit < always:
            raise ValueError(
                f"limit must be at least sinks + recent, {always} tokens that always stay, got {self.limit}"
            )

    def budget(self, logical: int) -> int:
        """Tokens of a row that may stay when ``logical`` tokens have been seen."""
        wanted = int(self.keep * logical + 0.5)
        return max(self.sinks + self.recent, wanted if self.limit is None else min(wanted, self.limit))

    @property
    def demotes(self) -> bool:  # type: ignore[override]
        return self.others == "demote"

    def choose(self, layer: CompactLayer, leftpad: list[int]) -> tuple[Tensor, Tensor, list[int]] | None:
        starts, ends = layer.starts, layer.ends
        kept = [
            min(end - start, self.budget(layer.seen - pad))
            for start, end, pad in zip(starts, ends, leftpad, strict=True)
        ]
        if all(count == end - start for count, start, end in zip(kept, starts, ends, strict=True)):
            return None
        # The queries' tokens must be the last that are stored, and beyond the recent window some may be gone.
        scores = layer.scores(None if self.score == "mass" else min(self.rows, self.recent))
        if scores is None:
            return None
        device = scores.device
        start, end = layer.bounds()
        at = torch.arange(scores.shape[1], device=device)[None]
        inside = (at >= start[:, None]) & (at < end[:, None])
        forced = inside & ((at < start[:, None] + self.sinks) | (at >= end[:, None] - self.recent))
        free = [
            max(0, count - min(self.sinks + self.recent, e - s))
            for count, s, e in zip(kept, starts, ends, strict=True)
        ]
        keep = upload(free, device)
        chosen = ops.select(scores, keep=keep, forced=forced, candidates=inside, capacity=max(kept))
        return chosen.index, chosen.count, kept

    @property
    def wants_mass(self) -> bool:
        return self.score == "mass"
