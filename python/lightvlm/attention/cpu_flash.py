"""torch's FlashAttention for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .result import empty_result
from .spans import Span, spans


class CpuFlash:
    """``aten::_scaled_dot_product_flash_attention_for_cpu``, which returns the log-sum-exp.

    The op refuses nothing that it cannot do: without keys or queries it divides by zero (the process dies), a strided
    last dimension gives wrong numbers, and its causal triangle starts at the top left. So calls are cut here into full
    and square causal ones: where there are more keys than queries, the keys before the square are one full call, and
    the two parts are merged by their log-sum-exp.
    """

    name = "cpu_flash"
    about = "torch's FlashAttention for CPUs, aten::_scaled_dot_product_flash_attention_for_cpu"
    gpu_only = False
    appends = False
    rotates = False

    def missing(self) -> str | None:
        return None

    def why_not(self, call: Call) -> str | None:
        if call.query.device.type != "cpu":
            return f"runs on a CPU, and query is on {call.query.device}"
        if call.windowed:
            return "has no sliding window"
        if call.softcap > 0:
            return "has no softcap"
        if call.alibi is not None:
            return "has no ALiBi"
        return None

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        if call.dense:
            return _attend(call.query, call.key, call.value, call)
        found = spans(call)
        together = _as_one(call, found)
        if together is not None:
            keys = slice(together.begin, together.end)
            return _attend(call.query, call.key[:, keys], call.value[:, keys], call)
        out, lse = empty_result(call)
        for span in found:
            query, (key, value) = span.query(call), span.keys(call)
            one, of_rows = _attend(query[None], key[None, span.begin :], value[None, span.begin :], call)
            if call.packed:
                out[span.q_begin : span.q_end] = one[0]
                lse[:, span.q_begin : span.q_end] = of_rows[0]
            else:
                out[span.row], lse[span.row] = one[0], of_rows[0]
        return out, lse


def _as_one(call: Call, found: list[Span]) -> Span | None:
    """The one span that all batch rows have, if they do."""
    if call.packed or call.batch_idx is not None or call.block_table is not None:
        return None
    same = all(span[3:] == found[0][3:] for span in found) and call.key.shape[0] == call.batch
    return found[0] if same else None


def _attend(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(B, Sq, Hq, D) and (B, Hq, Sq); bottom-right causal where call is causal."""
    batch, rows, heads, _ = query.shape
    keys = key.shape[1]
    if rows == 0 or keys == 0:
        return torch.zeros_like(query), query.new_full((batch, heads, rows), -torch.inf, dtype=torch.float32)
    if not call.causal:
        return _op(query, key, value, False, call.scale)
    if rows == keys:
        return _op(query, key, value, True, call.scale)
    if rows > keys:  # the first rows stand before every key
        first = rows - keys
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        lse = query.new_full((batch, heads, rows), -torch.inf, dtype=torch.float32)
        out[:, first:], lse[:, :, first:] = _op(query[:, first:], key, value, True, call.scale)
        return out, lse
    before = keys - rows
    past = _op(query, key[:, :before], value[:, :before], False, call.scale)
    square = _op(query, key[:, before:], value[:, before:], True, call.scale)
    return _merge(*past, *square)


def _op(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    batch, rows, heads, width = query.shape
    key_heads = key.shape[2]
    key, value = (_last_contiguous(x).transpose(1, 2) for x in (key, value))
    query = _last_contiguous(query)
    if rows == 1 and heads != key_heads:
        # One query a head would read its keys once for every head of the group; as rows of one head they share them.
        query = query.reshape(batch, key_heads, heads // key_heads, width)
        causal = False
    else:
        query = query.transpose(1, 2)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, scale=scale
    )
    if rows == 1:
        return out.reshape(batch, 1, heads, width), lse.reshape(batch, heads, 1)
    return out.transpose(1, 2), lse


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _merge(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both."""
    lse = torch.logaddexp(first_lse, second_lse)
    shares = [(one - lse).exp_().transpose(1, 2).unsqueeze(-1) for one in (first_lse, second_lse)]
    out = torch.addcmul(first * shares[0], second.float(), shares[1])
    return out.to(second.dtype), lse
