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


def without_plus_infinity(lse: Tensor) -> Tensor:
    """flash-attn 2 and torch's copy of it give +inf for a row that sees no key; its sum is 0, its logarithm -inf."""
    return torch.where(lse == float("inf"), float("-inf"), lse)
