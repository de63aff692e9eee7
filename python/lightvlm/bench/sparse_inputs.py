"""Queries and keys whose attention needs a known share of the tokens, and a plan that takes a share as given.

ZipVL takes the fewest tokens that hold tau of the probed attention. Here every query points along one direction u, and
token j's key is s * a_j along it, with a_j normal: logits are s * a_j, the weights are log-normal, and the share that
holds tau grows as s falls. s is found by halving, with the method's own choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext.ops import Selection

from ..contract.sparse import AttentionScores
from ..layout import BatchLayout, read_layout
from ..methods.zipvl import ZipVLPrefill
from ..sparse_attention import SparsePrefill
from .cases._case import Geometry

_HALVINGS = 10
_NOISE = 0.3  # of every channel, beside the direction
_WIDEST = 6.0  # s: there a hundredth of the tokens holds nearly all


@dataclass(frozen=True)
class Inputs:
    """Of one layer's attention: query (B, Hq, S, D), key and value (B, Hkv, S, D), and who chooses."""

    query: Tensor
    key: Tensor
    value: Tensor
    sparse: SparsePrefill

    def attend(self) -> Tensor:
        """Probes, choice, gathers and attention: (B, S, Hq, D)."""
        return self.sparse.attend(0, self.query, self.key, self.value, None)

    def chosen(self) -> Selection:
        """The tokens of the last :meth:`attend`."""
        return self.sparse.selections[0]

    def choose(self) -> Selection:
        """Probes and choice alone."""
        return self.sparse.choose(0, self.query.transpose(1, 2), self.key.transpose(1, 2), None)


def inputs_with(
    share: float,
    tau: float,
    batch: int,
    tokens: int,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
) -> Inputs:
    """Inputs of which about ``share`` of the tokens attend under ``tau``."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device)

    width = geometry.head_dim
    along = torch.zeros(width, device=device)
    along[0] = width**0.25  # scores are divided by the root of the width
    query = along + _NOISE * normal(batch, geometry.heads, tokens, width)
    noise = _NOISE * normal(batch, geometry.kv_heads, tokens, width)
    value = normal(batch, geometry.kv_heads, tokens, width).to(dtype)
    weight = normal(batch, 1, tokens, 1)
    sparse = SparsePrefill(ZipVLPrefill(tau=tau, min_tokens=1), whole(batch, tokens), device)

    def with_spread(spread: float) -> Inputs:
        return Inputs(query.to(dtype), (noise + spread * weight * along).to(dtype), value, sparse)

    low, high = 0.0, _WIDEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = with_spread(middle)
        if share_of(found.choose()) > share:
            low = middle
        else:
            high = middle
    return with_spread((low + high) / 2)


def share_of(selection: Selection) -> float:
    """Of the tokens, those that are selected, mean over rows; reads the device."""
    return float(selection.count.double().mean()) / selection.inverse.shape[1]


def whole(batch: int, tokens: int) -> BatchLayout:
    """A batch of text without padding."""
    every = torch.ones(batch, tokens, dtype=torch.bool)
    return read_layout(~every, every, None)


@dataclass(frozen=True)
class GivenShare(ZipVLPrefill):
    """ZipVL with the share of attending tokens given, for models whose weights are random; it costs what ZipVL does."""

    share: float = 0.4

    def choose(self, scores: AttentionScores) -> Selection:
        ops.select(scores.mass, mass=self.tau, candidates=scores.valid)
        count = (scores.valid.sum(dim=1) * self.share).to(torch.int32)
        each = scores.mass / scores.visible.clamp_min(1)
        return ops.select(
            each, keep=count, candidates=scores.valid, forced=scores.forced, capacity=scores.mass.shape[1]
        )
