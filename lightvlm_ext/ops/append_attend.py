"""append_attend_: a decoding step on one dense cache, which the step's keys and values are written into first."""

from __future__ import annotations

import torch

from .. import _errors, _library
from .._decode_args import DecodeArgs, check_append
from .._observe import observed, observed_as
from .decode_attention import device_buffers, results_of


@observed
def append_attend_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    new_key: torch.Tensor | None,
    new_value: torch.Tensor | None,
    lens: torch.Tensor | None,
    *,
    leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float | None = None,
    mass: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes new tokens behind the old ones of a cache, in place, and attends to all of them.

    The same as::

        key[b, lens[b] : lens[b] + T] = new_key[b]    # and values likewise, for each b
        decode_attention(
            query, [KVSegment(key, value, lens + T, leftpad, block_table)], scale=scale, mass=[mass]
        )

    in one call: at every token of every layer, the calls around the kernel cost as much as it does.

    Args:
        query: (B, 1, Hq, D) fp32, fp16 or bf16, after rotary embedding. D is 32, 64, 80, 96, 128, 192 or 256.
        key, value: (B, N, Hkv, D) of query's dtype, any strides with contiguous channels; or, with block_table,
            pages (P, page_size, Hkv, D). Written.
        new_key, new_value: (B, T, Hkv, D), any strides with contiguous channels. None, both: nothing is written.
        lens: (B,) int32, each row's tokens before the call. None: N - T, so that the new tokens are the last.
        leftpad: (B,) int32, where they begin. Default: 0.
        block_table: (B, max_blocks) int32, contiguous blocks: token n of row b is in page
            block_table[b, n // page_size], and N = max_blocks * page_size. page_size is a multiple of 16 from 16 to
            256. Pages that are written must belong to one row; entries past a row's tokens are not read.
        scale: of the logits. Default: D ** -0.5.
        mass: (B, Hkv, N) fp32 with contiguous tokens. Each valid token's probability, new ones included, mean over the
            query heads of its key head, is added to it.

    Returns:
        out: (B, 1, Hq, D) in query's dtype.
        lse: (B, Hq, 1) fp32, natural logarithm; see decode_attention, also for rows without a key.

    On CUDA no host value is taken from the device, and the call can be captured in a CUDA graph: two launches, one
    more with mass, one less without new tokens.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, stride, device or number does not fit. On the CPU also, before anything is written:
            0 <= lens, 0 <= leftpad <= lens + T or lens + T <= N does not hold, or the page of a token is outside
            [0, P). On CUDA these set the device error word (`lightvlm_ext.device_errors`): tokens without a place
            are left out, and the row has no valid token.
    """
    args = check_append(query, key, value, new_key, new_value, lens, leftpad, block_table, scale, mass)
    of_rows = (args.lens[0], args.leftpad[0], args.block_table[0])
    return _run(args.query, key, value, new_key, new_value, *of_rows, args.scale, mass)


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    new_key: torch.Tensor | None,
    new_value: torch.Tensor | None,
    lens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    scale: float,
    mass: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = results_of(query)
    tensors = (query, key, value, new_key, new_value, lens, leftpad, block_table, scale, out, lse, mass)
    op = _library.op("append_attend")
    if query.is_cpu and not _library.is_emulated():  # neither buffers nor an error word
        op(*tensors, None, None, None)
        return out, lse
    device = query.device
    _library.check_backend(device)
    sizes = DecodeArgs(query, scale, [key], [value], [0], [0], [lens], [leftpad], [block_table])
    if mass is not None:
        sizes.mass, sizes.mass_segment = [mass], [0]
    op(*tensors, *device_buffers("append_attend_", sizes))
    _errors.check_now("append_attend_", device)
    return out, lse


append_attend_checked = observed_as("append_attend_")(_run)
"""append_attend_ for callers that have checked their arguments, mass and all. The op itself checks what memory depends
on."""


@_library.register_fake("append_attend")
def _append_attend_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    new_key: torch.Tensor | None,
    new_value: torch.Tensor | None,
    lens: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    mass: torch.Tensor | None,
    workspace: torch.Tensor | None,
    ticket: torch.Tensor | None,
    error: torch.Tensor | None,
) -> None:
    return None
