"""A decoding step's token between the layer that counts it and the attention that writes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class NewToken(NamedTuple):
    """What `lightvlm_ext.ops.append_attend_` is given.

    key, value: (B, Hkv, 1, D).   before: (B,) int32, each row's end before the token; None: the token is the last place
    of the buffer that is looked at.   starts: (B,) int32, where each row's keys begin; None: 0.
    """

    key: Tensor
    value: Tensor
    before: Tensor | None
    starts: Tensor | None
