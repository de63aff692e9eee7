"""Plain-torch twins of `lightvlm_ext.ops`: same names, signatures and errors, and float64 too.

Written to be read and to be right, not to be fast. They need no compiled library.
"""

from __future__ import annotations

from .._types import MergedPairs, Selection
from .append_attend import append_attend_
from .compact_kv import compact_kv_
from .compact_paged_kv import compact_paged_kv_
from .decode_attention import decode_attention
from .dequantize_kv import dequantize_kv
from .gather_tokens import gather_tokens
from .importance import importance
from .merge_pairs import merge_pairs
from .merge_tokens import merge_tokens
from .quantize_kv import quantize_kv, quantize_kv_
from .select import select
from .select_diverse import select_diverse

__all__ = [
    "MergedPairs",
    "Selection",
    "append_attend_",
    "compact_kv_",
    "compact_paged_kv_",
    "decode_attention",
    "dequantize_kv",
    "gather_tokens",
    "importance",
    "merge_pairs",
    "merge_tokens",
    "quantize_kv",
    "quantize_kv_",
    "select",
    "select_diverse",
]
