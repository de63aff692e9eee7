"""ZipVL: in every layer of the prefill only as many tokens attend as the attention needs, found layer by layer.

Source: He, Chen, Liu, Shao, Zhou, Zhang, Zhuang, "ZipVL", arXiv 2410.08584. A token's importance is what probe rows
(the last ones, and random ones) give it. Its count p is the fewest tokens whose summed attention reaches tau (eq. 6, of
v1); which p they are goes by attention divided by the rows that can see the token (eq. 7 to 9). The others get no
attention output and go on by the residual path. Their keys and values are stored in 2 bits where the others' get 4
(version 1 of the paper; kv_precision.py), or dropped (version 2).

One addition: the first layer attends in full. On the reference VLM nearly all that sparse attention costs is lost there
(docs/zipvl.md), and one layer of many is cheap; ``full_layers=0`` is the paper's rule.

Our reading, where the text leaves it open: one set of tokens a layer, from the mean over heads; the random rows are
drawn once a prompt and seeded; tokens whose logits are asked for always attend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lightvlm_ext import ops

from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import AttentionPart, AttentionScores
from .kv_precision import KVPrecision

if TYPE_CHECKING:
    from lightvlm_ext.ops import Selection


@register_part("prefill", "zipvl")
@dataclass(frozen=True)
class ZipVLPrefill(AttentionPart):
    """Adaptive sparse attention at prefill."""

    tau: float = option(0.975, "share of the probed attention that the attending tokens hold, in (0, 1]")
    recent_rows: int = option(64, "probe rows: so many of the last tokens", low=1)
    random_rows: int = option(64, "and so many others, drawn at random", low=0)
    seed: int = option(0, "seed of the random rows", low=0)
    unimportant: Literal["keep", "drop"] = option(
        "keep", "what becomes of the other tokens' keys and values", choices=("keep", "drop")
    )
    full_layers: int = option(1, "first layers, in which all tokens attend; 0: none, as in the paper", low=0)
    min_tokens: int = option(512, "step aside where the longest row of a prompt is shorter", low=1)

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")

    def probe_rows(self, tokens: int) -> list[int]:
        others = max(0, tokens - self.recent_rows)
        drawn = torch.randperm(others, generator=torch.Generator().manual_seed(self.seed))[: self.random_rows]
        return [*sorted(drawn.tolist()), *range(others, tokens)]

    def choose(self, scores: AttentionScores) -> Selection:
        # tau = 1 asks for all mass, which rounding in fixed point would let a few tokens less hold.
        if self.tau == 1:
            return ops.select(scores.mass, keep=scores.mass.shape[1], candidates=scores.valid)
        count = ops.select(scores.mass, mass=self.tau, candidates=scores.valid).count
        each = scores.mass / scores.visible.clamp_min(1)
        return ops.select(
            each, keep=count, candidates=scores.valid, forced=scores.forced, capacity=scores.mass.shape[1]
        )


def ZipVL(
    tau: float = 0.975,
    *,
    unimportant: Literal["keep", "drop"] = "keep",
    bits: int = 4,
    low_bits: int = 2,
    sinks: int = 4,
    recent: int = 64,
    interval: int = 128,
    edge_bits: int | None = None,
    edge_layers: int = 1,
    keep_text: bool = False,
    keep_for_later: KeepForLater = "offload",
    **options: object,
) -> Plan:
    """ZipVL's plan: only important tokens attend at prefill; the cache in 4 bits for them and 2 for the rest.

    Args:
        tau: share of the attention that important tokens hold, in (0, 1]; the paper reports 0.975 and 0.96.
        unimportant: "keep" stores what is not important in ``low_bits``, as version 1 of the paper does; "drop" is its
            version 2, which packs nothing.
        bits, low_bits, sinks, recent, interval, edge_bits, edge_layers, keep_text: how the cache is stored, see
            :class:`~lightvlm.methods.KVPrecision`. The paper packs generated tokens by 100, and has no sinks; here
            they are packed by 128, as 64 tokens share their channels' scales.
        keep_for_later: see :class:`lightvlm.Plan`.
        options: see :class:`ZipVLPrefill`.

    Raises:
        ValueError, TypeError: an option out of range; the message names it.
    """
    prefill = ZipVLPrefill(tau=tau, unimportant=unimportant, **options)  # type: ignore[arg-type]
    precision = KVPrecision(
        bits=bits,
        low_bits=low_bits,
        tau=tau,
        sinks=sinks,
        recent=recent,
        interval=interval,
        edge_bits=edge_bits,
        edge_layers=edge_layers,
        keep_text=keep_text,
    )
    return Plan(
        prefill=prefill, precision=precision if unimportant == "keep" else None, keep_for_later=keep_for_later
    )
