"""flash_attn_with_kvcache: append to a cache in place, and attend to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightvlm_ext import _checks

from . import arguments, cached, ops
from .arguments import Window
from .values import check_rows, no_room


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    importance_window: Window = None,
) -> Any:
    """Attention to a cache with flash-attn 2.8's arguments; new keys and values are first written into it, in place.

    Args:
        q: (B, Sq, Hq, D).   k_cache, v_cache: (B_cache, capacity, Hkv, D), contiguous channels; with block_table pages
            (P, page_size, Hkv, D), of any size (flash-attn itself wants a multiple of 256).
        k, v: (B, Snew, Hkv, D), written to tokens cache_seqlens[b] ... of row b. Then the row has
            cache_seqlens[b] + Snew keys.
        rotary_cos, rotary_sin: (at least the capacity, R / 2) in q's dtype, R a multiple of 16, at most D. k is
            rotated at its tokens' numbers; q at cache_seqlens + i if causal or windowed, at cache_seqlens otherwise.
            Only with k and v. rotary_interleaved: pairs are channels 2i, 2i + 1, else i, i + R / 2.
        cache_seqlens: keys before this call: an int for all rows, or (B,) int32. None: the cache is full; needed
            with k.
        cache_batch_idx: (B,) int32, which row of the cache is row b's; not with block_table. Default b.
        cache_leftpad: (B,) int32, where a row's keys begin; tokens before it are not looked at. Default 0.
        block_table: (B, max_blocks) int32: token n of row b is in page block_table[b, n // page_size].
        num_splits: how often to split the keys, 0 for the backend's own choice; a hint about speed that only
            flash-attn's own packages take.
        softmax_scale, causal, window_size, softcap, alibi_slopes, importance_window: as in :func:`flash_attn_func`,
            with Sk = cache_seqlens + Snew.

    Returns:
        out (B, Sq, Hq, D); a tuple that begins with it if more was asked for:
        softmax_lse (B, Hq, Sq) fp32 (return_softmax_lse);
        importance (B, capacity) fp32, with block_table (B, max_blocks * page_size), 0 outside a row's keys
        (importance_window). From rows named by cache_batch_idx or block_table it takes a copy of their keys.

    Raises:
        TypeError, ValueError: as :func:`flash_attn_func`. An int cache_seqlens, and on a CPU everything that tensors
        say, is checked before anything is written; on a GPU tokens beyond the capacity are left out.
    """
    arguments.check_heads(q, k_cache, v_cache, ("q", "k_cache", "v_cache"), "dense")
    arguments.check_forward_only(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    arguments.check_flags(rotary_interleaved=rotary_interleaved, return_softmax_lse=return_softmax_lse)
    splits = _checks.integer(num_splits, "num_splits", 0)
    batch, rows = q.shape[:2]
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        _checks.last_contiguous(k_cache, "k_cache")
        _checks.last_contiguous(v_cache, "v_cache")
    if block_table is not None:
        if isinstance(block_table, Tensor) and block_table.stride()[-1:] != (1,):
            block_table = block_table.contiguous()
        arguments.check_table(block_table, q, batch)
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx: must be None with block_table, which says where each row is")
    _check_ints(q, batch, cache_leftpad=cache_leftpad, cache_batch_idx=cache_batch_idx)
    if block_table is None and cache_batch_idx is None and k_cache.shape[0] < batch:
        raise ValueError(f"k_cache: has {k_cache.shape[0]} rows, must have at least q's {batch}")
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    new = _new_tokens(q, k_cache, k, v)
    if new:
        _checks.writable(k_cache, "k_cache")
        _checks.writable(v_cache, "v_cache")
    _check_rotary(q, capacity, rotary_cos, rotary_sin, given=k is not None)
    lens = _lengths(cache_seqlens, q, batch, new, capacity)
    shape = arguments.shape_of_logits(
        q,
        batch,
        rows,
        capacity,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    probes = arguments.probes_of(importance_window, q, batch)
    check_rows(None if probes is None else probes.rows, rows)
    # flash-attn takes a window that is wider than the cache for none
    at_once = not causal and not any(0 <= side < capacity for side in window_size)
    out, lse, rotated = cached.attend(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        bool(rotary_interleaved),
        at_once,
        probes is not None,
        bool(return_softmax_lse) or probes is not None,
        lens,
        cache_leftpad,
        cache_batch_idx,
        block_table,
        splits,
        capacity,
        *shape,
    )
    if probes is None:
        return (out, lse) if return_softmax_lse else out
    scores = ops.importance(
        q if rotary_cos is None else rotated,
        k_cache,
        lse,
        probes,
        rows,
        capacity,
        shape,
        lens=None if lens is None else lens + new,
        leftpad=cache_leftpad,
        batch_idx=cache_batch_idx,
        block_table=block_table,
    )
    return (out, lse, scores) if return_softmax_lse else (out, scores)


def _new_tokens(q: Tensor, k_cache: Tensor, k: Tensor | None, v: Tensor | None) -> int:
    """How many tokens k and v bring."""
    if (k is None) != (v is None):
        missing = "k" if k is None else "v"
        raise ValueError(f"{missing}: is None, must be given where the other of k and v is")
    if k is None or v is None:
        return 0
    if not _fits(q, k_cache, k, v):
        new = k.shape[1] if _checks.tensor(k, "k").dim() == 4 else "Snew"
        for tensor, name in ((k, "k"), (v, "v")):
            _checks.dtype(_checks.tensor(tensor, name), name, q.dtype)
            _checks.same_device(tensor, name, q, "q")
            _checks.shape(tensor, name, (q.shape[0], new, *k_cache.shape[2:]))
    return k.shape[1]


def _fits(q: Tensor, k_cache: Tensor, k: object, v: object) -> bool:
    """What _new_tokens goes through one by one, as quickly as it can be asked: decoding asks at every token."""
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    shape = k.shape
    sizes = len(shape) == 4 and v.shape == shape and shape[0] == q.shape[0] and shape[2:] == k_cache.shape[2:]
    return sizes and k.dtype == v.dtype == q.dtype and k.device == v.device == q.device


def _check_rotary(q: Tensor, capacity: int, cos: Tensor | None, sin: Tensor | None, *, given: bool) -> None:
    if (cos is None) != (sin is None):
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"{missing}: is None, must be given where the other of rotary_cos and rotary_sin is")
    if cos is None:
        return
    if not given:
        raise ValueError(
            "rotary_cos: must be None without k and v: queries are rotated together with new keys"
        )
    for table, name in ((cos, "rotary_cos"), (sin, "rotary_sin")):
        found = _checks.tensor(table, name)
        _checks.dtype(found, name, q.dtype)
        _checks.shape(found, name, ("positions", "R / 2"))
        _checks.same_device(found, name, q, "q")
        if found.shape[1] < 1 or found.shape[1] % 8 or 2 * found.shape[1] > q.shape[3]:
            raise ValueError(
                f"{name}: rotates {2 * found.shape[1]} channels, must be a multiple of 16, at most {q.shape[3]}"
            )
        if found.shape[0] < capacity:
            raise ValueError(
                f"{name}: has {found.shape[0]} positions, must have at least {capacity}, the cache's capacity"
            )
    _checks.shape(_checks.tensor(sin, "rotary_sin"), "rotary_sin", tuple(cos.shape))


def _lengths(seqlens: object, q: Tensor, batch: int, new: int, capacity: int) -> Tensor | None:
    """(B,) int32 keys of each row before the call; None: all of the cache."""
    if seqlens is None:
        if new:
            raise ValueError("cache_seqlens: is None, must say where k and v are to be written")
        return None
    if not isinstance(seqlens, Tensor):
        length = _checks.integer(seqlens, "cache_seqlens", 0)
        if length + new > capacity:
            raise ValueError(no_room(f"got {length}", new, capacity))
        return torch.full((batch,), length, dtype=torch.int32, device=q.device)
    if seqlens.dtype != torch.int32 or seqlens.shape != (batch,) or seqlens.device != q.device:
        _check_ints(q, batch, cache_seqlens=seqlens)
    return seqlens


def _check_ints(q: Tensor, batch: int, **values: object) -> None:
    """Each is None, or (B,) int32 on q's device."""
    for name, value in values.items():
        if value is not None:
            tensor = _checks.tensor(value, name)
            _checks.dtype(tensor, name, torch.int32)
            _checks.shape(tensor, name, (batch,))
            _checks.same_device(tensor, name, q, "q")
