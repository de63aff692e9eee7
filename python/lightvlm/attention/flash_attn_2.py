"""The flash_attn package, version 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gpu
from .call import Call
from .result import from_flash_attn


class FlashAttn2:
    """``flash_attn`` from 2.6 on: every mask and bias, packed sequences, caches that it appends to itself.

    Written against the signatures of 2.8.3. Not run on a GPU.
    """

    name = "flash_attn_2"
    about = "the flash_attn package"
    gpu_only = True
    appends = True
    rotates = True

    def missing(self) -> str | None:
        return _unusable() or gpu.no_gpu()

    def why_not(self, call: Call) -> str | None:
        reason = gpu.not_for(call, (8, 0)) or _unusable()
        if reason is not None:
            return reason
        cached = not call.packed and not call.dense
        if cached and call.query.shape[-1] % 8:
            return "takes head_dim of a multiple of 8 with a cache"
        if call.block_table is not None:
            if call.key.shape[1] % 256:
                return f"takes pages of a multiple of 256 tokens, not {call.key.shape[1]}"
            if call.leftpad is not None:
                return "takes no leftpad with pages"
        return None

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        module: Any = gpu.package("flash_attn")
        options: dict[str, Any] = {
            "softmax_scale": call.scale,
            "causal": call.causal,
            "window_size": (call.left, call.right) if call.windowed else (-1, -1),
            "softcap": call.softcap,
            "alibi_slopes": call.alibi,
        }
        if call.packed:
            lengths = (call.cu_q, call.cu_k, call.max_q, call.max_k)
            found = module.flash_attn_varlen_func(
                call.query,
                call.key,
                call.value,
                *lengths,
                **options,
                block_table=call.block_table,
                return_attn_probs=True,
            )
        elif call.dense:
            found = module.flash_attn_func(
                call.query, call.key, call.value, **options, return_attn_probs=True
            )
        else:
            found = module.flash_attn_with_kvcache(
                call.query,
                call.key,
                call.value,
                **_new_tokens(call),
                cache_batch_idx=call.batch_idx,
                cache_leftpad=call.leftpad,
                block_table=call.block_table,
                num_splits=call.splits,
                return_softmax_lse=True,
                **options,
            )
        return from_flash_attn(found[0], found[1], call)


def _new_tokens(call: Call) -> dict[str, Any]:
    """The lengths, and what is to be appended."""
    lens = call.lens
    if lens is None:
        lens = torch.full((call.batch,), call.max_k, dtype=torch.int32, device=call.query.device)
    if call.new is None:
        return {"cache_seqlens": lens}
    return {
        "k": call.new.key,
        "v": call.new.value,
        "rotary_cos": call.new.cos,
        "rotary_sin": call.new.sin,
        "rotary_interleaved": call.new.interleaved,
        "cache_seqlens": lens,
    }


def _unusable() -> str | None:
    found = gpu.package("flash_attn")
    if isinstance(found, str):
        return found
    return None if gpu.takes(found.flash_attn_func, "softcap") else "is older than 2.6"
