"""A cache in few bits: 4 for what matters and 2 for the rest, as ZipVL stores it, or the same for all.

Source: He et al., "ZipVL", arXiv 2410.08584 v1: tokens that attended at prefill are stored in 4 bits and the others in
2; generated tokens stay in 16 bits until a hundred have come together, and are then told apart by the last query's
attention. The quantiser is ``lightvlm_ext.ops.quantize_kv``'s. Our reading: generated tokens are packed by 128, and the
count of important ones is rounded up to a multiple of 64, so that blocks of channel scales stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightvlm_ext import ops

from ..plan import check_options, option, register_part
from .base import PrecisionPart

_BITS = (16, 8, 4, 2)


@register_part("precision", "kv")
@dataclass(frozen=True)
class KVPrecision(PrecisionPart):
    """Sinks and recent tokens in 16 bits, everything between in fewer."""

    bits: int = option(4, "bits of the important tokens' keys and values", choices=_BITS)
    low_bits: int | None = option(
        None, "bits of tokens that do not attend at prefill; None: the same", choices=(None, 8, 4, 2)
    )
    tau: float = option(0.975, "share of the attention that important generated tokens hold")
    sinks: int = option(4, "first tokens of a row that stay in 16 bits", low=0)
    recent: int = option(64, "last tokens of a row that do", low=1)
    interval: int = option(128, "generated tokens packed at a time, a multiple of 64", low=64)
    edge_bits: int | None = option(
        None, "bits of the first and last layers instead; 16 leaves them as they are", choices=(None, *_BITS)
    )
    edge_layers: int = option(1, "so many at either end", low=1)
    keep_text: bool = option(
        False, "the prompt's text stays in 16 bits, too, but for the recent tokens when it was read"
    )
    prompt_block: int | None = option(
        None, "tokens of the prompt that share channel scales, a multiple of 64; None: all of them", low=64
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.prompt_block is not None and self.prompt_block % 64:
            raise ValueError(f"prompt_block must be a multiple of 64, got {self.prompt_block}")
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau}")
        if self.interval % 64:
            raise ValueError(f"interval must be a multiple of 64, got {self.interval}")
        if self.low_bits is not None and self.bits == 16:
            raise ValueError(
                f"low_bits needs bits below 16, got bits {self.bits} and low_bits {self.low_bits}"
            )
        if self.low_bits is not None and self.low_bits >= self.bits:
            raise ValueError(f"low_bits must be below bits ({self.bits}), got {self.low_bits}")

    @property
    def separates(self) -> bool:
        return self.low_bits is not None

    def levels(self, layer: int, layers: int) -> tuple[int, ...]:
        edge = layer < self.edge_layers or layer >= layers - self.edge_layers
        if self.edge_bits is not None and edge:
            return () if self.edge_bits == 16 else (self.edge_bits,)
        if self.low_bits is not None:
            return (self.bits, self.low_bits)
        return () if self.bits == 16 else (self.bits,)

    def important(self, scores: Tensor) -> Tensor:
        return ops.select(scores, mass=self.tau).count
