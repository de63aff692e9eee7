"""The methods by name. Each lives in a file of its own; adding one adds a file and a line here."""

from __future__ import annotations

from ..plan import Plan
from .base import Method
from .cdpruner import CDPruner
from .divprune import DivPrune
from .downsample import Downsample
from .fastv import FastV
from .framefusion import FrameFusion
from .h2o import H2O
from .illava import ILLaVA
from .kivi import KIVI
from .kv_precision import KVPrecision
from .lightkv import LightKV
from .lightvlm import LightVLM
from .look_m import LookM
from .prumerge import PruMerge
from .pyramiddrop import PyramidDrop
from .pyramidkv import PyramidKV
from .random import Random
from .snapkv import SnapKV
from .sparsevlm import SparseVLM
from .streaming_llm import StreamingLLM
from .tome import ToMe
from .uniform import Uniform
from .visionzip import VisionZip
from .vl_cache import VLCache
from .zipvl import ZipVL, ZipVLPrefill

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("cdpruner", CDPruner, "arXiv 2506.10967"),
        Method("divprune", DivPrune, "arXiv 2503.02175"),
        Method("downsample", Downsample, "baseline"),
        Method("fastv", FastV, "arXiv 2403.06764"),
        Method("framefusion", FrameFusion, "arXiv 2501.01986"),
        Method("h2o", H2O, "arXiv 2306.14048"),
        Method("illava", ILLaVA, "arXiv 2412.06263"),
        Method("kivi", KIVI, "arXiv 2402.02750", knob="bits", levels=(4, 2)),
        Method("lightkv", LightKV, "arXiv 2605.00789"),
        Method("lightvlm", LightVLM, "arXiv 2509.00419 (our reading of its abstract)"),
        Method("look_m", LookM, "arXiv 2406.18139"),
        Method("prumerge", PruMerge, "arXiv 2403.15388"),
        Method("pyramiddrop", PyramidDrop, "arXiv 2410.17247"),
        Method("pyramidkv", PyramidKV, "arXiv 2406.02069"),
        Method("random", Random, "baseline"),
        Method("snapkv", SnapKV, "arXiv 2404.14469"),
        Method("sparsevlm", SparseVLM, "arXiv 2410.04417"),
        Method("streaming_llm", StreamingLLM, "arXiv 2309.17453"),
        Method("tome", ToMe, "arXiv 2210.09461, inside the decoder"),
        Method("uniform", Uniform, "baseline"),
        Method("visionzip", VisionZip, "arXiv 2412.04467"),
        Method("vl_cache", VLCache, "arXiv 2410.23317"),
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
    "H2O",
    "KIVI",
    "CDPruner",
    "DivPrune",
    "Downsample",
    "FastV",
    "FrameFusion",
    "ILLaVA",
    "KVPrecision",
    "LightKV",
    "LightVLM",
    "LookM",
    "PruMerge",
    "PyramidDrop",
    "PyramidKV",
    "Random",
    "SnapKV",
    "SparseVLM",
    "StreamingLLM",
    "ToMe",
    "Uniform",
    "VLCache",
    "VisionZip",
    "ZipVL",
    "ZipVLPrefill",
    "method",
    "method_names",
]
