"""FlashAttention call sites: flash-attn's functions on any attention kernel, with the importance of keys beside.

A call is checked (`arguments.py`), put into one form (`call.py`) and run by the first backend that can (`choice.py`);
importance comes from the log-sum-exp that the backend returned (`probing.py`). docs/attention.md says which call lands
where.
"""

from __future__ import annotations

from .choice import BackendInfo, backends, use_backend
from .dense import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from .kvcache import flash_attn_with_kvcache
from .padding import index_first_axis, pad_input, unpad_input
from .replace import replace_flash_attn
from .transformers_hook import register_attention
from .varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "BackendInfo",
    "backends",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "pad_input",
    "register_attention",
    "replace_flash_attn",
    "unpad_input",
    "use_backend",
]
