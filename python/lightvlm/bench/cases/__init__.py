"""The cases of ``lightvlm bench ops``: inputs of real sizes, and the other ways to each op's result. One file an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import (
    append_attend,
    compact_kv,
    compact_paged_kv,
    decode_attention,
    gather_tokens,
    importance,
    merge_pairs,
    merge_tokens,
    quantize_kv,
    select,
    select_diverse,
)
from ._case import MODELS, Case, Geometry, Sizes

__all__ = ["CASES", "MODELS", "Case", "Geometry", "Sizes"]

CASES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "append_attend_": append_attend.cases,
    "compact_kv_": compact_kv.cases,
    "compact_paged_kv_": compact_paged_kv.cases,
    "decode_attention": decode_attention.cases,
    "dequantize_kv": quantize_kv.dequantize_cases,
    "gather_tokens": gather_tokens.cases,
    "importance": importance.cases,
    "merge_pairs": merge_pairs.cases,
    "merge_tokens": merge_tokens.cases,
    "quantize_kv": quantize_kv.quantize_cases,
    "select": select.cases,
    "select_diverse": select_diverse.cases,
}
