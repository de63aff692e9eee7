"""The functions take what flash-attn 2.8.3's take, in the same order and with the same defaults."""

from __future__ import annotations

import inspect
from typing import Any

import lightvlm
import pytest
from lightvlm import flash_attn_interface

REQUIRED = inspect.Parameter.empty
SHAPING = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False,
}  # fmt: skip


def required(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, REQUIRED)


SIGNATURES: dict[str, dict[str, Any]] = {
    "flash_attn_func": required("q", "k", "v") | SHAPING,
    "flash_attn_kvpacked_func": required("q", "kv") | SHAPING,
    "flash_attn_qkvpacked_func": required("qkv") | SHAPING,
    "flash_attn_varlen_func": required(
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    )
    | SHAPING
    | {"block_table": None},
    "flash_attn_varlen_kvpacked_func": required(
        "q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    )
    | SHAPING,
    "flash_attn_varlen_qkvpacked_func": required("qkv", "cu_seqlens", "max_seqlen") | SHAPING,
    "flash_attn_with_kvcache": required("q", "k_cache", "v_cache")
    | {
        "k": None, "v": None, "rotary_cos": None, "rotary_sin": None, "cache_seqlens": None,
        "cache_batch_idx": None, "cache_leftpad": None, "block_table": None, "softmax_scale": None,
        "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True,
        "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    function = getattr(flash_attn_interface, name)
    found = inspect.signature(function).parameters
    ours = {key: p for key, p in found.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    assert list(ours) == list(SIGNATURES[name])
    assert {key: p.default for key, p in ours.items()} == SIGNATURES[name]
    assert set(found) - set(ours) == {"importance_window"}
    assert found["importance_window"].default is None
    assert getattr(lightvlm, name) is function
    assert name in lightvlm.__all__
