"""flash-attn's functions under flash-attn's names: change one import, and get the importance of keys beside.

>>> from lightvlm.flash_attn_interface import flash_attn_func      # was: from flash_attn import flash_attn_func
>>> out, importance = flash_attn_func(q, k, v, causal=True, importance_window=16)

``bert_padding`` stands for flash_attn.bert_padding.
"""

from __future__ import annotations

from .attention import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    index_first_axis,
    pad_input,
    unpad_input,
)
from .attention import padding as bert_padding

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "index_first_axis",
    "pad_input",
    "unpad_input",
]
