"""VL-Cache: what the text after the image looks at, with more of the budget for layers whose attention is spread out.

Source: Tu et al., "VL-Cache", arXiv 2410.23317. The queries that speak are those of the text after the last image. A
layer's sparsity is the share of their attention weights that are below 1 % of their row's largest, over all heads and
keys that they see; layer l of L then keeps

    beta_l = clip((1 - sparsity_l) / sum_m (1 - sparsity_m) * keep * L, 0.01, 1)

of the prompt: a tenth of that are its last tokens, the others those that received most from the same queries, head by
head (published: keep = 0.1). Generated tokens all stay. How sparse each layer is, is read from the device, once a
prompt.
Where we deviate: at most the last ``limit`` of the queries speak, because sparsity looks at each of their weights; a
prompt that ends with an image is asked by its last token, and one without images by its last ``limit``; and a row keeps
at least ``min_tokens`` in each layer. And ``keep`` of 1 keeps all, where the formula would still
take from layers that are sparser than others. Heads that share keys choose together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightvlm_ext import ops

from ..host import upload
from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import PromptCachePart, PromptChoice, PromptInput, PromptLayer, check_keep, keep_count
from .eviction import LEAST, keep_highest


@dataclass(frozen=True)
class _Seen:
    """scores (B, Hkv, M) fp32.   low (B,) int64: weights below the threshold, of ``weights`` of each row."""

    scores: Tensor
    low: Tensor
    weights: list[int]


@register_part("cache", "vl_cache")
@dataclass(frozen=True)
class VLCachePart(PromptCachePart):
    """Keep what the text after the image looks at; layers share the budget by how spread out their attention is."""

    keep: float = option(0.1, "share of the prompt's tokens that stay, mean over layers")
    threshold: float = option(
        0.01, "weights below this share of their row's largest are sparse", low=0, high=1
    )
    recent_share: float = option(0.1, "share of a layer's budget for the last tokens", low=0, high=1)
    limit: int = option(64, "at most so many queries speak", low=1)
    per_head: bool = option(True, "each key/value head keeps tokens of its own")
    min_tokens: int = option(LEAST, "tokens of a row that stay at least", low=1)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)
        if self.threshold == 0:
            raise ValueError(f"threshold must be above 0, got {self.threshold}")

    def observe_prompt(self, prompt: PromptInput) -> _Seen:
        layer, device = prompt.layer, prompt.query.device
        speak = [min(self.limit, max(1, row.trailing_text)) for row in layer.rows]
        width = max(speak)
        places = [[-1] * (width - own) + list(range(layer.length - own, layer.length)) for own in speak]
        rows, query = upload(places, device), prompt.query[:, -width:]
        starts = upload(layer.starts, device)
        scores = ops.importance(
            query, prompt.key, scale=prompt.scale, row_pos=rows, leftpad=starts, rows="sum", heads="none"
        )
        weights = [
            query.shape[2] * sum(at - start + 1 for at in own if at >= 0)
            for own, start in zip(places, layer.starts, strict=True)
        ]
        return _Seen(scores, self._low(query, prompt.key, prompt.scale, rows, starts), weights)

    def _low(self, query: Tensor, key: Tensor, scale: float | None, rows: Tensor, starts: Tensor) -> Tensor:
        """Weights of each batch row that are below the threshold (B,), from query (B, W, Hq, D) at places rows (B, W).

        A weight is below a share of its row's largest where its logit is so far below the largest. One key head at a
        time, so that the logits of few heads exist at once.
        """
        scale = query.shape[3] ** -0.5 if scale is None else scale
        at = torch.arange(key.shape[1], device=key.device)
        seen = (at <= rows[..., None]) & (at >= starts[:, None, None])  # (B, W, M)
        seen = seen[:, :, None]
        low = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
        group = query.shape[2] // key.shape[2]
        for head in range(key.shape[2]):
            own = query[:, :, head * group : (head + 1) * group].float() * scale
            logits = own @ key[:, :, head].float().transpose(1, 2)[:, None]  # (B, W, g, M)
            largest = logits.masked_fill(~seen, -math.inf).amax(-1, keepdim=True)
            low += ((logits < largest + math.log(self.threshold)) & seen).sum(dim=(1, 2, 3))
        return low

    def choose_prompt(self, seen: Sequence[tuple[PromptLayer, _Seen]]) -> list[PromptChoice | None]:
        if self.keep == 1:
            return [None] * len(seen)
        counts = torch.stack([one.low for _, one in seen]).tolist()
        spread = [
            [1 - low / max(1, number) for low, number in zip(own, one.weights, strict=True)]
            for own, (_, one) in zip(counts, seen, strict=True)
        ]
        totals = [sum(rows) for rows in zip(*spread, strict=True)]
        found = []
        for own, (prompt, one) in zip(spread, seen, strict=True):
            shares = [
                min(1.0, max(0.01, x / all_ * self.keep * len(seen)))
                for x, all_ in zip(own, totals, strict=True)
            ]
            may_stay = [
                max(self.min_tokens, keep_count(tokens, share))
                for tokens, share in zip(prompt.prompt, shares, strict=True)
            ]
            recent = [max(1, math.floor(self.recent_share * count + 0.5)) for count in may_stay]
            ends = [prompt.length] * len(prompt.rows)
            found.append(keep_highest(one.scores, prompt.starts, ends, may_stay, recent, self.per_head))
        return found


def VLCache(keep: float = 0.1, *, keep_for_later: KeepForLater = "offload", **options: object) -> Plan:
    """A plan that evicts from the prompt as VL-Cache does.

    Options: see :class:`VLCachePart`, and ``keep_for_later``: :class:`lightvlm.Plan`.
    """
    return Plan(
        cache=VLCachePart(keep=keep, **options),  # type: ignore[arg-type]
        keep_for_later=keep_for_later,
    )
