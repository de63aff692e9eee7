"""Segments of a key/value cache, as `quantize_kv` makes them and `decode_attention` reads them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from . import _checks

PACKED_BITS = (8, 4, 2)
PACKED_BLOCK = 64
PAGE_SIZES = range(16, 257, 16)  # of decode_attention: whole tiles of its products
PACKED_HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)


@dataclass(frozen=True)
class KVSegment:
    """Keys and values in 16 or 32 bit, each batch row's in a piece or in pages.

    key, value: (B, N, Hkv, D), any strides with contiguous channels.
        With block_table they are pages: (P, page_size, Hkv, D), any strides with contiguous channels; page_size is a
        multiple of 16 from 16 to 256. Token n of batch row b lies in page block_table[b, n // page_size], at
        n % page_size. Rows may name the same page.
    lens: (B,) int32, end of each row's valid tokens; None: N.   leftpad: (B,) int32, where they begin; None: 0.
    block_table: (B, max_blocks) int32, contiguous blocks; N = max_blocks * page_size. Entries without a valid token
        are not read. None: not in pages.
    """

    key: torch.Tensor
    value: torch.Tensor
    lens: torch.Tensor | None = None
    leftpad: torch.Tensor | None = None
    block_table: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """N, the tokens there is room for in a batch row."""
        blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return blocks * self.key.shape[1]


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

    def narrow(self, start: int, length: int) -> PackedKV:
        """Tokens [start, start + length), as views; start is a multiple of block. Without lens."""
        first, last = start // self.block, -(-(start + length) // self.block)
        return PackedKV(
            self.bits,
            self.head_dim,
            self.block,
            self.key_codes[:, :, start : start + length],
            self.value_codes[:, :, start : start + length],
            self.key_scale[:, :, first:last],
            self.key_zero[:, :, first:last],
            self.value_channel[:, :, first:last],
            self.value_token[:, :, start : start + length],
        )


def packed_row_bytes(head_dim: int, bits: int) -> int:
    """Bytes of a token's codes in one head."""
    return -(-head_dim // 32) * 32 * bits // 8


def empty_packed(like: torch.Tensor, *, bits: int, block: int, lens: torch.Tensor | None = None) -> PackedKV:
    """Uninitialised storage for as many tokens as `like`, (B, N, Hkv, D), has, on its device."""
    batch, tokens, heads, width = like.shape
    blocks = -(-tokens // block)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((batch, heads, *shape), dtype=dtype, device=like.device)

    row = packed_row_bytes(width, bits)
    return PackedKV(
        bits=bits,
        head_dim=width,
        block=block,
        key_codes=empty(tokens, row, dtype=torch.uint8),
        value_codes=empty(tokens, row, dtype=torch.uint8),
        key_scale=empty(blocks, width, dtype=torch.float32),
        key_zero=empty(blocks, width, dtype=torch.float32),
        value_channel=empty(blocks, width, dtype=torch.float32),
        value_token=empty(tokens, 2, dtype=torch.float16),
        lens=lens,
    )


def check_packed(value: object, name: str) -> PackedKV:
    """`value` as a PackedKV whose tensors fit each other, or TypeError or ValueError naming the field.

    Contiguous are the rows of codes, the channels of channel parameters and the pair in value_token; other
    strides are free.
    """
    if not isinstance(value, PackedKV):
        raise TypeError(f"{name}: got {type(value).__name__}, must be a PackedKV")
    if value.bits not in PACKED_BITS:
        raise ValueError(f"{name}.bits: got {value.bits!r}, must be 8, 4 or 2")
    if value.head_dim not in PACKED_HEAD_DIMS:
        supported = ", ".join(str(d) for d in PACKED_HEAD_DIMS)
        raise ValueError(f"{name}.head_dim: got {value.head_dim!r}, must be one of {supported}")
    codes = _checks.tensor(value.key_codes, f"{name}.key_codes")
    _checks.shape(codes, f"{name}.key_codes", ("B", "Hkv", "N", packed_row_bytes(value.head_dim, value.bits)))
    batch, heads, tokens, row = codes.shape
    block = _checks.integer(value.block, f"{name}.block", 1)
    if block < tokens and block % PACKED_BLOCK:
        raise ValueError(
            f"{name}.block: got {block}, must be a multiple of {PACKED_BLOCK}, or at least the {tokens} tokens"
        )
    channels = (batch, heads, -(-tokens // block), value.head_dim)
    for field, shape, dtype in (
        ("key_codes", (batch, heads, tokens, row), torch.uint8),
        ("value_codes", (batch, heads, tokens, row), torch.uint8),
        ("key_scale", channels, torch.float32),
        ("key_zero", channels, torch.float32),
        ("value_channel", channels, torch.float32),
        ("value_token", (batch, heads, tokens, 2), torch.float16),
        ("lens", (batch,), torch.int32),
    ):
        one = getattr(value, field)
        if field == "lens" and one is None:
            continue
        one = _checks.tensor(one, f"{name}.{field}")
        _checks.dtype(one, f"{name}.{field}", dtype)
        _checks.shape(one, f"{name}.{field}", shape)
        _checks.same_device(one, f"{name}.{field}", codes, f"{name}.key_codes")
        if field != "lens":
            _checks.last_contiguous(one, f"{name}.{field}")
    return value
