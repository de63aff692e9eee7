"""What a call returns, in flash-attn's layouts: the one place where backends' conventions are made ours."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call


def empty_result(call: Call) -> tuple[Tensor, Tensor]:
    """out 0 and lse -inf, what rows get that see no key. out as query; lse (B, Hq, Sq), packed (Hq, total_q), fp32."""
    shape = call.query.shape
    of_rows = (shape[1], shape[0]) if call.packed else (shape[0], shape[2], shape[1])
    lse = torch.full(of_rows, float("-inf"), dtype=torch.float32, device=call.query.device)
    return torch.zeros(shape, dtype=call.query.dtype, device=call.query.device), lse


def nothing_to_do(call: Call) -> bool:
    """Whether there is no query or no key at all, which most kernels refuse."""
    return call.query.numel() == 0 or call.key.numel() == 0 or call.max_k == 0


def from_flash_attn(out: Tensor, lse: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """A result of flash-attn, or of a copy of it, in our conventions.

    For a row that sees no key, version 2 gives the log-sum-exp +inf; the logarithm of an empty sum is -inf. And in
    plain causal calls it adds alibi_slope * j to logits instead of subtracting alibi_slope * |p - j|: the weights are
    the same, the log-sum-exp is too large by alibi_slope * p.
    """
    if not call.wants_lse:  # spares the launches
        return out, lse
    if call.alibi is not None and call.causal:
        lse = lse - _slope_times_position(call.alibi, call)
    return out, torch.where(lse == float("inf"), -float("inf"), lse)


def _slope_times_position(alibi: Tensor, call: Call) -> Tensor:
    """alibi_slope * p of each row, p counted from its sequence's first key; as lse."""
    if call.cu_q is not None and call.cu_k is not None:
        tokens = torch.arange(call.query.shape[0], device=alibi.device, dtype=torch.int32)
        row = torch.searchsorted(call.cu_q[1:], tokens, right=True).clamp(max=call.batch - 1)
        position = tokens - call.cu_q[row] + call.cu_k.diff()[row] - call.cu_q.diff()[row]
        return (alibi[:, None] if alibi.dim() == 1 else alibi[row].T) * position
    rows = call.query.shape[1]
    lens = call.ends()
    end: int | Tensor = call.max_k if lens is None else lens[:, None, None]
    if call.leftpad is not None:
        end = end - call.leftpad[:, None, None]
    position = torch.arange(rows, device=alibi.device) + (end - rows)
    return alibi.view(-1, alibi.shape[-1], 1) * position
