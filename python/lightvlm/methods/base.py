"""All that a method's file imports, and what the registry knows of a method.

A method is where it works (stages), how it scores (a probe), and how it reduces. A prefill method is one file: a frozen
dataclass deriving from :class:`PrefillPart`. The runtime calls ``stages`` once per prompt, runs attention, asks for
``probe`` rows at the layer before each stage, and hands ``reduce`` a :class:`StageInput`. Methods never see models,
caches or padding rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..contract.cache import CachePart, PromptCachePart, PromptChoice, PromptInput, PromptLayer
from ..contract.precision import PrecisionPart
from ..contract.prefill import Picture, PrefillPart, Probe, Reduced, StageInput, TowerProbe, numbering
from ..contract.reductions import drop, highest, shrinking
from ..contract.sparse import AttentionPart, AttentionScores
from ..contract.stages import (
    Stage,
    ascending,
    check_keep,
    keep_count,
    kept_slots,
    pyramid_stages,
    scaled_layers,
)
from ..plan import Plan

__all__ = [
    "KEEPS",
    "AttentionPart",
    "AttentionScores",
    "CachePart",
    "Method",
    "Picture",
    "PrecisionPart",
    "PrefillPart",
    "Probe",
    "PromptCachePart",
    "PromptChoice",
    "PromptInput",
    "PromptLayer",
    "Reduced",
    "Stage",
    "StageInput",
    "TowerProbe",
    "ascending",
    "check_keep",
    "drop",
    "highest",
    "keep_count",
    "kept_slots",
    "numbering",
    "pyramid_stages",
    "scaled_layers",
    "shrinking",
]

KEEPS = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.06, 0.03)
"""Shares that benchmarks try of methods that keep one."""


@dataclass(frozen=True)
class Method:
    """A registered method: its name, the function that makes its plan, and where it comes from.

    knob: the option that says how much is left to do.   levels: values of it that benchmarks try.
    """

    name: str
    make: Callable[..., Plan]
    source: str
    knob: str = "keep"
    levels: tuple[float, ...] = KEEPS
