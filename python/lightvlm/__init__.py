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
    from .methods import LightVLM, Random, method, method_names
    from .paged_cache import PagedCompactCache
    from .pages import KVPages
    from .plan import Plan
    from .report import Report
    from .runtime import Run, attach

__all__ = [
    "CompactCache",
    "KVPages",
    "LightVLM",
    "PagedCompactCache",
    "Plan",
    "Random",
    "Report",
    "Run",
    "__version__",
    "attach",
    "method",
    "method_names",
]

# Imported at first use: torch takes a second, transformers several, and `lightvlm --help` needs neither.
_HOME = {
    "CompactCache": "cache",
    "KVPages": "pages",
    "LightVLM": "methods",
    "PagedCompactCache": "paged_cache",
    "Plan": "plan",
    "Random": "methods",
    "Report": "report",
    "Run": "runtime",
    "attach": "runtime",
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
