"""lightvlm: faster inference for vision-language models of transformers, without training.

>>> import lightvlm
>>> with lightvlm.attach(model, lightvlm.LightVLM(keep=0.35)) as run:
...     out = model.generate(**inputs, max_new_tokens=512)
>>> print(run.report())
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .methods import LightVLM, Random, method, method_names
from .plan import Plan
from .report import Report
from .runtime import Run, attach

if TYPE_CHECKING:
    from .cache import CompactCache

__version__ = "0.1.0"

__all__ = [
    "CompactCache",
    "LightVLM",
    "Plan",
    "Random",
    "Report",
    "Run",
    "attach",
    "method",
    "method_names",
]


def __getattr__(name: str) -> Any:
    if name == "CompactCache":  # its base class is transformers'; importing lightvlm must not import transformers
        from .cache import CompactCache

        return CompactCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
