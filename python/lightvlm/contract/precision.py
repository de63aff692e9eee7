"""Precision parts: in how many bits a cache is stored."""

from __future__ import annotations

from torch import Tensor

from ..plan import Part


class PrecisionPart(Part):
    """Base of what says in how many bits a cache is stored. Subclasses are frozen dataclasses with these fields."""

    slot = "precision"
    sinks: int
    """First tokens of a row that stay in 16 bits."""
    recent: int
    """Last tokens of a row that do."""
    interval: int
    """Generated tokens that are packed at a time, a multiple of 64."""
    keep_text: bool
    """Whether the prompt's text stays in 16 bits."""
    prompt_block: int | None = None
    """Tokens of the prompt that share channel scales, a multiple of 64; None: all of a row."""

    def levels(self, layer: int, layers: int) -> tuple[int, ...]:
        """Bits of a layer's important tokens, and, where they differ, of the others; () leaves the layer as it is."""
        raise NotImplementedError

    @property
    def separates(self) -> bool:
        """Whether important tokens get other bits than the rest."""
        raise NotImplementedError

    def important(self, scores: Tensor) -> Tensor:
        """How many (R,) int32 of so many generated tokens (R, N) are important, by the attention they receive."""
        raise NotImplementedError
