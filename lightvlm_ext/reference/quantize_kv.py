"""quantize_kv and quantize_kv_, in plain torch."""

from __future__ import annotations

import torch

from .. import _checks
from .._kv import PackedKV, packed_row_bytes
from .._quantize_args import QuantizeArgs, check_quantize, check_quantize_into

_DTYPES = (*_checks.FLOATING, torch.float64)
_SMALLEST_SCALE = 2.0**-126
_SMALLEST_VALUE = 2.0**-100
_LARGEST_ROOT = 2.0**64 * (1 - 2.0**-24)


def quantize_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bits: int,
    lens: torch.Tensor | None = None,
    block: int | None = None,
) -> PackedKV:
    """As `lightvlm_ext.ops.quantize_kv`, to the bit; float64 inputs are computed with in float64. Raises on every
    device."""
    args = check_quantize(key, value, bits=bits, lens=lens, block=block, dtypes=_DTYPES)
    _quantize(args)
    return args.packed


def quantize_kv_(
    packed: PackedKV,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    offset: int = 0,
    lens: torch.Tensor | None = None,
) -> None:
    """As `lightvlm_ext.ops.quantize_kv_`. Raises on every device."""
    _quantize(check_quantize_into(packed, key, value, offset=offset, lens=lens, dtypes=_DTYPES))


def _quantize(args: QuantizeArgs) -> None:
    batch, tokens = args.key.shape[:2]
    lens = [tokens] * batch if args.lens is None else args.lens.tolist()
    for row, length in enumerate(lens):
        if not 0 <= length <= tokens:
            raise ValueError(f"lens: row {row} has {length}, must be in [0, {tokens}]")
    _check_finite(args.key, "key", lens)
    _check_finite(args.value, "value", lens)
    packed = args.packed
    for codes in (packed.key_codes, packed.value_codes, packed.value_token):
        codes.zero_()
    for row, length in enumerate(lens):
        for block in range(packed.key_scale.shape[2]):
            first = block * packed.block
            # A block without a valid token is one of zeros.
            taken = slice(first, max(first, min(first + packed.block, length)))
            _quantize_key(args.key[row, taken].movedim(0, 1), packed, row, block, taken)
            _quantize_value(args.value[row, taken].movedim(0, 1), packed, row, block, taken)


def _quantize_key(key: torch.Tensor, packed: PackedKV, row: int, block: int, taken: slice) -> None:
    """Writes the block's codes and channel parameters, from its keys (Hkv, n, D)."""
    levels = 2**packed.bits - 1
    key = _numbers(key)
    if key.shape[1] == 0:
        key = key.new_zeros(key.shape[0], 1, key.shape[2])
    low, high = key.amin(1), key.amax(1)
    # Halves first: the difference of two finite numbers may be infinite.
    scale = (high * 0.5 - low * 0.5) / levels * 2
    scale = torch.where(high > low, scale.clamp(min=_SMALLEST_SCALE), 0.0)
    zero = low + 0.0  # of -0 and 0, the latter
    packed.key_scale[row, :, block] = scale
    packed.key_zero[row, :, block] = zero
    scale, zero = packed.key_scale[row, :, block].to(key), packed.key_zero[row, :, block].to(key)
    inverse = torch.where(scale > 0, torch.full_like(scale, 2.0) / scale, 0.0)
    codes = ((key * 0.5 - zero[:, None] * 0.5) * inverse[:, None]).round().clamp(0, levels)
    _pack(codes[:, : taken.stop - taken.start], packed.bits, packed.key_codes[row, :, taken])


def _quantize_value(value: torch.Tensor, packed: PackedKV, row: int, block: int, taken: slice) -> None:
    """Writes the block's codes, channel and token parameters, from its values (Hkv, n, D)."""
    levels = 2**packed.bits - 1
    value = _numbers(value)
    largest = value.abs().amax(1) if value.shape[1] else value.new_zeros(value.shape[0], value.shape[2])
    # In float64, as torch's square root in fp32 may be off by a bit.
    root = largest.clamp(min=_SMALLEST_VALUE).double().sqrt().to(value).clamp(max=_LARGEST_ROOT)
    # A power of two, so that it rounds nothing, with which every token's scale is in (0, 1].
    spread = root.amax(1) * torch.tensor(2.0625).div(levels).to(root)
    factor = torch.ldexp(torch.ones_like(spread), torch.frexp(spread).exponent)
    packed.value_channel[row, :, block] = root * factor[:, None]
    channel = packed.value_channel[row, :, block].to(value)

    shared = value * (1 / channel)[:, None]
    low, high = shared.amin(2) + 0.0, shared.amax(2) + 0.0  # of -0 and 0, the latter
    zero = _to_half(low, up=False)
    scale = _to_half((high - zero.to(low)) * (1 / levels), up=True)
    packed.value_token[row, :, taken] = torch.stack([scale, zero], dim=-1)
    scale, zero = scale.to(low)[..., None], zero.to(low)[..., None]
    inverse = torch.where(scale > 0, torch.ones_like(scale) / scale, 0.0)
    codes = ((shared - zero) * inverse).round().clamp(0, levels)
    _pack(codes, packed.bits, packed.value_codes[row, :, taken])


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """In the precision that is computed with."""
    return x if x.dtype == torch.float64 else x.float()


def _to_half(x: torch.Tensor, *, up: bool) -> torch.Tensor:
    """The nearest float16 that is not below x, or (up=False) not above it."""
    near = x.half()
    wrong = near.to(x) < x if up else near.to(x) > x
    limit = torch.tensor(float("inf") if up else float("-inf"), dtype=torch.float16, device=x.device)
    return torch.where(wrong, torch.nextafter(near.cpu(), limit.cpu()).to(x.device), near)


def _pack(codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Codes (..., D) to bytes (..., row_bytes): code d at bit d * bits, from the lowest of the first byte up."""
    width = codes.shape[-1]
    per_byte = 8 // bits
    padded = codes.new_zeros(*codes.shape[:-1], packed_row_bytes(width, bits) * per_byte, dtype=torch.int32)
    padded[..., :width] = codes
    shift = torch.arange(per_byte, device=codes.device) * bits
    out.copy_((padded.unflatten(-1, (-1, per_byte)) << shift).sum(-1))


def _check_finite(x: torch.Tensor, name: str, lens: list[int]) -> None:
    for row, length in enumerate(lens):
        wrong = (~x[row, :length].isfinite()).nonzero()
        if len(wrong):
            token, head, channel = wrong[0].tolist()
            raise ValueError(
                f"{name}: row {row}, token {token}, head {head}, channel {channel} is "
                f"{float(x[row, token, head, channel])}, must be finite"
            )
