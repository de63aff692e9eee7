"""quantize_kv, quantize_kv_: keys and values packed into 8, 4 or 2 bits."""

from __future__ import annotations

import torch

from .. import _errors, _library
from .._kv import PackedKV
from .._observe import observed
from .._quantize_args import QuantizeArgs, check_quantize, check_quantize_into

# Tokens that one block of threads takes in a kernel's pass over keys and values, at least; and how many
# blocks of threads are worth having. As in csrc/quantization/quantize_kv.cuh.
_LEAST_TOKENS = 128
_THREAD_BLOCKS = 528


@observed
def quantize_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bits: int,
    lens: torch.Tensor | None = None,
    block: int | None = None,
) -> PackedKV:
    """Packs keys with a scale for each channel, and values with one for each channel and one for each token.

    With n a token, d a channel, L = 2 ** bits - 1, for each batch row, key/value head and block of tokens, over the
    block's valid tokens only, in fp32::

        key_zero[d]  = min_n key[n, d]
        key_scale[d] = (max_n key[n, d] - key_zero[d]) / L
        key_code     = round((key - key_zero) / key_scale)          0 where the scale is 0

        c[d]             = sqrt(max_n |value[n, d]|)
        value_channel[d] = c[d] * 2**e                              2**e just above 2.0625 * max_d c[d] / L
        u                = value / value_channel
        zero[n]          = min_d u[n, d]                            rounded down to fp16
        scale[n]         = (max_d u[n, d] - zero[n]) / L            rounded up to fp16; at most 1
        value_code       = round((u - zero) / scale)                0 where the scale is 0

    So a key differs from its packed form by at most key_scale / 2, a value by at most value_channel * scale / 2, and
    rounding of fp32 besides. Rounding is to nearest even; the same bits come out of every backend. Scales
    and roots have floors, which leave the difference below 1e-30 wherever they matter: key_scale 2**-126, c 2**-50.
    The quantiser is ZipCache's, which ZipVL stores its cache with (He et al., arXiv 2405.14256 and 2410.08584).

    Args:
        key, value: (B, N, Hkv, D), fp32, fp16 or bf16, any strides with contiguous channels, finite and below 3.3e38;
            D is 32, 64, 80, 96, 128, 192 or 256. Any N, also 0.
        bits: of a code, 8, 4 or 2.
        lens: (B,) int32 in [0, N], the valid tokens of each row; default N. Tokens past it are not looked at, and
            packed as codes 0 with value_token 0.
        block: tokens that share channel parameters: a multiple of 64, or at least N. Default: all N share them,
            which is what `compact_kv_` needs.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, width, device, bits or block does not fit. On the CPU also: a valid entry is NaN or
            infinite, or lens lies outside [0, N]. On CUDA these set the device error word
            (`lightvlm_ext.device_errors`); such an entry counts as 0, such a row as empty.
    """
    args = check_quantize(key, value, bits=bits, lens=lens, block=block)
    _run("quantize_kv", args)
    return args.packed


@observed
def quantize_kv_(
    packed: PackedKV,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    offset: int = 0,
    lens: torch.Tensor | None = None,
) -> None:
    """`quantize_kv` into tokens [offset, offset + N) of storage that is already there, for a cache that grows.

    Addresses stay and nothing of the cache's size is allocated, so that the call can live in a CUDA graph. The new
    tokens get blocks of their own: what stands before and behind them stays as it is. `packed.lens` is neither read
    nor changed.

    Args:
        packed: as `quantize_kv` returns it, or any PackedKV that fits key.
        key, value: (B, N, Hkv, D), as for `quantize_kv`.
        offset: a multiple of packed.block; offset + N is at most packed.tokens.
        lens: (B,) int32 in [0, N], how many of the new tokens are valid; default N.

    Raises:
        TypeError, ValueError: as `quantize_kv`, and where packed does not fit. Nothing is written then.
    """
    _run("quantize_kv_", check_quantize_into(packed, key, value, offset=offset, lens=lens))


def _run(name: str, args: QuantizeArgs) -> None:
    device, packed = args.key.device, args.packed
    _library.check_backend(device)
    _library.op("quantize_kv")(
        args.key,
        args.value,
        args.lens,
        packed.bits,
        packed.block,
        packed.key_codes,
        packed.value_codes,
        packed.key_scale,
        packed.key_zero,
        packed.value_channel,
        packed.value_token,
        _workspace(args),
        _errors.error_word(name, device),
    )
    _errors.check_now(name, device)


def _workspace(args: QuantizeArgs) -> torch.Tensor | None:
    """Ranges of the parts of a block, where it is worth cutting into parts, (B, Hkv, T, parts, 3, D). The CPU
    needs none."""
    device, packed = args.key.device, args.packed
    if device.type == "cpu" and not _library.is_emulated():
        return None
    tokens = min(packed.block, packed.tokens)
    batch, heads, blocks, width = packed.key_scale.shape
    parts = min(-(-tokens // _LEAST_TOKENS), -(-_THREAD_BLOCKS // max(1, batch * heads * blocks)))
    if parts <= 1:
        return None
    return torch.empty((batch, heads, blocks, parts, 3, width), dtype=torch.float32, device=device)


@_library.register_fake("quantize_kv")
def _quantize_kv_fake(
    key: torch.Tensor,
    value: torch.Tensor,
    lens: torch.Tensor | None,
    bits: int,
    block: int,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    key_scale: torch.Tensor,
    key_zero: torch.Tensor,
    value_channel: torch.Tensor,
    value_token: torch.Tensor,
    workspace: torch.Tensor | None,
    error: torch.Tensor | None,
) -> None:
    return None
