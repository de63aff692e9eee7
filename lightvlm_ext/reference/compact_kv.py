"""Plain-torch reference of the ``compact_kv_`` op."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def compact_kv_(
    key_cache: Tensor | Sequence[Tensor],
    value_cache: Tensor | Sequence[Tensor],
    index: Tensor | Sequence[Tensor],
    count: Tensor | Sequence[Tensor],
    *,
    extras: Sequence[Tensor] | Sequence[Sequence[Tensor]] = (),
) -> None:
    """See :func:`lightvlm_ext.ops.compact_kv_`."""
    if isinstance(key_cache, Tensor):
        for cache in (key_cache, value_cache, *extras):
            _compact(cache, index, count, heads=index.dim() == 3)  # type: ignore[arg-type,union-attr]
        return
    for layer in range(len(key_cache)):
        more = extras[layer] if extras else ()
        compact_kv_(key_cache[layer], value_cache[layer], index[layer], count[layer], extras=more)  # type: ignore[arg-type]


def _compact(cache: Tensor, index: Tensor, count: Tensor, heads: bool) -> None:
    """Move the rows of one tensor: (B, N, Hkv, D) or an extra (B, N, ...); per head where the index has heads."""
    for b in range(cache.shape[0]):
        if not heads:
            kept = index[b, : int(count[b])].long()
            cache[b, : len(kept)] = cache[b, kept]
            continue
        for h in range(index.shape[1]):
            kept = index[b, h, : int(count[b, h])].long()
            rows = cache[b, :, h] if cache.dim() == 4 else cache[b, h]
            rows[: len(kept)] = rows[kept]
