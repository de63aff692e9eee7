"""lightvlm: faster inference for vision-language models of transformers, without training.

>>> import lightvlm
>>> with lightvlm.attach(model, lightvlm.LightVLM(keep=0.35)) as run:
...     out = model.generate(**inputs, max_new_tokens=512)
>>> print(run.report())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightvlm_ext._version import __version__

if TYPE_CHECKING:
    from .cache import CompactCache
    from .decode_loop import generate
    from .kl import Divergence, divergence
    from .methods import (
        H2O,
        KIVI,
        KVPrecision,
        LightVLM,
        LookM,
        PyramidKV,
        Random,
        SnapKV,
        StreamingLLM,
        VLCache,
        ZipVL,
        method,
        method_names,
    )
    from .paged_cache import PagedCompactCache
    from .pages import KVPages
    from .plan import Plan
    from .report import Report
    from .runtime import Run, attach

__all__ = [
    "H2O",
    "KIVI",
    "CompactCache",
    "Divergence",
    "KVPages",
    "KVPrecision",
    "LightVLM",
    "LookM",
    "PagedCompactCache",
    "Plan",
    "PyramidKV",
    "Random",
    "Report",
    "Run",
    "SnapKV",
    "StreamingLLM",
    "VLCache",
    "ZipVL",
    "__version__",
    "attach",
    "divergence",
    "generate",
    "method",
    "method_names",
]

# Imported at first use: torch takes a second, transformers several, and `lightvlm --help` needs neither.
_HOME = {
    "CompactCache": "cache",
    "Divergence": "kl",
    "KVPages": "pages",
    "KVPrecision": "methods",
    "LightVLM": "methods",
    "PagedCompactCache": "paged_cache",
    "Plan": "plan",
    "Random": "methods",
    "VLCache": "methods",
    "StreamingLLM": "methods",
    "SnapKV": "methods",
    "PyramidKV": "methods",
    "LookM": "methods",
    "KIVI": "methods",
    "H2O": "methods",
    "Report": "report",
    "Run": "runtime",
    "ZipVL": "methods",
    "attach": "runtime",
    "divergence": "kl",
    "generate": "decode_loop",
    "method": "methods",
    "method_names": "methods",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
