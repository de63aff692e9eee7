"""Arguments of quantize_kv, quantize_kv_ and dequantize_kv, checked once for the ops and their references."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _checks
from ._kv import PACKED_BITS, PACKED_BLOCK, PACKED_HEAD_DIMS, PackedKV, check_packed, empty_packed


@dataclass(frozen=True)
class QuantizeArgs:
    """Keys and values, (B, N, Hkv, D) with contiguous channels, and the packed tokens they go to."""

    key: torch.Tensor
    value: torch.Tensor
    lens: torch.Tensor | None
    packed: PackedKV


def check_quantize(
    key: object,
    value: object,
    *,
    bits: object,
    lens: object,
    block: object,
    dtypes: tuple[torch.dtype, ...] = _checks.FLOATING,
) -> QuantizeArgs:
    """The arguments of quantize_kv, and new storage for its result."""
    key, value = _check_dense(key, value, dtypes)
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in PACKED_BITS:
        raise ValueError(f"bits: got {bits!r}, must be 8, 4 or 2")
    tokens = key.shape[1]
    block = max(tokens, 1) if block is None else _checks.integer(block, "block", 1)
    if block < tokens and block % PACKED_BLOCK:
        raise ValueError(
            f"block: got {block}, must be a multiple of {PACKED_BLOCK}, or at least the {tokens} tokens"
        )
    lens = _check_lens(lens, key)
    return QuantizeArgs(key, value, lens, empty_packed(key, bits=bits, block=block, lens=lens))


def check_quantize_into(
    packed: object,
    key: object,
    value: object,
    *,
    offset: object,
    lens: object,
    dtypes: tuple[torch.dtype, ...] = _checks.FLOATING,
) -> QuantizeArgs:
    """The arguments of quantize_kv_; `packed` of the result is the views that it writes to."""
    packed = check_packed(packed, "packed")
    key, value = _check_dense(key, value, dtypes)
    batch, tokens, heads, width = key.shape
    room = (packed.key_codes.shape[0], packed.key_codes.shape[1], packed.head_dim)
    if (batch, heads, width) != room:
        raise ValueError(
            f"key: has shape {tuple(key.shape)}, must be ({room[0]}, N, {room[1]}, {room[2]}) as packed"
        )
    _checks.same_device(key, "key", packed.key_codes, "packed")
    offset = _checks.integer(offset, "offset", 0)
    if offset % packed.block:
        raise ValueError(f"offset: got {offset}, must be a multiple of packed.block, {packed.block}")
    if offset + tokens > packed.tokens:
        raise ValueError(
            f"offset: {offset} and {tokens} more tokens do not fit, packed has room for {packed.tokens}"
        )
    return QuantizeArgs(key, value, _check_lens(lens, key), packed.narrow(offset, tokens))


def check_dequantize(
    packed: object, dtype: object, *, dtypes: tuple[torch.dtype, ...] = _checks.FLOATING
) -> PackedKV:
    """The arguments of dequantize_kv."""
    packed = check_packed(packed, "packed")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {type(dtype).__name__}, must be a torch.dtype")
    if dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"dtype: got {str(dtype).removeprefix('torch.')}, must be {wanted}")
    return packed


def _check_dense(
    key: object, value: object, dtypes: tuple[torch.dtype, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = _checks.tensor(key, "key"), _checks.tensor(value, "value")
    _checks.dtype(key, "key", *dtypes)
    _checks.dtype(value, "value", key.dtype)
    _checks.shape(key, "key", ("B", "N", "Hkv", "D"))
    _checks.shape(value, "value", tuple(key.shape))
    _checks.same_device(value, "value", key, "key")
    if key.shape[3] not in PACKED_HEAD_DIMS:
        supported = ", ".join(str(d) for d in PACKED_HEAD_DIMS)
        raise ValueError(f"key: has head width {key.shape[3]}, must be one of {supported}")
    if key.shape[1] > _checks.INT32_MAX:
        raise ValueError(f"key: has {key.shape[1]} tokens, must have at most {_checks.INT32_MAX}")
    for tensor, name in ((key, "key"), (value, "value")):
        _checks.last_contiguous(tensor, name)
    return key, value


def _check_lens(lens: object, key: torch.Tensor) -> torch.Tensor | None:
    if lens is None:
        return None
    lens = _checks.tensor(lens, "lens")
    _checks.dtype(lens, "lens", torch.int32)
    _checks.shape(lens, "lens", (key.shape[0],))
    _checks.same_device(lens, "lens", key, "key")
    return lens
