"""decode_attention: one query token a batch row over a cache in segments of different formats."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _errors, _library
from .._decode_args import DecodeArgs, check_decode, unchecked
from .._kv import KVSegment, PackedKV
from .._observe import observed, observed_as
from .._tickets import tickets

# As in csrc/decode_attention/decode_attention.h, which checks the size of the workspace.
_HEAD_TILE = 8
_MOST_BLOCKS = 512
_SPLIT_TOKENS = 512
_SPAN = 64
_STEP = 16


@observed
def decode_attention(
    query: torch.Tensor,
    segments: Sequence[KVSegment | PackedKV],
    *,
    scale: float | None = None,
    mass: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token per batch row over a cache in segments, each in a format of its own.

    With the valid tokens of all segments as one cache, k and v being what the segment says (see PackedKV)::

        x[h, n]   = scale * <query[h], k[n, h // (Hq // Hkv)]>
        lse[h]    = log(sum over n of exp(x[h, n]))
        out[h, d] = sum over n of exp(x[h, n] - lse[h]) * v[n, h // (Hq // Hkv), d]

    Packed keys and values are never dequantised in memory: scales are folded into the query, the weights and the
    result. Sums are fp32; same input, same bits.

    Args:
        query: (B, 1, Hq, D) fp32, fp16 or bf16, after rotary embedding. D is 32, 64, 80, 96, 128, 192 or 256.
        segments: up to 12, in any order; all with the same number of heads, of which Hq is a multiple.
            KVSegment: key, value (B, N, Hkv, D) of query's dtype, with any strides and contiguous channels;
            lens, leftpad (B,) int32, row b's valid tokens being [leftpad[b], lens[b]).
            With block_table (B, max_blocks) int32, contiguous blocks: key, value (P, page_size, Hkv, D) are pages, and
            token n of row b lies in page block_table[b, n // page_size], at n % page_size. page_size is a multiple
            of 16 from 16 to 256, N = max_blocks * page_size. Rows may name the same page; entries without a
            valid token are not read.
            PackedKV: 8, 4 or 2 bits; lens (B,) int32, valid tokens being [0, lens[b]).
            Segments without a valid token are skipped.
        scale: of the logits. Default: D ** -0.5.
        mass: for each segment a buffer (B, Hkv, N) fp32 with contiguous tokens, or None. Each valid token's
            probability, mean over the query heads of its key head, is added to it; the others are not touched.
            Over all segments, what is added sums to 1 for each batch row and key head.

    Returns:
        out: (B, 1, Hq, D) in query's dtype.
        lse: (B, Hq, 1) fp32, natural logarithm. A row without any key has out 0 and lse -inf, and so has one
        whose logits are all -inf.

    A NaN in a batch row's valid tokens or query stays in that row. On CUDA the call takes no host value from the
    device and can be captured in a CUDA graph: one launch, two with mass. A graph keeps the addresses of its
    arguments, while lens, leftpad and block tables may change between replays.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, stride, device or number does not fit. On the CPU also: 0 <= leftpad <= lens <= N does
            not hold, or the page of a valid token is outside [0, P). On CUDA these set the device error word
            (`lightvlm_ext.device_errors`), and the row has no valid token in that segment.
    """
    return _run(check_decode(query, segments, scale=scale, mass=mass))


@observed_as("decode_attention")
def decode_attention_checked(
    query: torch.Tensor,
    segments: Sequence[KVSegment | PackedKV],
    scale: float,
    mass: Sequence[torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """decode_attention for callers that have checked their arguments. The op itself checks what memory depends on."""
    return _run(unchecked(query, segments, scale, mass))


def _run(args: DecodeArgs) -> tuple[torch.Tensor, torch.Tensor]:
    device = args.query.device
    _library.check_backend(device)
    out, lse = results_of(args.query)
    buffers = device_buffers("decode_attention", args)
    _library.op("decode_attention")(
        args.query,
        args.key,
        args.value,
        args.bits,
        args.block,
        args.lens,
        args.leftpad,
        args.block_table,
        args.key_scale,
        args.key_zero,
        args.value_channel,
        args.value_token,
        args.scale,
        args.mass,
        args.mass_segment,
        out,
        lse,
        *buffers,
    )
    if buffers[-1] is not None:
        _errors.check_now("decode_attention", device)
    return out, lse


def results_of(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for out and lse."""
    batch, _, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty((batch, heads, 1), dtype=torch.float32)


def device_buffers(op: str, args: DecodeArgs) -> tuple[torch.Tensor | None, ...]:
    """Workspace, tickets and error word of the CUDA kernels. The CPU twin needs none of them."""
    device = args.query.device
    if device.type == "cpu" and not _library.is_emulated():
        return None, None, None
    word = _errors.error_word(op, device)
    return _workspace(args), tickets(device, _units(args)), word


def _units(args: DecodeArgs) -> int:
    """What has a result of its own to merge: a batch row's tile of heads of one key head."""
    group = args.query.shape[2] // args.key_heads()
    return args.query.shape[0] * args.key_heads() * -(-group // _HEAD_TILE)


def _workspace(args: DecodeArgs) -> torch.Tensor:
    """What the CUDA kernels keep between blocks; docs/kernels/decode_attention.md."""
    device = args.query.device
    batch, _, heads, width = args.query.shape
    units = _units(args)
    if units == 0:
        return torch.empty(0, dtype=torch.int32, device=device)
    tokens = [args.tokens(segment) for segment in range(len(args.key))]
    splits = max(1, min(-(-_MOST_BLOCKS // units), -(-sum(tokens) // _SPLIT_TOKENS)))
    words = units * splits * _HEAD_TILE * (width + 2)
    if args.mass:
        slots = sum(-(-tokens[segment] // _SPAN) * _SPAN for segment in args.mass_segment)
        even = -(-heads // args.key_heads() // 2) * 2
        numbers = 2 if args.query.dtype == torch.float32 else 1  # in half words
        words += batch * args.key_heads() * even * (slots * numbers // 2 + slots // _STEP)
        words += units * (_HEAD_TILE + 1) * 2
    return torch.empty(words, dtype=torch.int32, device=device)


@_library.register_fake("decode_attention")
def _decode_attention_fake(
    query: torch.Tensor,
    key: list[torch.Tensor],
    value: list[torch.Tensor],
    bits: list[int],
    block: list[int],
    lens: list[torch.Tensor | None],
    leftpad: list[torch.Tensor | None],
    block_table: list[torch.Tensor | None],
    key_scale: list[torch.Tensor | None],
    key_zero: list[torch.Tensor | None],
    value_channel: list[torch.Tensor | None],
    value_token: list[torch.Tensor | None],
    scale: float,
    mass: list[torch.Tensor],
    mass_segment: list[int],
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: torch.Tensor | None,
    ticket: torch.Tensor | None,
    error: torch.Tensor | None,
) -> None:
    return None
