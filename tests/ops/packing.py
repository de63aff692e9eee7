"""Keys, values and packed segments for the tests of quantize_kv and dequantize_kv."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lightvlm_ext._kv import PackedKV

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("tokens", "heads", "interleaved", "cache", "unaligned")


def lens_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def in_layout(numbers: Tensor, layout: str) -> Tensor:
    """The same (B, N, Hkv, D) numbers, stored one way or another; what lies between them is NaN."""
    batch, tokens, heads, width = numbers.shape
    storage, view = {
        "tokens": ((batch, tokens, heads, width), lambda s: s),
        "heads": ((batch, heads, tokens, width), lambda s: s.transpose(1, 2)),
        "interleaved": ((batch, tokens, 2, heads, width), lambda s: s[:, :, 1]),
        "cache": ((batch + 1, tokens + 5, heads + 1, width + 16), lambda s: s[1:, 2:-3, 1:, 8:-8]),
        "unaligned": ((batch, heads, tokens, width + 3), lambda s: s[..., 1:-2].transpose(1, 2)),
    }[layout]
    out = view(torch.full(storage, float("nan"), dtype=numbers.dtype))
    return out.copy_(numbers)


def fields(packed: PackedKV) -> dict[str, Tensor]:
    """Its tensors by name."""
    values = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_same(found: PackedKV, wanted: PackedKV) -> None:
    """Every field, to the bit; so that -0 is not 0."""
    assert (found.bits, found.head_dim, found.block) == (wanted.bits, wanted.head_dim, wanted.block)
    assert fields(found).keys() == fields(wanted).keys()
    for name, tensor in fields(found).items():
        assert same_bits(tensor, fields(wanted)[name]), name


def unpack_codes(codes: Tensor, bits: int, width: int) -> Tensor:
    """(..., row bytes) to (..., width), one code after another as the layout is told: by bit of the row."""
    each = []
    for d in range(width):
        byte, bit = divmod(d * bits, 8)
        each.append((codes[..., byte].int() >> bit) % 2**bits)
    return torch.stack(each, dim=-1)


def half_steps(packed: PackedKV) -> tuple[Tensor, Tensor]:
    """Half the distance of neighbouring codes of each key and each value, (B, N, Hkv, D) float64."""
    block = torch.arange(packed.tokens) // packed.block
    key = packed.key_scale.double()[:, :, block]
    value = packed.value_channel.double()[:, :, block] * packed.value_token.double()[..., :1]
    return key.transpose(1, 2) / 2, value.transpose(1, 2) / 2
