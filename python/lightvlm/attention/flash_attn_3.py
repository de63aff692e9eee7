"""The flash_attn_interface package, FlashAttention 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gpu
from .call import Call
from .result import from_flash_attn


class FlashAttn3:
    """``flash_attn_interface`` on Hopper: windows and softcap, packed sequences, caches and pages of any size.

    New keys are written by this package, not by FlashAttention 3, whose rules for rotary embeddings have options of
    their own. Not run on a GPU.
    """

    name = "flash_attn_3"
    about = "the flash_attn_interface package (FlashAttention 3)"
    gpu_only = True
    appends = False
    rotates = False

    def missing(self) -> str | None:
        return _unusable() or gpu.no_gpu()

    def why_not(self, call: Call) -> str | None:
        reason = gpu.not_for(call, (9, 0), (9, 9)) or _unusable()
        if reason is not None:
            return reason
        if call.alibi is not None:
            return "has no ALiBi"
        if call.query.shape[-1] % 8:
            return "takes head_dim of a multiple of 8"
        return None

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        module: Any = gpu.package("flash_attn_interface")
        options: dict[str, Any] = {
            "softmax_scale": call.scale,
            "causal": call.causal,
            "window_size": (call.left, call.right) if call.windowed else (-1, -1),
            "softcap": call.softcap,
        }
        if call.dense:
            found = _with_lse(module.flash_attn_func, call.query, call.key, call.value, **options)
        elif call.packed and call.block_table is None:
            lengths = (call.cu_q, call.cu_k, call.max_q, call.max_k)
            args = (call.query, call.key, call.value, *lengths)
            found = _with_lse(module.flash_attn_varlen_func, *args, **options)
        else:
            packed = {"cu_seqlens_q": call.cu_q, "max_seqlen_q": call.max_q} if call.packed else {}
            found = module.flash_attn_with_kvcache(
                call.query,
                call.key,
                call.value,
                cache_seqlens=_lens(call),
                cache_batch_idx=call.batch_idx,
                cache_leftpad=call.leftpad,
                page_table=call.block_table,
                num_splits=call.splits,
                return_softmax_lse=True,
                **packed,
                **options,
            )
        return from_flash_attn(found[0], found[1], call)


def _unusable() -> str | None:
    found = gpu.package("flash_attn_interface")
    return found if isinstance(found, str) else None


def _with_lse(function: Any, *args: Any, **options: Any) -> Any:
    """Early versions always return the log-sum-exp and have no flag for it."""
    if gpu.takes(function, "return_attn_probs"):
        options["return_attn_probs"] = True
    return function(*args, **options)


def _lens(call: Call) -> Tensor:
    if call.cu_k is not None:
        return call.cu_k.diff()
    if call.lens is not None:
        return call.lens
    return torch.full((call.batch,), call.max_k, dtype=torch.int32, device=call.query.device)
