"""Typed wrappers of the compiled ops. Each has a plain-torch twin in `lightvlm_ext.reference`."""

from __future__ import annotations

from .._types import Selection
from .compact_kv import compact_kv_
from .decode_attention import decode_attention
from .gather_tokens import gather_tokens
from .importance import importance
from .merge_tokens import merge_tokens
from .select import select
from .select_diverse import select_diverse

__all__ = [
    "Selection",
    "compact_kv_",
    "decode_attention",
    "gather_tokens",
    "importance",
    "merge_tokens",
    "select",
    "select_diverse",
]
