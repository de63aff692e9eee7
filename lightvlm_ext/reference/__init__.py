"""Plain-torch twins of `lightvlm_ext.ops`: same names, signatures and errors, and float64 too.

Written to be read and to be right, not to be fast. They need no compiled library.
"""

from __future__ import annotations

from .._types import Selection
from .compact_kv import compact_kv_
from .gather_tokens import gather_tokens
from .importance import importance
from .merge_tokens import merge_tokens
from .select import select
from .select_diverse import select_diverse

__all__ = [
    "Selection",
    "compact_kv_",
    "gather_tokens",
    "importance",
    "merge_tokens",
    "select",
    "select_diverse",
]
