"""Types that ops and references return."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Selection(NamedTuple):
    """Kept tokens of each of R rows of N tokens, in at most M slots.

    index: (R, M) int32, ascending positions of the kept tokens, -1 past count.
    count: (R,) int32, kept tokens of each row.
    inverse: (R, N) int32, the slot of each token, or -1 where it is not kept.
    """

    # They hide tuple.index and tuple.count, which nobody wants of three tensors.
    index: torch.Tensor  # type: ignore[assignment]
    count: torch.Tensor  # type: ignore[assignment]
    inverse: torch.Tensor


class MergedPairs(NamedTuple):
    """What `merge_pairs` makes of R rows of N tokens, in at most M slots.

    x: (R, M, C) the tokens left, in their order, in the dtype they had.
    selection: who they are: index, count, inverse.
    target: (R, N) int32, the position in index of the token that each token is now part of (its own for one that is
        left), or -1 where it vanished.
    weight: (R, M) float32, what each token left weighs now: the sum over all it is made of.
    """

    x: torch.Tensor
    selection: Selection
    target: torch.Tensor
    weight: torch.Tensor
