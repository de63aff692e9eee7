"""FlexAttention: whatever shapes the logits, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import gpu
from .call import Call


class Flex:
    """``torch.nn.attention.flex_attention``, compiled, for what only it can: softcap without flash_attn, say.

    Window, softcap and ALiBi are one function of a logit. There is no block mask, which would cost a launch and a table
    for each shape, so tiles that a window hides are computed all the same. Not run on a GPU.
    """

    name = "flex"
    about = "torch.nn.attention.flex_attention, compiled"
    gpu_only = True
    appends = False
    rotates = False

    def missing(self) -> str | None:
        return gpu.no_gpu()

    def why_not(self, call: Call) -> str | None:
        reason = gpu.not_for(call, (8, 0))
        if reason is not None:
            return reason
        if not call.dense:
            return "takes whole sequences of one length"
        if call.query.shape[-1] not in (16, 32, 64, 128, 256):
            return f"takes head_dim of a power of 2 from 16, not {call.query.shape[-1]}"
        return None

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.flex_attention import AuxRequest

        query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        out, aux = _compiled()(
            query,
            key,
            value,
            score_mod=score_mod(call),
            scale=call.scale,
            enable_gqa=call.group > 1,
            return_aux=AuxRequest(lse=True),
        )
        return out.transpose(1, 2), aux.lse


def score_mod(call: Call) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's function of (logit, batch row, head, query, key); see :class:`.call.Call`."""
    offset = call.key.shape[1] - call.query.shape[1]
    left, right, cap, alibi = call.left, call.right, call.softcap, call.alibi
    each_row = alibi is not None and alibi.dim() == 2

    def shaped(score: Tensor, row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = j - (i + offset)
        if cap > 0:
            score = cap * torch.tanh(score / cap)
        if alibi is not None:
            score = score - (alibi[row, head] if each_row else alibi[head]) * distance.abs()
        if left >= 0:
            score = torch.where(distance >= -left, score, -float("inf"))
        if right >= 0:
            score = torch.where(distance <= right, score, -float("inf"))
        return score

    return shaped


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
