"""Segments of a key/value cache, as `quantize_kv` makes them and `decode_attention` reads them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

PACKED_BITS = (8, 4, 2)
PACKED_HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class KVSegment:
    """Keys and values in 16 or 32 bit.

    key, value: (B, N, Hkv, D), any strides with contiguous channels.
    lens: (B,) int32, end of each row's valid tokens; None: N.   leftpad: (B,) int32, where they begin; None: 0.
    """

    key: torch.Tensor
    value: torch.Tensor
    lens: torch.Tensor | None = None
    leftpad: torch.Tensor | None = None


@dataclass(frozen=True)
class PackedKV:
    """Keys and values of one segment in 8, 4 or 2 bits, channel scales for keys, token scales for values.

    With n a token, d a channel and t = n // block, for each batch row and key/value head::

        key[n, d]   = key_scale[t, d] * key_code[n, d] + key_zero[t, d]
        value[n, d] = value_channel[t, d] * (value_token[n, 0] * value_code[n, d] + value_token[n, 1])

    bits: of a code, 8, 4 or 2.   head_dim: D, one of PACKED_HEAD_DIMS.
    block: tokens that share channel parameters, a multiple of 64; or any number >= N: all share them.
    key_codes, value_codes: (B, Hkv, N, row_bytes) uint8, contiguous rows. Code d stands at bit d * bits of its
        row, from the lowest bit of the first byte up. D is rounded up to a multiple of 32 with codes of 0.
    key_scale, key_zero, value_channel: (B, Hkv, T, D) fp32, contiguous, T = ceil(N / block).
    value_token: (B, Hkv, N, 2) fp16, scale and zero.
    lens: (B,) int32, each row's valid tokens; None: N.

    Codes and value_token have a row a token, so that `compact_kv_` moves them (as extras), as long as one block
    holds all tokens. Layout and formulas: docs/kernels/quantization.md.
    """

    bits: int
    head_dim: int
    block: int
    key_codes: torch.Tensor
    value_codes: torch.Tensor
    key_scale: torch.Tensor
    key_zero: torch.Tensor
    value_channel: torch.Tensor
    value_token: torch.Tensor
    lens: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """N, the tokens there is room for."""
        return self.key_codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(one.numel() * one.element_size() for one in fields if isinstance(one, torch.Tensor))


def packed_row_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a token's codes in one head."""
    return -(-head_dim // 32) * 32 * bits // 8
