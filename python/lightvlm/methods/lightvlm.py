"""LightVLM: pyramid merging of image tokens at prefill, compaction of the KV cache at decode.

Source: Hu, Shang, Feng, Wan, "LightVLM", arXiv 2509.00419. Only its abstract could be had: tokens are merged at several
decoder layers until few dominant ones remain, and unneeded KV entries are removed while decoding. The score,
the layers, the counts, the selection and the merge rule below are *our reading*, chosen on validation scenes
of the reference VLM (docs/lightvlm.md); each is an option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lightvlm_ext import ops

from ..plan import KeepForLater, Plan, check_options, option, register_part
from .base import (
    PrefillPart,
    Probe,
    Reduced,
    Stage,
    StageInput,
    check_keep,
    drop,
    highest,
    pyramid_stages,
    scaled_layers,
)
from .decode_compaction import DecodeCompaction
from .spread import spread_scores

_SPREAD = 0.5
"""At least every other token stays at first, like the squares of one colour of a chessboard."""


def default_layers(layers: int) -> tuple[int, ...]:
    """Stages at 3/8, 5/8 and 3/4 of the depth, each a layer after the last: 3, 5, 6 of 8 and 10, 18, 21 of 28.

    Validation scenes of the reference VLM decided for 8 layers (docs/lightvlm.md); LightKV publishes 12, 17, 22 for 28.
    """
    return scaled_layers(layers, (3, 5, 6), 8)


@register_part("prefill", "lightvlm")
@dataclass(frozen=True)
class LightVLMPrefill(PrefillPart):
    """Pyramid merging inside the decoder (our reading of LightVLM's encoding part).

    A first stage at the input of layer 0 knows no attention yet: it keeps tokens spread evenly over the image
    (:mod:`~lightvlm.methods.spread`), into which the others merge. The stages after it choose by attention.
    """

    keep: float = option(0.35, "final share of each image's tokens")
    layers: tuple[int, ...] | None = option(
        None, "choose by attention at the input of these layers; None: by depth, 10, 18, 21 of 28"
    )
    fractions: tuple[float, ...] | None = option(
        None, "share kept from each of these layers on; None: geometric"
    )
    spread: float | None = option(
        None,
        "share kept at the input of layer 0, spread evenly over the image; 1: no such stage; None: 2 * keep, at least "
        "0.5, and 1 where layers are given",
        low=0.0,
        high=1.0,
    )
    probe_rows: Literal["text", "last"] = option("text", "query rows that score", choices=("text", "last"))
    probe_limit: int = option(64, "at most this many of the last text rows", low=1)
    over_rows: Literal["mean", "max"] = option(
        "mean", "reduction of the score over rows", choices=("mean", "max")
    )
    over_heads: Literal["mean", "max"] = option(
        "mean", "reduction of the score over heads", choices=("mean", "max")
    )
    selection: Literal["diverse", "top"] = option(
        "diverse", "greedy diverse, or highest scores", choices=("diverse", "top")
    )
    strength: float = option(
        1.0, "how much a token's likeness to chosen ones counts against it", low=0.0, high=1.0
    )
    merge: Literal["uniform", "score", "drop"] = option(
        "uniform",
        "dropped tokens merge with equal weights, with their scores, or not at all",
        choices=("uniform", "score", "drop"),
    )
    min_image_tokens: int = option(32, "step aside below this many image tokens in a prompt", low=0)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_options(self)
        if self.spread is not None and self.spread < self.keep:
            raise ValueError(f"spread must be at least keep ({self.keep}), got {self.spread}")

    def stages(self, layers: int) -> tuple[Stage, ...]:
        spread = self.spread
        if spread is None:
            spread = max(_SPREAD, min(1.0, 2 * self.keep)) if self.layers is None else 1.0
        chosen = pyramid_stages(
            layers, self.keep, self.layers, self.fractions, default_layers, scored=True, first=spread
        )
        return (Stage(0, spread), *chosen) if chosen and spread < 1 else chosen

    @property
    def probe(self) -> Probe:
        return Probe(self.probe_rows, self.probe_limit, self.over_rows, self.over_heads)

    def reduce(self, stage: StageInput) -> Reduced:
        scores = stage.scores
        if scores is None:
            selection = highest(stage, spread_scores(stage))
        elif self.selection == "diverse":
            selection = ops.select_diverse(
                scores,
                stage.hidden,
                strength=self.strength,
                keep=stage.keep,
                forced=stage.text,
                segment=stage.segment,
                capacity=stage.capacity,
            )
        else:
            selection = highest(stage, scores)
        if self.merge == "drop":
            return drop(stage, selection)
        if self.merge == "score" and scores is not None:
            weight = scores.clamp_min(0)
        else:
            weight = torch.ones(stage.segment.shape, device=stage.segment.device)
        hidden = ops.merge_tokens(stage.hidden, selection, weight, stage.segment, align="right")
        return Reduced(selection, hidden)


def LightVLM(
    keep: float = 0.35,
    *,
    decode_keep: float | None = 0.35,
    decode_interval: int = 64,
    decode_sinks: int = 4,
    decode_recent: int = 64,
    decode_score: Literal["mass", "queries"] = "mass",
    decode_rows: int = 16,
    keep_for_later: KeepForLater = "offload",
    **options: object,
) -> Plan:
    """LightVLM's plan: image tokens merged in a pyramid at prefill, the KV cache compacted while decoding.

    Args:
        keep: final tokens of each image over its original tokens, in (0, 1]; 1 keeps all.
        decode_keep: share of the sequence that the cache holds after each compaction; None: never compact.
        decode_interval, decode_sinks, decode_recent, decode_score, decode_rows: see :class:`DecodeCompaction`.
        keep_for_later: see :class:`lightvlm.Plan`.
        options: see :class:`LightVLMPrefill`.

    Raises:
        ValueError, TypeError: an option out of range; the message names it.
    """
    prefill = LightVLMPrefill(keep=keep, **options)  # type: ignore[arg-type]
    cache = None
    if decode_keep is not None and decode_keep != 1:
        cache = DecodeCompaction(
            decode_keep,
            interval=decode_interval,
            sinks=decode_sinks,
            recent=decode_recent,
            score=decode_score,
            rows=decode_rows,
        )
    return Plan(prefill=prefill, cache=cache, keep_for_later=keep_for_later)
