"""Logits of a few query rows against a stretch of keys, with everything that shapes them."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call


def row_logits(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    columns: Tensor,
    begin: int | Tensor,
    end: int | Tensor,
    slopes: Tensor | None,
    call: Call,
) -> Tensor:
    """(Hq, T, K) fp32 logits of T rows of one sequence; -inf where a row does not see a key.

    query: (T, Hq, D).   key: (Hkv, K, D) fp32.   positions: (T,), where the rows stand.   columns: (K,), where the keys
    do.   begin, end: of the sequence's keys.   slopes: (Hq,) of ALiBi, or None.
    """
    rows, heads, width = query.shape
    grouped = query.float().view(rows, key.shape[0], -1, width).permute(1, 2, 0, 3)
    logits = torch.matmul(grouped.flatten(1, 2), key.transpose(1, 2)).mul_(call.scale)
    logits = logits.view(heads, rows, columns.shape[0])
    if call.softcap > 0:
        logits = logits.div_(call.softcap).tanh_().mul_(call.softcap)
    distance = columns - positions[:, None]
    if slopes is not None:
        logits.addcmul_(slopes[:, None, None], distance.abs().float(), value=-1)
    hidden = (columns < begin) | (columns >= end)
    if call.left >= 0:
        hidden = hidden | (distance < -call.left)
    if call.right >= 0:
        hidden = hidden | (distance > call.right)
    return logits.masked_fill_(hidden, float("-inf"))
