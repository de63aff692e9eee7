"""The flash_attn.cute package, FlashAttention 4."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import gpu
from .call import Call
from .result import from_flash_attn

_WIDTHS = (64, 96, 128)


class FlashAttn4:
    """``flash_attn.cute`` on Hopper and Blackwell: whole and packed sequences, windows, softcap.

    It is a pre-release: what it says of itself is taken, caches are left to others. Not run on a GPU.
    """

    name = "flash_attn_4"
    about = "the flash_attn.cute package (FlashAttention 4)"
    gpu_only = True
    appends = False
    rotates = False

    def missing(self) -> str | None:
        return _unusable() or gpu.no_gpu()

    def why_not(self, call: Call) -> str | None:
        reason = gpu.not_for(call, (9, 0), (11, 9), _WIDTHS[-1]) or _unusable()
        if reason is not None:
            return reason
        if call.query.shape[-1] not in _WIDTHS:
            return f"takes head_dim {', '.join(map(str, _WIDTHS))}, not {call.query.shape[-1]}"
        if call.alibi is not None:
            return "has no ALiBi"
        if not call.dense and (not call.packed or call.block_table is not None):
            return "takes no cache"
        return None

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        module: Any = gpu.package("flash_attn.cute", "flash_attn")
        window = tuple(None if side < 0 else side for side in (call.left, call.right))
        options: dict[str, Any] = {
            "softmax_scale": call.scale,
            "causal": call.causal,
            "window_size": window if call.windowed else (None, None),
            "softcap": call.softcap,
            "return_lse": True,
        }
        function = module.flash_attn_func
        if call.packed:
            function = module.flash_attn_varlen_func
            options |= {
                "cu_seqlens_q": call.cu_q,
                "cu_seqlens_k": call.cu_k,
                "max_seqlen_q": call.max_q,
                "max_seqlen_k": call.max_k,
            }
        found = function(call.query, call.key, call.value, **options)
        return from_flash_attn(found[0], found[1], call)


def _unusable() -> str | None:
    found = gpu.package("flash_attn.cute", "flash_attn")
    if isinstance(found, str):
        return found
    known = gpu.takes(found.flash_attn_func, "return_lse")
    return None if known else "is too old: it does not return the log-sum-exp"
