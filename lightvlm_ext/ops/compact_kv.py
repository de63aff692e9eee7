"""compact_kv_: kept rows of a KV cache to the front, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _errors, _library
from .._compact_args import check_compact
from .._observe import observed


@observed
def compact_kv_(
    key_cache: torch.Tensor | Sequence[torch.Tensor],
    value_cache: torch.Tensor | Sequence[torch.Tensor],
    index: torch.Tensor | Sequence[torch.Tensor],
    count: torch.Tensor | Sequence[torch.Tensor],
    *,
    extras: Sequence[torch.Tensor] | Sequence[torch.Tensor | Sequence[torch.Tensor]] = (),
) -> None:
    """Moves the kept rows of keys and values to the front of their buffers, in place.

    Row j of a cache becomes its old row index[j], for j < count. Rows past count keep unspecified
    content. Addresses stay, and nothing of the cache's order of size is allocated, so the call can live in a
    CUDA graph. Lists of layers move in one launch (256 tensors at a time, a tensor being what has one
    run of bytes a row and head).

    Args:
        key_cache: (B, N, Hkv, D), any dtype and any strides, moved as bytes; (B, Hkv, N, D) storage comes as
            a transposed view. Or a list of such, one per layer; N, and all else, may differ by layer.
        value_cache: as key_cache; D may differ.
        index: (B, M) int32, or (B, Hkv, M) where each head keeps rows of its own. Strictly ascending
            up to count; what stands past count is not read. A list of such for lists of caches.
        count: (B,) int32, or (B, Hkv), in [0, M]. A list of such for lists of caches.
        extras: further tensors that move alike: (B, N, ...) or (B, Hkv, N, ...). With an index per head,
            (B, Hkv, N, ...) or (B, N, Hkv, ...). Where both readings fit the shape, the one named first
            counts. For lists of caches: one entry per layer, a tensor or a list of tensors.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape or device does not fit, or two tensors (or two positions of one, as in an
            expanded tensor) share memory; views that interleave in one buffer do not. On the CPU also: an
            index below count lies outside [0, N) or is not above the one before, or a count lies outside
            [0, M]. Nothing has moved then. On CUDA these set the device error word
            (`lightvlm_ext.device_errors`), and such an entry, or all of a row with such a count, does not move.
    """
    args = check_compact(key_cache, value_cache, index, count, extras)
    if not args.caches:
        return
    device = args.caches[0].device
    _library.check_backend(device)
    _library.op("compact_kv")(
        args.caches,
        args.layer,
        args.token_dim,
        args.index,
        args.count,
        _errors.error_word("compact_kv_", device),
    )
    _errors.check_now("compact_kv_", device)


@_library.register_fake("compact_kv")
def _compact_kv_fake(
    caches: list[torch.Tensor],
    layer: list[int],
    token_dim: list[int],
    index: list[torch.Tensor],
    count: list[torch.Tensor],
    error: torch.Tensor | None,
) -> None:
    return None
