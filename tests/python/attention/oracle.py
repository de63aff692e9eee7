"""Attention in float64 from the formula, with explicit masks; and what the same precision costs in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Shaping:
    """The options that shape logits, under flash-attn's names."""

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None

    def kwargs(self) -> dict[str, Any]:
        return dict(vars(self))


def visible(rows: int, keys: int, shaping: Shaping) -> Tensor:
    """(rows, keys) bool, one entry at a time as flash-attn's documentation defines it."""
    mask = torch.zeros(rows, keys, dtype=torch.bool)
    left, right = shaping.window_size
    for i in range(rows):
        for j in range(keys):
            at = i + keys - rows
            seen = not shaping.causal or j <= at
            seen = seen and (left < 0 or j >= at - left)
            mask[i, j] = seen and (right < 0 or j <= at + right)
    return mask


def logits_of(query: Tensor, key: Tensor, shaping: Shaping, row: int, dtype: torch.dtype) -> Tensor:
    """(Hq, Sq, Sk) in dtype, hidden ones -inf. query (Sq, Hq, D), key (Sk, Hkv, D)."""
    rows, heads, width = query.shape
    keys = key.shape[0]
    key = key.to(dtype).repeat_interleave(heads // key.shape[1], dim=1)
    scale = width**-0.5 if shaping.softmax_scale is None else shaping.softmax_scale
    logits = torch.einsum("ihd,jhd->hij", query.to(dtype), key) * scale
    if shaping.softcap > 0:
        logits = shaping.softcap * torch.tanh(logits / shaping.softcap)
    if shaping.alibi_slopes is not None:
        slopes = shaping.alibi_slopes if shaping.alibi_slopes.dim() == 1 else shaping.alibi_slopes[row]
        distance = (torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)).abs()
        logits = logits - (slopes.double()[:, None, None] * distance).to(dtype)
    return logits.masked_fill(~visible(rows, keys, shaping), -math.inf)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shaping: Shaping,
    row: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """out (Sq, Hq, D), lse (Hq, Sq) of one sequence; dtype is that of every step."""
    logits = logits_of(query, key, shaping, row, dtype)
    lse = logits.double().logsumexp(-1)
    weights = logits.softmax(-1).nan_to_num(0.0)  # a row that sees nothing gives nothing
    value = value.to(dtype).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return torch.einsum("hij,jhd->ihd", weights, value), lse


def importance(query: Tensor, key: Tensor, shaping: Shaping, rows: list[int], row: int = 0) -> Tensor:
    """(Sk,) float64: mean over the rows that see the key, then over heads."""
    logits = logits_of(query, key, shaping, row, torch.float64)
    weights = logits.softmax(-1).nan_to_num(0.0)[:, rows]
    seen = visible(query.shape[0], key.shape[0], shaping)[rows].sum(0)
    return (weights.sum(1) / seen.clamp(min=1)).mean(0)


# Where both are exact to the last bits, twice nothing is nothing: what rounding the float64 result may cost.
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check(
    found: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, shaping: Shaping, row: int = 0
) -> None:
    """found, (Sq, Hq, D) and (Hq, Sq), is at most twice as far off as plain torch in the inputs' precision is."""
    out, lse = found
    exact, exact_lse = attend(query, key, value, shaping, row)
    plain, _ = attend(query, key, value, shaping, row, dtype=query.dtype)
    assert out.dtype == query.dtype
    assert out.isfinite().all()
    largest = exact.abs().max().item() if exact.numel() else 0.0
    allowed = 2 * (plain.double() - exact).abs().max().item() if exact.numel() else 0.0
    error = (out.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= allowed + FLOOR[query.dtype] * max(1.0, largest), (error, allowed)
    # The sums are fp32, but a backend may round each weight to the inputs' precision (torch's for CPUs takes a quicker
    # exponential for 16 bit).
    assert lse.dtype == torch.float32
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    hidden = exact_lse == -math.inf
    error = (lse.double().masked_fill(hidden, 0) - exact_lse.masked_fill(hidden, 0)).abs()
    assert (error <= weight_error(query.dtype) + 1e-6 * exact_lse.masked_fill(hidden, 0).abs()).all(), (
        error.max()
    )


def weight_error(dtype: torch.dtype) -> float:
    """Relative error of a softmax weight, or of their sum: half a unit in the last place of 16 bit, a few of fp32."""
    return torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 16 * torch.finfo(dtype).eps


def check_scores(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Importances: sums of such weights. Each logit's own fp32 error, in scale * D products, is a few more."""
    torch.testing.assert_close(found.double(), wanted, atol=1e-7, rtol=2 * weight_error(dtype) + 1e-5)
