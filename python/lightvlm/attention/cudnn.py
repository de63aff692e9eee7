"""cuDNN's attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gpu
from .call import Call


class Cudnn:
    """``aten::_scaled_dot_product_cudnn_attention``: whole sequences, full or square causal.

    Its triangle starts at the top left, which is the same corner only where queries and keys are as many. It comes
    after torch's FlashAttention, which takes nearly every call; use_backend("cudnn") puts it first. Not run on a GPU.
    """

    name = "cudnn"
    about = "cuDNN, aten::_scaled_dot_product_cudnn_attention"
    gpu_only = True
    appends = False
    rotates = False

    def missing(self) -> str | None:
        reason = gpu.no_gpu()
        if reason is None and not torch.backends.cudnn.is_available():
            return "torch has no cuDNN"
        return reason

    def why_not(self, call: Call) -> str | None:
        reason = gpu.not_for(call, (8, 0), widest=128)
        if reason is not None:
            return reason
        if not torch.backends.cudnn.is_available():
            return "torch has no cuDNN"
        if not call.dense:
            return "takes whole sequences of one length"
        if call.windowed or call.softcap > 0 or call.alibi is not None:
            return "has no window, softcap or ALiBi"
        if call.query.shape[-1] % 8:
            return "takes head_dim of a multiple of 8"
        if min(call.query.shape[1], call.key.shape[1]) < 2:
            return "takes at least two queries and keys"
        if call.causal and call.query.shape[1] != call.key.shape[1]:
            return "takes causal calls with as many queries as keys"
        return None

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        query, key, value = (
            (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
            for x in (call.query, call.key, call.value)
        )
        found = _op()(query, key, value, None, True, 0.0, call.causal, False, scale=call.scale)
        lse = found[1].reshape(
            call.batch, call.query.shape[2], call.max_q
        )  # (B, H, Sq, 1), natural logarithm
        return found[0].transpose(1, 2), lse.float()


def _op() -> Any:
    return torch.ops.aten._scaled_dot_product_cudnn_attention.default
