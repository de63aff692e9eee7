"""Arguments of compact_kv_, checked and flattened, shared by the op and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from . import _checks


@dataclass
class CompactArgs:
    """What moves, and by which index.

    caches: every tensor that moves.   layer: for each, the position of its index and count.
    token_dim: for each, the dimension of its tokens, 1 or 2. With an index per head the other one of
    the two is the head's.   index, count: one for each layer.
    """

    caches: list[torch.Tensor] = field(default_factory=list)
    layer: list[int] = field(default_factory=list)
    token_dim: list[int] = field(default_factory=list)
    index: list[torch.Tensor] = field(default_factory=list)
    count: list[torch.Tensor] = field(default_factory=list)

    def add(self, cache: torch.Tensor, layer: int, token_dim: int) -> None:
        self.caches.append(cache)
        self.layer.append(layer)
        self.token_dim.append(token_dim)


def check_compact(
    key_cache: object, value_cache: object, index: object, count: object, extras: object
) -> CompactArgs:
    """Checks types, shapes, dtypes and devices; raises TypeError or ValueError naming the argument."""
    args = CompactArgs()
    if isinstance(key_cache, torch.Tensor):
        _add_layer(args, key_cache, value_cache, index, count, sequence(extras, "extras"), "")
        return args
    keys = sequence(key_cache, "key_cache")
    layers = len(keys)
    values = per_layer(value_cache, "value_cache", layers)
    indexes = per_layer(index, "index", layers)
    counts = per_layer(count, "count", layers)
    more = sequence(extras, "extras")
    if len(more) not in (0, layers):
        raise ValueError(
            f"extras: has {len(more)} entries, must have one for each of the {layers} layers, or none"
        )
    for layer in range(layers):
        of_layer = more[layer] if more else ()
        if not isinstance(of_layer, torch.Tensor):
            of_layer = sequence(of_layer, f"extras[{layer}]")
        else:
            of_layer = (of_layer,)
        _add_layer(args, keys[layer], values[layer], indexes[layer], counts[layer], of_layer, f"[{layer}]")
    return args


def sequence(value: object, name: str) -> Sequence[object]:
    """A list or tuple, or TypeError."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: got {type(value).__name__}, must be a tensor or a list or tuple of tensors")
    return value


def per_layer(value: object, name: str, layers: int, as_in: str = "key_cache") -> Sequence[object]:
    """One entry for each layer, or an error."""
    entries = sequence(value, name)
    if len(entries) != layers:
        raise ValueError(f"{name}: has {len(entries)} entries, must have {layers} as {as_in}")
    return entries


def _add_layer(
    args: CompactArgs,
    key_cache: object,
    value_cache: object,
    index: object,
    count: object,
    extras: Sequence[object],
    suffix: str,
) -> None:
    key_name, value_name = f"key_cache{suffix}", f"value_cache{suffix}"
    key = _checks.tensor(key_cache, key_name)
    value = _checks.tensor(value_cache, value_name)
    _checks.shape(key, key_name, ("B", "N", "Hkv", "D"))
    batch, tokens, heads = key.shape[:3]
    _checks.shape(value, value_name, (batch, tokens, heads, "D"))
    index = _checks.tensor(index, f"index{suffix}")
    count = _checks.tensor(count, f"count{suffix}")
    _checks.dtype(index, f"index{suffix}", torch.int32)
    _checks.dtype(count, f"count{suffix}", torch.int32)
    per_head = index.dim() == 3
    if per_head:
        _checks.shape(index, f"index{suffix}", (batch, heads, "M"))
        _checks.shape(count, f"count{suffix}", (batch, heads))
    else:
        _checks.shape(index, f"index{suffix}", (batch, "M"))
        _checks.shape(count, f"count{suffix}", (batch,))
    first = args.caches[0] if args.caches else key
    for tensor, name in (
        (key, key_name),
        (value, value_name),
        (index, f"index{suffix}"),
        (count, f"count{suffix}"),
    ):
        _checks.same_device(tensor, name, first, "the other arguments")
    layer = len(args.index)
    args.index.append(index if index.shape[-1] <= 1 or index.stride(-1) == 1 else index.contiguous())
    args.count.append(count)
    args.add(key, layer, 1)
    args.add(value, layer, 1)
    for i, extra in enumerate(extras):
        name = f"extras{suffix}[{i}]"
        extra = _checks.tensor(extra, name)
        _checks.same_device(extra, name, first, "the other arguments")
        args.add(extra, layer, _token_dim(extra, name, batch, tokens, heads, per_head))


def _token_dim(extra: torch.Tensor, name: str, batch: int, tokens: int, heads: int, per_head: bool) -> int:
    """Which dimension of an extra holds the tokens. Where both readings fit, an index per head means
    (B, Hkv, N, ...), and an index for all heads (B, N, ...)."""
    shape = tuple(extra.shape)
    if len(shape) >= 2 and shape[0] == batch:
        by_head = len(shape) >= 3 and shape[1:3] == (heads, tokens)
        if per_head:
            if by_head:
                return 2
            if len(shape) >= 3 and shape[1:3] == (tokens, heads):
                return 1
            raise ValueError(
                f"{name}: has shape {shape}, with an index per head it must be "
                f"({batch}, {heads}, {tokens}, ...) or ({batch}, {tokens}, {heads}, ...)"
            )
        if shape[1] == tokens:
            return 1
        if by_head:
            return 2
    raise ValueError(
        f"{name}: has shape {shape}, must be ({batch}, {tokens}, ...) or ({batch}, {heads}, {tokens}, ...)"
    )
