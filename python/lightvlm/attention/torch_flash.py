"""torch's own copy of FlashAttention 2."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import gpu
from .call import Call
from .result import from_flash_attn
from .spans import capacity_of


class TorchFlash:
    """``aten::_flash_attention_forward``, in every CUDA build of torch: windows, ALiBi, packed sequences.

    A cache is read as packed keys: row b's begin at b * capacity + leftpad[b], and seqused_k says how many there are.
    Its causal corner is at the bottom right (torch.nn.attention.bias relies on that, too). Not run on a GPU.
    """

    name = "torch_flash"
    about = "torch's FlashAttention 2, aten::_flash_attention_forward"
    gpu_only = True
    appends = False
    rotates = False

    def missing(self) -> str | None:
        return gpu.no_gpu()

    def why_not(self, call: Call) -> str | None:
        reason = gpu.not_for(call, (8, 0))
        if reason is not None:
            return reason
        if call.softcap > 0:
            return "has no softcap"
        if call.query.shape[-1] % 8:
            return "takes head_dim of a multiple of 8"
        wanted = [name for name, value in _extras(call).items() if value is not None]
        lacking = [name for name in wanted if name not in _arguments()]
        if lacking:
            return f"has no {lacking[0]} in torch {torch.__version__}"
        if call.block_table is not None:
            if call.key.shape[1] % 256:
                return f"takes pages of a multiple of 256 tokens, not {call.key.shape[1]}"
            return "takes no leftpad with pages" if call.leftpad is not None else None
        if call.batch_idx is not None:
            return "reads no rows of a cache by index"
        if not call.dense and not call.packed:
            apart = any(x.stride(0) != x.shape[1] * x.stride(1) for x in (call.key, call.value))
            return "takes a cache whose rows lie one after the other" if apart else None
        return None

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        query, key, value = call.query, call.key, call.value
        cu_q, cu_k = call.cu_q, call.cu_k
        cached = not call.dense and not call.packed
        if cached:
            rows = torch.arange(call.batch + 1, device=query.device, dtype=torch.int32)
            cu_q, cu_k = rows * call.max_q, rows * capacity_of(call)
            if call.leftpad is not None:
                cu_k[:-1] += call.leftpad
            query = query.flatten(0, 1)
            if call.block_table is None:
                key, value = (x[: call.batch].flatten(0, 1) for x in (key, value))
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        extras = {name: x for name, x in _extras(call).items() if x is not None}
        lengths = (cu_q, cu_k, call.max_q, call.max_k)
        found = _op()(query, key, value, *lengths, 0.0, call.causal, False, scale=call.scale, **extras)
        out, lse = found[0], found[1]
        if cached:
            out = out.view(call.query.shape)
            lse = lse.view(-1, call.batch, call.max_q).transpose(0, 1)
        return from_flash_attn(out, lse, call)


def _extras(call: Call) -> dict[str, Any]:
    """Arguments that some calls need and some versions of torch lack; None where not needed."""
    windowed = call.windowed
    return {
        "window_size_left": call.left if windowed else None,
        "window_size_right": call.right if windowed else None,
        "alibi_slopes": call.alibi,
        "seqused_k": _used(call),
        "block_table": call.block_table,
    }


def _used(call: Call) -> Tensor | None:
    """Keys of each row, where they are not what lies between its cumulative lengths."""
    if call.packed:
        return call.cu_k.diff() if call.block_table is not None and call.cu_k is not None else None
    if call.dense:
        return None
    lens = call.lens
    if lens is None:
        lens = torch.full((call.batch,), call.max_k, dtype=torch.int32, device=call.query.device)
    return lens if call.leftpad is None else lens - call.leftpad


def _op() -> Any:
    return torch.ops.aten._flash_attention_forward.default


@functools.cache
def _arguments() -> frozenset[str]:
    return frozenset(
        argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments
    )
