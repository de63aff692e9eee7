"""compact_kv_, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._compact_args import check_compact


def compact_kv_(
    key_cache: torch.Tensor | Sequence[torch.Tensor],
    value_cache: torch.Tensor | Sequence[torch.Tensor],
    index: torch.Tensor | Sequence[torch.Tensor],
    count: torch.Tensor | Sequence[torch.Tensor],
    *,
    extras: Sequence[torch.Tensor] | Sequence[torch.Tensor | Sequence[torch.Tensor]] = (),
) -> None:
    """As `lightvlm_ext.ops.compact_kv_`, but it makes copies on the way. Raises on every device."""
    args = check_compact(key_cache, value_cache, index, count, extras)
    check_disjoint(args.caches, [*args.index, *args.count])
    tokens = {
        layer: cache.shape[dim]
        for cache, layer, dim in zip(args.caches, args.layer, args.token_dim, strict=True)
    }
    for layer, (kept, counts) in enumerate(zip(args.index, args.count, strict=True)):
        check_index(kept, counts, tokens[layer])
    for cache, layer, dim in zip(args.caches, args.layer, args.token_dim, strict=True):
        _compact(cache, dim, args.index[layer], args.count[layer])


def _compact(cache: torch.Tensor, token_dim: int, index: torch.Tensor, count: torch.Tensor) -> None:
    rows = cache.transpose(
        1, token_dim
    )  # tokens second: (B, N, ...); with an index per head (B, N, Hkv, ...)
    for b in range(cache.shape[0]):
        if index.dim() == 2:
            kept = index[b, : int(count[b])].long()
            rows[b, : len(kept)] = rows[b, kept]
            continue
        for h in range(index.shape[1]):
            kept = index[b, h, : int(count[b, h])].long()
            rows[b, : len(kept), h] = rows[b, kept, h]


def check_index(index: torch.Tensor, count: torch.Tensor, tokens: int) -> None:
    """Raises unless counts fit, and entries below them lie in [0, tokens) and ascend."""
    slots = index.shape[-1]
    if bool(((count < 0) | (count > slots)).any()):
        raise ValueError(f"count: a value lies outside [0, {slots}]")
    read = torch.arange(slots, device=index.device) < count[..., None]
    if bool((read & ((index < 0) | (index >= tokens))).any()):
        raise ValueError(f"index: an entry lies outside [0, {tokens})")
    if bool((read[..., 1:] & (index[..., 1:] <= index[..., :-1])).any()):
        raise ValueError("index: entries must be strictly ascending up to count")


def check_disjoint(moving: list[torch.Tensor], read: list[torch.Tensor]) -> None:
    """Lists every byte's address: exact, and only for tests' sizes."""
    moves = torch.cat([_addresses(tensor) for tensor in moving]) if moving else torch.empty(0)
    reads = [_addresses(tensor).unique() for tensor in read]
    shared = len(moves) != len(moves.unique()) or any(bool(torch.isin(r, moves).any()) for r in reads)
    if shared:
        raise ValueError("key_cache, value_cache, extras: share memory, must be disjoint")


def _addresses(tensor: torch.Tensor) -> torch.Tensor:
    address = torch.arange(tensor.element_size()) + tensor.data_ptr()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        address = address[..., None] + torch.arange(size) * (stride * tensor.element_size())
    return address.flatten()
