"""Native token-reduction and KV-cache ops: CPU and CUDA in one library, loaded at the first call.

`ops` holds the typed wrappers, `reference` a plain-torch twin of each. Importing this package costs
next to nothing and always works; what is missing is said by `build_info()` and by the first op.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import ops, reference
    from ._errors import device_errors
    from ._host import OutOfPages, PagePool, keep_counts
    from ._library import build_info, is_available
    from ._observe import OpCall, observe

__all__ = [
    "OpCall",
    "OutOfPages",
    "PagePool",
    "__version__",
    "build_info",
    "device_errors",
    "is_available",
    "keep_counts",
    "observe",
    "ops",
    "reference",
]

_SUBMODULES = ("ops", "reference")
_HOME = {
    "OpCall": "_observe",
    "OutOfPages": "_host",
    "PagePool": "_host",
    "build_info": "_library",
    "device_errors": "_errors",
    "is_available": "_library",
    "keep_counts": "_host",
    "observe": "_observe",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
