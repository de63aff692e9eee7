"""``quantize_kv`` and ``dequantize_kv`` against the same quantiser composed in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext._kv import PACKED_BITS, PackedKV

from ._case import Case, Geometry, Sizes, dtype_name, plain_copies, require, require_close

TOKENS = (8192, 32768)


def quantize_cases(sizes: Sizes) -> Iterator[Case]:
    """Keys and values of one layer, one block for all tokens, in each number of bits."""
    for name, key, value, bits, parameters in _inputs(sizes):
        yield _quantize(name, key, value, bits, parameters)


def dequantize_cases(sizes: Sizes) -> Iterator[Case]:
    """The way back, to bfloat16."""
    for name, key, value, bits, parameters in _inputs(sizes):
        yield _dequantize(name, ops.quantize_kv(key, value, bits=bits), parameters)


def _inputs(sizes: Sizes) -> Iterator[tuple[str, Tensor, Tensor, int, dict[str, int | str]]]:
    for tokens in sizes.tokens or TOKENS:
        for batch in sizes.batches:
            for model, geometry in sizes.geometries().items():
                key, value = (_cache(batch, tokens, geometry, sizes.device) for _ in range(2))
                for bits in PACKED_BITS:
                    shape = " x ".join(map(str, key.shape))
                    name = f"{shape} bfloat16 ({model}), {bits} bits"
                    yield name, key, value, bits, {"bits": str(bits), "dtype": "bfloat16"}


def _cache(batch: int, tokens: int, geometry: Geometry, device: torch.device) -> Tensor:
    """As a cache stores it, (B, Hkv, N, D); with channels of different size, as keys have."""
    shape = (batch, geometry.kv_heads, tokens, geometry.head_dim)
    numbers = torch.randn(shape, device=device) * (torch.rand(shape[-1], device=device) * 4 + 0.1)
    return numbers.bfloat16().transpose(1, 2)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(..., D) uint8 to (..., D * bits / 8), neighbouring codes in a byte."""
    if bits == 8:
        return codes
    if bits == 4:
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes[..., 0::4] | (codes[..., 1::4] << 2) | (codes[..., 2::4] << 4) | (codes[..., 3::4] << 6)


def pack_quarters(codes: Tensor, bits: int) -> Tensor:
    """As pack_codes with halves or quarters of the channels in a byte, which torch does faster."""
    if bits == 8:
        return codes
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], start=1):
        packed |= part << (i * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of pack_codes."""
    if bits == 8:
        return packed
    shift = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shift) & (2**bits - 1)).flatten(-2)


def _plain(
    key: Tensor, value: Tensor, bits: int, dtype: torch.dtype, pack: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, ...]:
    """The quantiser in torch, heads first: codes, and what they are scaled with."""
    levels = 2**bits - 1
    k, v = key.transpose(1, 2).to(dtype), value.transpose(1, 2).to(dtype)
    k_low, k_high = k.amin(2, keepdim=True), k.amax(2, keepdim=True)
    k_scale = (k_high - k_low) / levels
    k_codes = (k - k_low).mul_(1 / k_scale).round_().to(torch.uint8)
    channel = torch.maximum(v.amax(2, keepdim=True), -v.amin(2, keepdim=True)).sqrt()
    u = v / channel
    u_low, u_high = u.amin(3, keepdim=True), u.amax(3, keepdim=True)
    u_scale = (u_high - u_low) / levels
    u_codes = u.sub_(u_low).mul_(1 / u_scale).round_().to(torch.uint8)
    return pack(k_codes, bits), pack(u_codes, bits), k_scale, k_low, channel, u_scale, u_low


def _quantize(name: str, key: Tensor, value: Tensor, bits: int, parameters: dict[str, int | str]) -> Case:
    def op() -> PackedKV:
        return ops.quantize_kv(key, value, bits=bits)

    def composed(dtype: torch.dtype, pack: Callable[[Tensor, int], Tensor]) -> Callable[[], object]:
        return lambda: _plain(key, value, bits, dtype, pack)

    baselines: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        way = f"amin, amax, round, shift, or in {dtype_name(dtype)}"
        baselines[way] = composed(dtype, pack_codes)
        if bits < 8:
            baselines[f"{way}, parts of the channels in a byte"] = composed(dtype, pack_quarters)

    def verify() -> None:
        packed = op()
        k_codes, _, k_scale, k_low, channel, u_scale, u_low = _plain(
            key, value, bits, torch.float32, pack_codes
        )
        require_close(packed.key_scale, k_scale, 1e-5)
        require_close(packed.key_zero, k_low, 1e-6)
        ours, theirs = (unpack_codes(codes, bits).int() for codes in (packed.key_codes, k_codes))
        require(bool(((ours - theirs).abs() <= 1).all()), "key codes disagree by more than one")
        require(bool(((ours != theirs).float().mean() < 1e-3).all()), "key codes disagree")
        found = ops.dequantize_kv(packed, torch.float32)[1].transpose(1, 2)
        error = (found - value.transpose(1, 2).float()).abs()
        bound = channel * (u_scale * 0.51 + (u_low.abs() / 1000 + u_scale) / (2**bits - 1))
        require(bool((error <= bound).all()), "values are further off than half a step")

    packed = op()
    total = key.nbytes + value.nbytes + packed.nbytes
    return Case(
        name, op, baselines, verify, plain_copies(total // 2, key.device), total, parameters=parameters
    )


def _dequantize(name: str, packed: PackedKV, parameters: dict[str, int | str]) -> Case:
    bits = packed.bits

    def op() -> tuple[Tensor, Tensor]:
        return ops.dequantize_kv(packed, torch.bfloat16)

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale, zero, channel = (
            x.to(dtype) for x in (packed.key_scale, packed.key_zero, packed.value_channel)
        )
        pair = packed.value_token.to(dtype)
        key = unpack_codes(packed.key_codes, bits).to(dtype).mul_(scale).add_(zero)
        value = unpack_codes(packed.value_codes, bits).to(dtype)
        value = value.mul_(pair[..., :1]).add_(pair[..., 1:]).mul_(channel)
        return key.bfloat16().transpose(1, 2), value.bfloat16().transpose(1, 2)

    def verify() -> None:
        for found, wanted in zip(op(), plain(torch.float32), strict=True):
            require_close(found, wanted, 1e-2)

    total = packed.nbytes + sum(one.nbytes for one in op())
    baselines: dict[str, Callable[[], object]] = {
        "shift, and, multiply, add in float32": lambda: plain(torch.float32),
        "shift, and, multiply, add in bfloat16": lambda: plain(torch.bfloat16),
    }
    return Case(
        name,
        op,
        baselines,
        verify,
        plain_copies(total // 2, packed.key_codes.device),
        total,
        parameters=parameters,
    )
