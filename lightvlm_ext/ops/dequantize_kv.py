"""dequantize_kv: a packed cache back to keys and values."""

from __future__ import annotations

import torch

from .. import _errors, _library
from .._kv import PackedKV
from .._observe import observed
from .._quantize_args import check_dequantize


@observed
def dequantize_kv(packed: PackedKV, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a packed segment, as `PackedKV` defines them.

    Computed in fp32, key = fma(scale, code, zero) and value = channel * fma(scale, code, zero), then rounded to dtype:
    the same bits on every backend.

    Args:
        packed: of `quantize_kv`.
        dtype: of the result, float32, float16 or bfloat16.

    Returns:
        key, value: (B, N, Hkv, D), contiguous. Rows from packed.lens on are 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a field of packed does not fit the others. On the CPU also: lens lies outside [0, N]. On CUDA that
            sets the device error word (`lightvlm_ext.device_errors`), and the row is 0.
    """
    packed = check_dequantize(packed, dtype)
    codes = packed.key_codes
    _library.check_backend(codes.device)
    batch, heads, tokens, _ = codes.shape
    shape = (batch, tokens, heads, packed.head_dim)
    key, value = (torch.empty(shape, dtype=dtype, device=codes.device) for _ in range(2))
    _library.op("dequantize_kv")(
        packed.key_codes,
        packed.value_codes,
        packed.key_scale,
        packed.key_zero,
        packed.value_channel,
        packed.value_token,
        packed.lens,
        packed.bits,
        packed.block,
        key,
        value,
        _errors.error_word("dequantize_kv", codes.device),
    )
    _errors.check_now("dequantize_kv", codes.device)
    return key, value


@_library.register_fake("dequantize_kv")
def _dequantize_kv_fake(
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor,
    value_channel: torch.Tensor,
    value_token: torch.Tensor,
    lens: torch.Tensor | None,
    bits: int,
    block: int,
    key: torch.Tensor,
    value: torch.Tensor,
    error: torch.Tensor | None,
) -> None:
    return None
