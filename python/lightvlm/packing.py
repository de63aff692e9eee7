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
from .contract.cache import CachePart
from .contract.precision import PrecisionPart
from .host import lasting, upload
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
    if isinstance(cache, CachePart) and cache.evicts_prompt:
        if part.separates:
            raise ValueError(
                "plan.precision has low_bits for tokens of the prompt, from which plan.cache evicts; use one of the two"
            )
        if part.keep_text:
            raise ValueError(
                "plan.precision has keep_text, but which of the text is left is for plan.cache to choose; use one of "
                "the two"
            )
    if isinstance(cache, CachePart) and cache.evicts_generated:
        if cache.per_head:
            raise ValueError(
                "plan.cache evicts per head while decoding, and packed tokens are all heads' together; use "
                "per_head=False with plan.precision"
            )
        if not cache.wants_mass:
            raise ValueError(
                "plan.cache must score by the attention added up while decoding (score='mass') where plan.precision "
                "packs the cache: packed keys are not scored anew"
            )
        if type(cache).budget is CachePart.budget:
            raise ValueError(
                f"plan.cache, a {type(cache).__name__}, has no budget, which plan.precision needs"
            )
        if part.prompt_block is not None:
            raise ValueError(
                "plan.precision has prompt_block, and plan.cache evicts single tokens of the prompt while decoding, "
                "which would leave the others with scales that are not theirs; use one of the two"
            )
    if head_width not in PACKED_HEAD_DIMS:
        raise ValueError(
            f"model has heads of {head_width} channels; a packed cache needs {', '.join(map(str, PACKED_HEAD_DIMS))}"
        )


@lasting
def pack_prompt(
    layers: Sequence[CompactLayer],
    part: PrecisionPart,
    selections: dict[int, Selection] | None,
    drafts: int = 0,
    text: Sequence[list[list[int]]] | None = None,
    only: int | None = None,
) -> None:
    """Pack what stands between the sinks and the recent tokens of every row.

    Args:
        layers: all of a cache, just filled with a prompt; where ``only`` names a layer, that one.
        selections: layer -> tokens that attended; None, or a layer that is not there: all did. How many tokens get
            which bits is then for the device to know, and read from it once for all layers.
        drafts: so many of the last tokens count as recent in any case.
        text: for each layer and row the places in the buffer, ascending, of text, which stays in 16 bits; None: no
            text does.
    """
    if drafts > part.recent:
        part = dataclasses.replace(part, recent=drafts)  # type: ignore[type-var]
    _pack_middle(layers, part, selections, 1, text, only)


def _pack_middle(
    layers: Sequence[CompactLayer],
    part: PrecisionPart,
    selections: dict[int, Selection] | None,
    least: int,
    text: Sequence[list[list[int]]] | None = None,
    only: int | None = None,
) -> None:
    """:func:`pack_prompt`, of layers that are not packed yet and have so many tokens to pack in a row."""
    groups: dict[int, list[_Group]] = {}
    first: dict[int, list[list[int]]] = {}
    for index, layer in enumerate(layers):
        levels = part.levels(index, len(layers))
        if not levels or layer.packed is not None or only not in (None, index):
            continue
        middle = [max(0, end - start - part.sinks - part.recent) for start, end in _spans(layer)]
        if max(middle, default=0) < least:
            continue
        places = _places([start + part.sinks for start, _ in _spans(layer)], middle, layer.key_storage.device)
        first[index] = [list(range(start, min(start + part.sinks, end))) for start, end in _spans(layer)]
        if text is not None:
            places, middle = _without_text(layer, part, first[index], text[index])
        if len(levels) == 2 and selections is not None and index in selections:
            groups[index] = _told_apart(places, levels, selections[index])
        else:
            groups[index] = [_Group(levels[0], *places, middle)]
    asked = [group.count for own in groups.values() for group in own if group.on_host is None]
    answers = iter(torch.stack(asked).tolist() if asked else [])
    for index, own in groups.items():
        counts = [group.on_host if group.on_host is not None else next(answers) for group in own]
        _pack_layer(layers[index], part, first[index], own, counts)


def _without_text(
    layer: CompactLayer, part: PrecisionPart, kept: list[list[int]], text: list[list[int]]
) -> tuple[tuple[Tensor, Tensor], list[int]]:
    """Places between the sinks and the recent tokens that are not text, and how many; text joins the sinks in kept."""
    packed = []
    for (start, end), own, words in zip(_spans(layer), kept, text, strict=True):
        middle = range(start + part.sinks, end - part.recent)
        own += [at for at in words if at in middle]
        taken = set(own)
        packed.append([at for at in middle if at not in taken])
    return _listed(packed, layer.key_storage.device), list(map(len, packed))


def _told_apart(places: tuple[Tensor, Tensor], levels: tuple[int, ...], selection: Selection) -> list[_Group]:
    """Tokens at these places, index (B, M) and count (B,), by whether they were selected."""
    index, count = places
    width = index.shape[1]
    valid = torch.arange(width, device=index.device) < count[:, None]
    chosen = selection.inverse.gather(1, index.clamp_min(0).long()) >= 0
    nothing = torch.zeros(index.shape, device=index.device)
    found = []
    for bits, mine in zip(levels, (chosen, ~chosen), strict=True):
        own = ops.select(nothing, keep=width, candidates=valid & mine, capacity=width)
        at = torch.where(own.index >= 0, index.gather(1, own.index.clamp_min(0).long()), -1)
        found.append(_Group(bits, at, own.count))
    return found


def _pack_layer(
    layer: CompactLayer,
    part: PrecisionPart,
    kept: list[list[int]],
    groups: list[_Group],
    counts: list[list[int]],
) -> None:
    """Store a layer's tokens: those at ``kept`` places in 16 bits, the groups packed, the recent ones in the buffer."""
    spans, device = list(_spans(layer)), layer.key_storage.device
    sinks = [min(part.sinks, end - start) for start, end in spans]
    recent = [min(part.recent, end - start - first) for (start, end), first in zip(spans, sinks, strict=True)]
    store = PackedStore(len(spans))
    if any(kept):
        index, count = _listed(kept, device)
        store.sinks, store.sink_counts = (
            KVSegment(*_take(layer, index, count), lens=count.clone()),
            list(map(len, kept)),
        )
    for group, found in zip(groups, counts, strict=True):
        if max(found) > 0:
            places = group.index[:, : max(found)]
            key, value = _take(layer, places, group.count)
            packed = ops.quantize_kv(
                key, value, bits=group.bits, lens=group.count.clone(), block=part.prompt_block
            )
            store.prompt.append(PromptKV(packed, found, _take_mass(layer, places, group.count)))
    store.in_order = len(store.prompt) <= 1 and max(map(len, kept), default=0) <= part.sinks
    index, count = _places([end - last for (_, end), last in zip(spans, recent, strict=True)], recent, device)
    room = part.recent + part.interval + _SLACK
    index = torch.nn.functional.pad(index, (0, room - index.shape[1]), value=-1)
    layer.store(store, *_take(layer, index, count), recent)


@lasting
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
        room = layer.room_to_pack
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
    """Move rows of the buffers, and what they received, to the front: all layers in one launch.

    index: for each layer (B, M), or (B, Hkv, M) where heads keep tokens of their own.   count: for each (B,).
    """
    masses: list[list[Tensor]] = []
    counts = []
    for layer, at, number in zip(layers, index, count, strict=True):
        heads = at.shape[1] if at.dim() == 3 else 0
        counts.append(number[:, None].repeat(1, heads) if heads else number)
        # compact_kv_ reads (B, Hkv, N) first with an index per head, and (B, N, Hkv) first without
        received = layer.mass if heads or layer.mass is None else layer.mass.transpose(1, 2)
        masses.append([] if received is None else [received])
    ops.compact_kv_(
        [layer.key_storage for layer in layers],
        [layer.value_storage for layer in layers],
        index,
        counts,
        extras=masses,
    )


def _spans(layer: CompactLayer) -> list[tuple[int, int]]:
    return list(zip(layer.starts, layer.ends, strict=True))


def _places(first: list[int], counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Consecutive places from ``first`` on, index (B, M) and count (B,)."""
    both = upload([first, counts], device)
    at = torch.arange(max(counts), dtype=torch.int32, device=device)
    return torch.where(at < both[1][:, None], both[0][:, None] + at, -1).to(torch.int32), both[1]


def _listed(places: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Places that the host lists, index (B, M) and count (B,)."""
    width = max(map(len, places), default=0)
    index = upload([row + [-1] * (width - len(row)) for row in places], device)
    return index.view(len(places), width), upload([len(row) for row in places], device)


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
