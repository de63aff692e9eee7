"""Attention in plain torch, tile by tile: what no faster backend can do."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .logits import row_logits
from .result import empty_result
from .spans import Span, spans

_TILE_NUMBERS = 1 << 21
"""Logits of a tile, 8 MiB of them. By sequence, never by batch, so that a batch is the same as one by one."""


class Tiled:
    """Every mask and bias, on every device, in fp32; a tile of query rows times the keys that it can see at a time."""

    name = "tiled"
    about = "plain torch, fp32 accumulation, tiles of query rows"
    gpu_only = False
    appends = False
    rotates = False

    def missing(self) -> str | None:
        return None

    def why_not(self, call: Call) -> str | None:
        if call.packed and call.query.device.type != "cpu":
            return "packed sequences on a device: their lengths would have to be fetched, which waits for it"
        return None

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = empty_result(call)
        for span in spans(call):
            found, of_rows = attend_span(call, span)
            if call.packed:
                out[span.q_begin : span.q_end] = found
                lse[:, span.q_begin : span.q_end] = of_rows
            else:
                out[span.row], lse[span.row] = found, of_rows
        return out, lse


def attend_span(call: Call, span: Span) -> tuple[Tensor, Tensor]:
    """out (Sq, Hq, D), lse (Hq, Sq) fp32 of one sequence."""
    query, (key, value) = span.query(call), span.keys(call)
    length, heads, _ = query.shape
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_full((heads, length), float("-inf"), dtype=torch.float32)
    columns = torch.arange(key.shape[0], device=query.device)
    if not isinstance(span.end, int):  # a weight of 0 does not silence what may lie outside the sequence
        outside = (columns < span.begin) | (columns >= span.end)
        value = value.masked_fill(outside[:, None, None], 0.0)
    keys, values = (x.float().transpose(0, 1) for x in (key, value))
    rows = torch.arange(length, device=query.device)
    tile = max(1, min(256, _TILE_NUMBERS // max(1, heads * key.shape[0])))
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        low, high = _visible(call, span, start, stop, length, key.shape[0])
        if low >= high:
            continue
        logits = row_logits(
            query[start:stop],
            keys[:, low:high],
            rows[start:stop] + (span.end - length),
            columns[low:high],
            span.begin,
            span.end,
            call.slopes(span.row),
            call,
        )
        total = logits.logsumexp(dim=-1, keepdim=True)
        # A row that sees nothing has -inf for its sum, and -inf - -inf is no number.
        weights = logits.sub_(total.masked_fill(total == float("-inf"), 0.0)).exp_()
        grouped = weights.unflatten(0, (keys.shape[0], -1)).flatten(1, 2)
        found = torch.matmul(grouped, values[:, low:high]).view(heads, stop - start, -1)
        out[start:stop] = found.transpose(0, 1)
        lse[:, start:stop] = total[..., 0]
    return out, lse


def _visible(call: Call, span: Span, start: int, stop: int, length: int, keys: int) -> tuple[int, int]:
    """The keys that rows [start, stop) can see at most; all of them where only the device knows."""
    if not isinstance(span.begin, int) or not isinstance(span.end, int):
        return 0, keys
    low, high = span.begin, span.end
    if call.left >= 0:
        low = max(low, start + span.end - length - call.left)
    if call.right >= 0:
        high = min(high, stop - 1 + span.end - length + call.right + 1)
    return low, high
