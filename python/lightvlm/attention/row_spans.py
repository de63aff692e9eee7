"""A padding mask in short: between which keys each batch row's sequence stands, instead of which row sees which key.

transformers hands a mask from the function that makes it to the layers as a 4-D tensor, moves it between devices, makes
it contiguous, and passes 4-D masks on untouched. So this is one: int32 (B, 2, sides, width), where ``[:, 0]`` is where
the keys of each row begin and ``[:, 1]`` where they end. How rows look at them is in the shape, which a layer can read
without waiting for a device: sides 1 is causal, 2 looks both ways; width is the window's left side + 2, so 1 where no
window is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowSpans(NamedTuple):
    """Row i of Sq queries stands at key p = i + end - Sq; its sequence's keys are [begin, end). As :class:`.call.Call`.

    begin, end: (B,) int32.   causal: keys after p are hidden.   left: keys before p - left are hidden, and, if not
    causal, those after p + left; -1: no window.
    """

    begin: Tensor
    end: Tensor
    causal: bool
    left: int

    def as_mask(self) -> Tensor:
        """The tensor that stands for it; its strides are 0 where only the size counts."""
        pair = torch.stack((self.begin, self.end)).int().transpose(0, 1)
        return pair[:, :, None, None].expand(-1, -1, 1 if self.causal else 2, self.left + 2)


def is_spans(mask: Tensor) -> bool:
    """Whether a mask is one of these; those of transformers are bool or floating."""
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1] == 2 and mask.shape[2] in (1, 2)


def from_mask(mask: Tensor) -> RowSpans:
    """What :meth:`RowSpans.as_mask` put into a tensor."""
    begin, end = mask[:, 0, 0, 0].contiguous(), mask[:, 1, 0, 0].contiguous()
    return RowSpans(begin, end, mask.shape[2] == 1, mask.shape[3] - 2)
