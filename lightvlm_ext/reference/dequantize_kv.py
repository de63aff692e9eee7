"""dequantize_kv, in plain torch."""

from __future__ import annotations

import torch

from .. import _checks
from .._kv import PackedKV
from .._quantize_args import check_dequantize


def dequantize_kv(packed: PackedKV, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `lightvlm_ext.ops.dequantize_kv`; float64 too. Raises on every device."""
    packed = check_dequantize(packed, dtype, dtypes=(*_checks.FLOATING, torch.float64))
    tokens = packed.tokens
    block = torch.arange(tokens, device=packed.key_codes.device) // packed.block
    scale, zero, channel = (
        x.double()[:, :, block] for x in (packed.key_scale, packed.key_zero, packed.value_channel)
    )
    of_token = packed.value_token.double()
    key = scale * _unpack(packed.key_codes, packed) + zero
    inner = of_token[..., :1] * _unpack(packed.value_codes, packed) + of_token[..., 1:]
    if dtype == torch.float64:
        value = channel * inner
    else:  # Rounded to fp32 where the op rounds: after each multiply and add
        key, value = key.float(), channel.float() * inner.float()
    lens = packed.lens
    if lens is not None:
        if bool(((lens < 0) | (lens > tokens)).any()):
            raise ValueError(f"packed.lens: a value lies outside [0, {tokens}]")
        past = (torch.arange(tokens, device=lens.device) >= lens[:, None])[:, None, :, None]
        key, value = key.masked_fill(past, 0), value.masked_fill(past, 0)
    return key.to(dtype).transpose(1, 2).contiguous(), value.to(dtype).transpose(1, 2).contiguous()


def _unpack(codes: torch.Tensor, packed: PackedKV) -> torch.Tensor:
    """(..., row_bytes) bytes to (..., D) codes, float64."""
    shift = torch.arange(0, 8, packed.bits, device=codes.device)
    each = codes.int()[..., None] >> shift & (2**packed.bits - 1)
    return each.flatten(-2)[..., : packed.head_dim].double()
