"""Compaction of packed layers: tokens beyond the budget are dropped in place, or demoted to 2 bits.

Tokens of the prompt share one block of channel scales and go one by one. Generated tokens share scales by 64, and go by
whole blocks, by the mean of what their tokens received; a block stays where the budget has room for a part of it. Sinks
and recent tokens of the precision part always stay, whatever the policy calls its own. What is demoted goes in whole
blocks, too, those tokens of the prompt first that received least, and then no longer counts towards the budget.

Blocks are the same number in every row, and so are tokens of the prompt that are demoted. Where rows differ, the row
that keeps most decides for all, so that a row may keep more than it would alone. So may a row that alone is too short
to be packed, as its layer is packed with the others' and its buffer counts as recent. These are the cases in which a
batch is not the same as one by one. Tokens of the prompt that are dropped are each row's own affair.

How many tokens of which segment stay is for the device to know: it is asked once, for all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext.ops import PackedKV

from .cache_layer import CompactLayer
from .contract.cache import CachePart
from .host import lasting, upload
from .packed_store import BLOCK, GrowingKV, PackedStore, PromptKV

DEMOTED_BITS = 2
"""Bits of a token that lost its place but is not dropped."""


@lasting
def evict_packed(layers: Sequence[CompactLayer], policy: CachePart, leftpad: list[int]) -> bool:
    """Bring packed layers down to the policy's budget, by the attention that each token has received.

    Returns whether one had to give anything up.
    """
    choices = [choice for layer in layers if (choice := _choose(layer, policy, leftpad)) is not None]
    asked = [count for choice in choices for count in choice.counts]
    answers = iter(torch.stack(asked).tolist() if asked else [])
    moves, evicted = _Moves(), False
    for choice in choices:
        store, demotes = choice.layer.packed, policy.demotes
        assert store is not None
        lost = [
            _take_out_tokens(store, one, kept, next(answers), demotes, moves)
            for one, kept, _ in choice.prompts
        ]
        lost += [
            _take_out_blocks(store, one, max(next(answers)), demotes, moves) for one, _, _ in choice.blocks
        ]
        if any(lost):
            evicted, store.in_order = True, False
            choice.layer.dropped = choice.layer.dropped or not demotes
    moves.run()
    return evicted


@dataclass
class _Choice:
    """What a layer keeps. prompts: with the (B, N) mask of tokens that stay.   blocks: with (B, T), likewise.   Both
    with how many these are (B,), on the device."""

    layer: CompactLayer
    prompts: list[tuple[PromptKV, Tensor, Tensor]]
    blocks: list[tuple[GrowingKV, Tensor, Tensor]]

    @property
    def counts(self) -> list[Tensor]:
        return [count for _, _, count in (*self.prompts, *self.blocks)]


def _choose(layer: CompactLayer, policy: CachePart, leftpad: list[int]) -> _Choice | None:
    """Tokens of the packed segments of a layer that the budget has room for; None where that is all of them."""
    store = layer.packed
    assert store is not None
    prompts = [one for one in store.prompt if max(one.counts) > 0 and _loses(one.packed, policy)]
    grown = [
        one for one in store.generated.values() if one.used and one.packed and _loses(one.packed, policy)
    ]
    held = [sum(counts) for counts in zip(*(one.counts for one in prompts), strict=True)] or [0] * store.batch
    held = [count + sum(one.used for one in grown) for count in held]
    sinks = store.sink_counts or [0] * store.batch
    taken = [sink + end - start for sink, start, end in zip(sinks, layer.starts, layer.ends, strict=True)]
    free = [
        max(0, policy.budget(layer.seen - pad) - others)
        for pad, others in zip(leftpad or [0] * store.batch, taken, strict=True)
    ]
    if all(count <= room for count, room in zip(held, free, strict=True)):
        return None
    device, scores, valid = layer.key_storage.device, [], []
    for prompt in prompts:
        assert prompt.mass is not None
        assert prompt.packed.lens is not None
        scores.append(prompt.mass.mean(dim=1))
        valid.append(torch.arange(prompt.packed.tokens, device=device) < prompt.packed.lens[:, None])
    for storage in grown:
        means = _block_means(storage)
        scores.append(means.repeat_interleave(BLOCK, dim=1))
        valid.append(torch.ones_like(scores[-1], dtype=torch.bool))
    every = torch.cat(scores, dim=1)
    chosen = ops.select(
        every, keep=upload(free, device), candidates=torch.cat(valid, dim=1), capacity=every.shape[1]
    )
    parts = iter((chosen.inverse >= 0).split([one.shape[1] for one in scores], dim=1))
    of_prompts = [(prompt, next(parts)) for prompt in prompts]
    of_blocks = [(storage, next(parts).unflatten(1, (-1, BLOCK)).any(dim=2)) for storage in grown]
    return _Choice(
        layer,
        [(one, mask, mask.sum(dim=1)) for one, mask in of_prompts],
        [(one, mask, mask.sum(dim=1)) for one, mask in of_blocks],
    )


def _loses(packed: PackedKV, policy: CachePart) -> bool:
    """Whether tokens of a segment have anything to lose: those of the fewest bits cannot be demoted."""
    return not policy.demotes or packed.bits > DEMOTED_BITS


def _block_means(storage: GrowingKV) -> Tensor:
    """What a token of each block received, mean over its tokens and the heads, (B, T)."""
    assert storage.mass is not None
    return storage.mass[:, :, : storage.used].unflatten(2, (-1, BLOCK)).mean(dim=(1, 3))


@dataclass
class _Moves:
    """Rows that go to the front of their tensors, for one launch a kind of row."""

    caches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    extras: list[list[Tensor]] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)
    count: list[Tensor] = field(default_factory=list)
    lengths: list[tuple[GrowingKV, int]] = field(default_factory=list)

    def add(self, cache: tuple[Tensor, Tensor], extras: list[Tensor], index: Tensor, count: Tensor) -> None:
        """All tensors (B, Hkv, N, ...)."""
        first, second = (x.transpose(1, 2) for x in cache)
        self.caches.append((first, second))
        self.extras.append([x.transpose(1, 2) for x in extras])
        self.index.append(index)
        self.count.append(count)

    def run(self) -> None:
        if self.caches:
            keys, values = map(list, zip(*self.caches, strict=True))
            ops.compact_kv_(keys, values, self.index, self.count, extras=self.extras)
        for storage, tokens in self.lengths:
            storage.keep(tokens)


def _take_out_tokens(
    store: PackedStore, prompt: PromptKV, kept: Tensor, counts: list[int], demotes: bool, moves: _Moves
) -> bool:
    """Leave the kept tokens of a segment of the prompt; what is demoted comes in whole blocks, the least first.

    Returns whether there was anything to take out."""
    packed = prompt.packed
    assert packed.lens is not None
    if demotes:
        gone = min(had - stay for had, stay in zip(prompt.counts, counts, strict=True)) // BLOCK * BLOCK
        if gone == 0:
            return False
        assert prompt.mass is not None
        valid = torch.arange(packed.tokens, device=kept.device) < packed.lens[:, None]
        least = ops.select(-prompt.mass.mean(dim=1), keep=gone, candidates=valid, capacity=gone)
        _demote(store, _rows(packed, least.index, None), prompt.mass, least.index)
        kept, counts = valid & (least.inverse < 0), [count - gone for count in prompt.counts]
    if counts == prompt.counts:
        return False
    stay = ops.select(
        torch.zeros(kept.shape, device=kept.device),
        keep=packed.tokens,
        candidates=kept,
        capacity=packed.tokens,
    )
    moves.add((packed.key_codes, packed.value_codes), _by_token(packed, prompt.mass), stay.index, stay.count)
    packed.lens.copy_(stay.count)
    prompt.counts = counts
    return True


def _take_out_blocks(
    store: PackedStore, storage: GrowingKV, blocks: int, demotes: bool, moves: _Moves
) -> bool:
    """Leave so many blocks of generated tokens, those that received most; whether these are not all."""
    packed, means = storage.packed, _block_means(storage)
    assert packed is not None
    batch, total = means.shape
    if blocks == total:
        return False
    stay = ops.select(means, keep=blocks, capacity=max(blocks, 1))
    if demotes:
        assert storage.mass is not None
        others = ops.select(means, keep=total - blocks, candidates=stay.inverse < 0, capacity=total - blocks)
        tokens = _tokens_of(others.index)
        _demote(store, _rows(packed, tokens, others.index), storage.mass, tokens)
    if blocks:
        tokens = _tokens_of(stay.index)
        count = torch.full((batch,), blocks * BLOCK, dtype=torch.int32, device=means.device)
        moves.add((packed.key_codes, packed.value_codes), _by_token(packed, storage.mass), tokens, count)
        moves.add((packed.key_scale, packed.key_zero), [packed.value_channel], stay.index, stay.count)
    moves.lengths.append((storage, blocks * BLOCK))
    return True


def _by_token(packed: PackedKV, mass: Tensor | None) -> list[Tensor]:
    """What moves along with codes."""
    return [packed.value_token, *([] if mass is None else [mass])]


def _tokens_of(blocks: Tensor) -> Tensor:
    """Places (B, 64 M) of the tokens of blocks (B, M)."""
    within = torch.arange(BLOCK, dtype=torch.int32, device=blocks.device)
    return (blocks[:, :, None] * BLOCK + within).flatten(1)


def _rows(packed: PackedKV, tokens: Tensor, blocks: Tensor | None) -> PackedKV:
    """The tokens (B, M) of a segment as one of their own; blocks (B, T): theirs, None where all have one."""

    def rows(x: Tensor, index: Tensor) -> Tensor:
        every = torch.full((index.shape[0],), index.shape[1], dtype=torch.int32, device=index.device)
        taken: Tensor = ops.gather_tokens(x.transpose(1, 2), index, every)
        return taken.transpose(1, 2)

    names = ("key_codes", "value_codes", "value_token")
    changed: dict[str, Any] = {name: rows(getattr(packed, name), tokens) for name in names}
    if blocks is None:
        changed["block"] = max(1, tokens.shape[1])
    else:
        for name in ("key_scale", "key_zero", "value_channel"):
            changed[name] = rows(getattr(packed, name), blocks).contiguous()
    return dataclasses.replace(packed, lens=None, **changed)


def _demote(store: PackedStore, tokens: PackedKV, mass: Tensor, places: Tensor) -> None:
    """Store tokens once more, in the fewest bits."""
    key, value = ops.dequantize_kv(tokens, torch.float32)
    received = mass.gather(2, places[:, None].expand(-1, mass.shape[1], -1).long())
    store.append(key, value, DEMOTED_BITS, received)
