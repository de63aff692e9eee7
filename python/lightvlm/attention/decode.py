"""One query token a row: this package's own decode kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightvlm_ext._kv import PACKED_HEAD_DIMS, PAGE_SIZES
from lightvlm_ext.ops.append_attend import append_attend_checked

from .call import Call
from .native import no_ops


class Decode:
    """``lightvlm_ext.ops.append_attend_``: one query token a row over its cache, CPU and CUDA.

    A window is where the row's keys begin. Rows that name the cache's rows (batch_idx) read them as pages, without a
    copy. Not run on a GPU.
    """

    name = "decode"
    about = "lightvlm_ext.ops.append_attend_, one query token a row"
    gpu_only = False
    appends = True
    rotates = False

    def missing(self) -> str | None:
        return no_ops(torch.device("cpu"))

    def why_not(self, call: Call) -> str | None:
        if call.packed or call.query.shape[1] != 1:
            return "takes one query token a row"
        if not (call.query.is_cpu or call.query.is_cuda):
            return f"runs on a CPU and on CUDA, and query is on {call.query.device}"
        if call.softcap > 0:
            return "has no softcap"
        if call.alibi is not None:
            return "has no ALiBi"
        if call.query.shape[3] not in PACKED_HEAD_DIMS:
            return f"takes head_dim {', '.join(map(str, PACKED_HEAD_DIMS))}, not {call.query.shape[3]}"
        if call.block_table is not None and call.key.shape[1] not in PAGE_SIZES:
            return f"takes pages of a multiple of 16 up to 256 tokens, not {call.key.shape[1]}"
        if call.block_table is None and call.batch_idx is not None and _page_size(call) is None:
            return "reads rows by index as pages: the capacity must be a multiple of 16, the cache contiguous"
        return no_ops(call.query.device)

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        key, value, table = _last_contiguous(call.key), _last_contiguous(call.value), call.block_table
        if table is None and call.batch_idx is not None:
            size = _page_size(call)
            assert size is not None
            blocks = key.shape[1] // size
            table = call.batch_idx[:, None] * blocks + torch.arange(
                blocks, device=key.device, dtype=torch.int32
            )
            key, value = (x.view(-1, size, *x.shape[2:]) for x in (key, value))
        elif table is None and key.shape[0] > call.batch:
            key, value = key[: call.batch], value[: call.batch]
        new = call.new if call.new is not None and call.new.key.shape[1] > 0 else None
        lens, begins = (None if x is None else x.contiguous() for x in (call.lens, _begins(call)))
        return append_attend_checked(
            _last_contiguous(call.query),
            key,
            value,
            None if new is None else _last_contiguous(new.key),
            None if new is None else _last_contiguous(new.value),
            lens,
            begins,
            table,
            call.scale,
        )


def _begins(call: Call) -> Tensor | None:
    """Where each row's visible keys begin: leftpad, or where its window does."""
    if call.left < 0:
        return call.leftpad
    ends = call.ends()
    if ends is None:
        first = torch.full(
            (call.batch,), call.max_k - 1 - call.left, device=call.key.device, dtype=torch.int32
        )
    else:
        first = ends - (1 + call.left)
    first = first.clamp(min=0)
    return first if call.leftpad is None else torch.maximum(first, call.leftpad)


def _page_size(call: Call) -> int | None:
    """Tokens of a page, if the cache's rows can be read as pages."""
    size = math.gcd(call.key.shape[1], PAGE_SIZES[-1])
    rows = all(x.stride(0) == x.shape[1] * x.stride(1) and x.stride(3) == 1 for x in (call.key, call.value))
    return size if size in PAGE_SIZES and rows else None


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
