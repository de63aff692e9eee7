"""The methods by name. Each lives in a file of its own; adding one adds a file and a line here."""

from __future__ import annotations

from ..plan import Plan
from .base import Method
from .cdpruner import CDPruner
from .divprune import DivPrune
from .downsample import Downsample
from .fastv import FastV
from .framefusion import FrameFusion
from .illava import ILLaVA
from .kv_precision import KVPrecision
from .lightkv import LightKV
from .lightvlm import LightVLM
from .prumerge import PruMerge
from .pyramiddrop import PyramidDrop
from .random import Random
from .sparsevlm import SparseVLM
from .tome import ToMe
from .uniform import Uniform
from .visionzip import VisionZip
from .zipvl import ZipVL, ZipVLPrefill

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("cdpruner", CDPruner, "arXiv 2506.10967"),
        Method("divprune", DivPrune, "arXiv 2503.02175"),
        Method("downsample", Downsample, "baseline"),
        Method("fastv", FastV, "arXiv 2403.06764"),
        Method("framefusion", FrameFusion, "arXiv 2501.01986"),
        Method("illava", ILLaVA, "arXiv 2412.06263"),
        Method("lightkv", LightKV, "arXiv 2605.00789"),
        Method("lightvlm", LightVLM, "arXiv 2509.00419 (our reading of its abstract)"),
        Method("prumerge", PruMerge, "arXiv 2403.15388"),
        Method("pyramiddrop", PyramidDrop, "arXiv 2410.17247"),
        Method("random", Random, "baseline"),
        Method("sparsevlm", SparseVLM, "arXiv 2410.04417"),
        Method("tome", ToMe, "arXiv 2210.09461, inside the decoder"),
        Method("uniform", Uniform, "baseline"),
        Method("visionzip", VisionZip, "arXiv 2412.04467"),
        Method("zipvl", ZipVL, "arXiv 2410.08584", knob="tau", levels=(0.975, 0.96)),
    )
}


def method_names() -> list[str]:
    """Names that :func:`method` takes."""
    return sorted(METHODS)


def method(name: str, **options: object) -> Plan:
    """The plan of a method by name.

    Raises:
        ValueError: no such method, or an option out of range.
        TypeError: an option the method does not have.
    """
    found = METHODS.get(name)
    if found is None:
        raise ValueError(f"method must be one of {', '.join(method_names())}, got {name!r}")
    return found.make(**options)


__all__ = [
    "CDPruner",
    "DivPrune",
    "Downsample",
    "FastV",
    "FrameFusion",
    "ILLaVA",
    "KVPrecision",
    "LightKV",
    "LightVLM",
    "PruMerge",
    "PyramidDrop",
    "Random",
    "SparseVLM",
    "ToMe",
    "Uniform",
    "VisionZip",
    "ZipVL",
    "ZipVLPrefill",
    "method",
    "method_names",
]
