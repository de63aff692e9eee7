"""When tokens of a cache leave its 16-bit buffers: the prompt once it is read, generated tokens as they become old.

The rows of a batch are packed together: a layer once one of them is long enough, generated tokens once each row has
enough of them behind its sinks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext._kv import PACKED_HEAD_DIMS
from lightvlm_ext.ops import KVSegment, Selection

from .cache_layer import CompactLayer
from .host import upload
from .methods.base import CachePart, PrecisionPart
from .packed_store import BLOCK, PackedStore, PromptKV
from .plan import Plan

_SLACK = 16
"""Rows of a buffer beyond those that wait to be packed: tokens that assisted decoding adds at once."""


@dataclass(frozen=True)
class _Group:
    """Tokens of a layer that get the same bits: index (B, M), their places in the buffer, and count (B,), int32.

    on_host: the counts, where the host knows them.
    """

    bits: int
    index: Tensor
    count: Tensor
    on_host: list[int] | None = None


def check_storage(plan: Plan | None, head_width: int) -> None:
    """Raise a ValueError unless a cache of heads of that width can be stored as the plan says."""
    cache, part = (plan.cache, plan.precision) if plan is not None else (None, None)
    if isinstance(cache, CachePart) and cache.demotes and part is None:
        raise ValueError(
            "plan.cache demotes tokens (others='demote'), which needs a precision part that packs them"
        )
    if part is None:
        return
    if not isinstance(part, PrecisionPart):
        raise ValueError(f"plan.precision is a {type(part).__name__}, which this version does not know")
    if isinstance(cache, CachePart):
        if not cache.wants_mass:
            raise ValueError(
                "plan.cache must score by the attention added up while decoding (score='mass') where plan.precision "
                "packs the cache: packed keys are not scored anew"
            )
        if type(cache).budget is CachePart.budget:
            raise ValueError(
                f"plan.cache, a {type(cache).__name__}, has no budget, which plan.precision needs"
            )
    if head_width not in PACKED_HEAD_DIMS:
        raise ValueError(
            f"model has heads of {head_width} channels; a packed cache needs {', '.join(map(str, PACKED_HEAD_DIMS))}"
        )


def pack_prompt(
    layers: Sequence[CompactLayer],
    part: PrecisionPart,
    selections: dict[int, Selection] | None,
    drafts: int = 0,
) -> None:
    """Pack what stands between the sinks and the recent tokens of every row.

    Args:
        layers: all of a cache, just filled with a prompt.
        selections: layer -> tokens that attended; None: all did. How many tokens get which bits is then for the
            device to know, and read from it once for all layers.
        drafts: so many of the last tokens count as recent in any case.
    """
    if drafts > part.recent:
        part = dataclasses.replace(part, recent=drafts)  # type: ignore[type-var]
    _pack_middle(layers, part, selections, 1)


def _pack_middle(
    layers: Sequence[CompactLayer], part: PrecisionPart, selections: dict[int, Selection] | None, least: int
) -> None:
    """:func:`pack_prompt`, of layers that are not packed yet and have so many tokens to pack in a row."""
    groups: dict[int, list[_Group]] = {}
    for index, layer in enumerate(layers):
        levels = part.levels(index, len(layers))
        middle = [max(0, end - start - part.sinks - part.recent) for start, end in _spans(layer)]
        if not levels or layer.packed is not None or max(middle, default=0) < least:
            continue
        if len(levels) == 2 and selections is not None:
            groups[index] = _told_apart(layer, part, levels, selections[index])
        else:
            first = [start + part.sinks for start, _ in _spans(layer)]
            groups[index] = [_Group(levels[0], *_places(first, middle, layer.key_storage.device), middle)]
    asked = [group.count for own in groups.values() for group in own if group.on_host is None]
    answers = iter(torch.stack(asked).tolist() if asked else [])
    for index, own in groups.items():
        counts = [group.on_host if group.on_host is not None else next(answers) for group in own]
        _pack_layer(layers[index], part, own, counts)


def _told_apart(
    layer: CompactLayer, part: PrecisionPart, levels: tuple[int, ...], selection: Selection
) -> list[_Group]:
    start, end = layer.bounds()
    length = selection.inverse.shape[1]
    at = torch.arange(length, device=start.device)
    middle = (at >= start[:, None] + part.sinks) & (at < end[:, None] - part.recent)
    chosen = selection.inverse >= 0
    nothing = torch.zeros(chosen.shape, device=start.device)
    found = []
    for bits, mine in zip(levels, (chosen, ~chosen), strict=True):
        tokens = ops.select(nothing, keep=length, candidates=middle & mine, capacity=length)
        found.append(_Group(bits, tokens.index, tokens.count))
    return found


def _pack_layer(
    layer: CompactLayer, part: PrecisionPart, groups: list[_Group], counts: list[list[int]]
) -> None:
    spans, device = list(_spans(layer)), layer.key_storage.device
    sinks = [min(part.sinks, end - start) for start, end in spans]
    recent = [min(part.recent, end - start - first) for (start, end), first in zip(spans, sinks, strict=True)]
    store = PackedStore(len(spans))
    if max(sinks) > 0:
        index, count = _places([start for start, _ in spans], sinks, device)
        store.sinks, store.sink_counts = KVSegment(*_take(layer, index, count), lens=count.clone()), sinks
    for group, found in zip(groups, counts, strict=True):
        if max(found) > 0:
            places = group.index[:, : max(found)]
            key, value = _take(layer, places, group.count)
            packed = ops.quantize_kv(key, value, bits=group.bits, lens=group.count.clone())
            store.prompt.append(PromptKV(packed, found, _take_mass(layer, places, group.count)))
    store.in_order = len(store.prompt) <= 1
    index, count = _places([end - last for (_, end), last in zip(spans, recent, strict=True)], recent, device)
    room = part.recent + part.interval + _SLACK
    index = torch.nn.functional.pad(index, (0, room - index.shape[1]), value=-1)
    layer.store(store, *_take(layer, index, count), recent)


def pack_generated(layers: Sequence[CompactLayer], part: PrecisionPart) -> None:
    """Pack the oldest ``interval`` tokens of the buffers as long as so many stand before the recent ones."""
    _pack_middle(layers, part, None, part.interval)  # of prompts too short to be packed when they were read
    while ready := [
        (index, layer)
        for index, layer in enumerate(layers)
        if layer.packed is not None
        and min(end - start for start, end in _spans(layer)) >= part.recent + part.interval
    ]:
        _pack_oldest(layers, part, ready)


def _pack_oldest(
    layers: Sequence[CompactLayer], part: PrecisionPart, ready: list[tuple[int, CompactLayer]]
) -> None:
    """Pack the oldest ``interval`` tokens of these layers, with their numbers."""
    taken, masses, scores = {}, {}, {}
    for index, layer in ready:
        starts, device = [start for start, _ in _spans(layer)], layer.key_storage.device
        places = _places(starts, [part.interval] * len(starts), device)
        taken[index], masses[index] = _take(layer, *places), _take_mass(layer, *places)
        if len(part.levels(index, len(layers))) == 2 and layer.recent_queries().shape[1]:
            scores[index] = ops.importance(
                layer.recent_queries()[:, -1:], taken[index][0], scale=layer.scale, causal=False, rows="sum"
            )
    important = {}
    if scores:
        found = torch.stack([part.important(one) for one in scores.values()]).amax(dim=1).tolist()
        # Whole blocks, so that the others are whole blocks too.
        important = {index: -(-count // BLOCK) * BLOCK for index, count in zip(scores, found, strict=True)}
    for index, layer in ready:
        assert layer.packed is not None
        levels, (key, value), mass = part.levels(index, len(layers)), taken[index], masses[index]
        high = important.get(index, part.interval)
        room = max(0, layer.capacity - layer.packed.counts[0]) if layer.capacity is not None else 0
        if high == part.interval:
            layer.packed.append(key, value, levels[0], mass, room)
            continue
        chosen = ops.select(scores[index], keep=high)
        others = ops.select(scores[index], keep=part.interval - high, candidates=chosen.inverse < 0)
        for bits, tokens in zip(levels, (chosen, others), strict=True):
            own_key, own_value = ops.gather_tokens([key, value], tokens.index, tokens.count)
            own_mass = _gather_mass(mass, tokens.index, tokens.count)
            layer.packed.append(own_key, own_value, bits, own_mass, room)
    _move_to_front([layer for _, layer in ready], part.interval)


def _move_to_front(layers: list[CompactLayer], gone: int) -> None:
    """Drop the first ``gone`` tokens of the buffers, in one launch."""
    places, ends = [], []
    for layer in layers:
        left = [end - start - gone for start, end in _spans(layer)]
        places.append(_places([start + gone for start, _ in _spans(layer)], left, layer.key_storage.device))
        ends.append(left)
    move_rows(layers, [index for index, _ in places], [count for _, count in places])
    for layer, left in zip(layers, ends, strict=True):
        layer.compacted(left, min(left))


def move_rows(layers: Sequence[CompactLayer], index: list[Tensor], count: list[Tensor]) -> None:
    """Move rows of the buffers, and what they received, to the front: all layers in one launch."""
    ops.compact_kv_(
        [layer.key_storage for layer in layers],
        [layer.value_storage for layer in layers],
        index,
        count,
        extras=[[] if layer.mass is None else [layer.mass.transpose(1, 2)] for layer in layers],
    )


def _spans(layer: CompactLayer) -> list[tuple[int, int]]:
    return list(zip(layer.starts, layer.ends, strict=True))


def _places(first: list[int], counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Consecutive places from ``first`` on, index (B, M) and count (B,)."""
    both = upload([first, counts], device)
    at = torch.arange(max(counts), dtype=torch.int32, device=device)
    return torch.where(at < both[1][:, None], both[0][:, None] + at, -1).to(torch.int32), both[1]


def _take(layer: CompactLayer, index: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, M, Hkv, D) at these places; zeros past the count."""
    key, value = ops.gather_tokens([layer.key_storage, layer.value_storage], index, count)
    return key, value


def _take_mass(layer: CompactLayer, index: Tensor, count: Tensor) -> Tensor | None:
    """What the tokens at these places received, (B, Hkv, M)."""
    return _gather_mass(layer.mass, index, count)


def _gather_mass(mass: Tensor | None, index: Tensor, count: Tensor) -> Tensor | None:
    """mass (B, Hkv, N) at these places; zeros past the count."""
    if mass is None:
        return None
    taken: Tensor = ops.gather_tokens(mass.transpose(1, 2), index, count)
    return taken.transpose(1, 2).contiguous()
