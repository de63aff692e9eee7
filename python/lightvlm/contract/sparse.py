"""Prefill parts under which all tokens go through all layers, and only some attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..plan import Part

if TYPE_CHECKING:
    from lightvlm_ext.ops import Selection


@dataclass(frozen=True)
class AttentionScores:
    """What a method sees of a layer's attention at prefill. B rows of S tokens, padding on the left.

    Attributes:
        mass (B, S) fp32: attention that each token received from the probe rows: summed over them, mean over heads.
        visible (B, S) int32: how many probe rows can see the token.
        valid (B, S) bool: tokens that are not padding.
        forced (B, S) bool: tokens that attend in any case.
    """

    mass: Tensor
    visible: Tensor
    valid: Tensor
    forced: Tensor


class AttentionPart(Part):
    """Base of methods under which only some tokens attend, chosen in every layer anew; all tokens go through all
    layers. Subclasses are frozen dataclasses with at least these fields."""

    slot = "prefill"
    min_tokens: int
    """Step aside where the longest row of a prompt is shorter."""
    unimportant: str
    """What becomes of the others' keys and values after the prompt: "keep" or "drop"."""
    full_layers: int
    """First layers, in which all tokens attend."""

    def probe_rows(self, tokens: int) -> list[int]:
        """The query rows that score, ascending, in a prompt of so many tokens."""
        raise NotImplementedError

    def choose(self, scores: AttentionScores) -> Selection:
        """The tokens that attend, per row; their number may be known to the device alone."""
        raise NotImplementedError
