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
    from .attention import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
        register_attention,
        replace_flash_attn,
    )
    from .cache import CompactCache
    from .decode_loop import generate
    from .kl import Divergence, divergence
    from .methods import *  # noqa: F403
    from .methods import method, method_names
    from .paged_cache import PagedCompactCache
    from .pages import KVPages
    from .plan import Plan
    from .report import Report
    from .runtime import Run, attach

__all__ = [
    "CompactCache",
    "Divergence",
    "KVPages",
    "PagedCompactCache",
    "Plan",
    "Report",
    "Run",
    "__version__",
    "attach",
    "divergence",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "generate",
    "method",
    "method_names",
    "register_attention",
    "replace_flash_attn",
]

# Imported at first use: torch takes a second, transformers several, and `lightvlm --help` needs neither. What is not
# here is a method: methods/__init__.py names them.
_HOME = {
    "CompactCache": "cache",
    "Divergence": "kl",
    "KVPages": "pages",
    "PagedCompactCache": "paged_cache",
    "Plan": "plan",
    "Report": "report",
    "Run": "runtime",
    "attach": "runtime",
    "divergence": "kl",
    "flash_attn_func": "attention",
    "flash_attn_kvpacked_func": "attention",
    "flash_attn_qkvpacked_func": "attention",
    "flash_attn_varlen_func": "attention",
    "flash_attn_varlen_kvpacked_func": "attention",
    "flash_attn_varlen_qkvpacked_func": "attention",
    "flash_attn_with_kvcache": "attention",
    "generate": "decode_loop",
    "method": "methods",
    "method_names": "methods",
    "register_attention": "attention",
    "replace_flash_attn": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME and not name[0].isupper():  # modules of the package are looked for here, too
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f".{_HOME.get(name, 'methods')}", __name__)
    if name not in _HOME and name not in home.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    methods = importlib.import_module(".methods", __name__)
    return sorted({*globals(), *__all__, *methods.__all__})
