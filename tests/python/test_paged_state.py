"""PagedCompactCache against a model of it in plain lists: whatever is done to whichever cache, all of them hold what
they should, no page is written that another uses, and the pool counts what the tables say."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from lightvlm import KVPages, PagedCompactCache, Plan
from lightvlm.methods.decode_compaction import DecodeCompaction
from lightvlm.paged_layer import PagedLayer
from torch import Tensor
from transformers import LlamaConfig

from lightvlm_ext import OutOfPages

LAYERS, HEADS, WIDTH = 3, 2, 4
MOST = 4
"""Caches at a time."""
CONFIG = LlamaConfig(
    hidden_size=16, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=WIDTH, num_hidden_layers=LAYERS
)


class FakeRun:
    """An attached model that is being called, as far as a cache asks for one."""

    def reads(self, cache: PagedCompactCache) -> bool:
        return True

    def writes(self, *args: object) -> bool:
        return False


class Mirror:
    """What a cache should hold: rows[layer][row], a list of tokens (key, value, received), each (Hkv, ...)."""

    def __init__(self, cache: PagedCompactCache, attached: bool) -> None:
        self.cache, self.attached = cache, attached
        self.rows: list[list[list[list[Tensor]]]] = [[] for _ in range(LAYERS)]
        self.seen = 0

    def copy(self, cache: PagedCompactCache) -> Mirror:
        other = Mirror(cache, self.attached)
        other.rows = [[[list(token) for token in row] for row in layer] for layer in self.rows]
        other.seen = self.seen
        return other

    def clear(self) -> None:
        self.rows, self.seen = [[] for _ in range(LAYERS)], 0

    @property
    def batch(self) -> int:
        return len(self.rows[0])


class Caches(RuleBasedStateMachine):
    """Several caches over one KVPages."""

    caches = Bundle("caches")
    dtype, page_size, number = torch.float32, 16, 48

    def __init__(self) -> None:
        super().__init__()
        self.pages = KVPages(CONFIG, pages=self.number, page_size=self.page_size, dtype=self.dtype)
        self.pages.key_pages.fill_(float("nan"))  # what nobody wrote must never be seen
        self.pages.value_pages.fill_(float("nan"))
        self.alive: list[Mirror] = []
        self.run = FakeRun()
        self.random = torch.Generator().manual_seed(0)

    def states(self, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        key, value = torch.randn(2, batch, HEADS, tokens, WIDTH, generator=self.random).to(self.dtype)
        return key, value

    def everything(self) -> Any:
        """What a call that raises must leave alone."""
        tables = [[row[:] for row in layer.blocks.rows] for m in self.alive for layer in m.cache.layers]
        lengths = [(layer.starts, layer.ends, layer.seen) for m in self.alive for layer in m.cache.layers]
        return self.pages.pool.refcounts(), tables, lengths

    # -- making and dropping

    @initialize(target=caches)
    def first(self) -> Mirror:
        return self.make(True)

    @rule(target=caches, attached=st.sampled_from([True, True, False]))
    def another(self, attached: bool) -> Any:
        return self.make(attached) if len(self.alive) < MOST else multiple()

    def make(self, attached: bool) -> Mirror:
        plan = Plan(cache=DecodeCompaction()) if attached else Plan()
        self.alive.append(Mirror(PagedCompactCache(CONFIG, plan, pages=self.pages), attached))
        return self.alive[-1]

    @rule(target=caches, mirror=caches, data=st.data(), deep=st.booleans())
    def fork(self, mirror: Mirror, data: st.DataObject, deep: bool) -> Any:
        if len(self.alive) == MOST or not self.filled(mirror, data):
            return multiple()
        cache = copy.deepcopy(mirror.cache) if deep else mirror.cache.fork()
        self.alive.append(mirror.copy(cache))
        self.extend(data.draw(st.sampled_from([mirror, self.alive[-1]])), 1)
        return self.alive[-1]

    @precondition(lambda self: len(self.alive) > 1)
    @rule(mirror=consumes(caches))
    def drop(self, mirror: Mirror) -> None:
        self.alive = [one for one in self.alive if one is not mirror]
        del mirror.cache

    @rule(mirror=caches, method=st.sampled_from(["release", "reset"]))
    def empty(self, mirror: Mirror, method: str) -> None:
        getattr(mirror.cache, method)()
        mirror.clear()

    # -- tokens

    def filled(self, mirror: Mirror, data: st.DataObject) -> bool:
        """Whether a cache holds tokens; one that does not reads a prompt, if there are pages for it."""
        if not mirror.seen:
            self.prompt(mirror, data, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40)))
        return mirror.seen > 0

    def prompt(self, mirror: Mirror, data: st.DataObject, batch: int, tokens: int) -> None:
        """A first prompt, padded, with layers born short where a model is attached."""
        cache, lengths = mirror.cache, [tokens] * LAYERS
        if mirror.attached:
            lengths = sorted(data.draw(st.tuples(*[st.integers(1, tokens)] * LAYERS)), reverse=True)
            padding = [data.draw(st.integers(0, lengths[-1] - 1)) for _ in range(batch)]
            cache.begin(self.run, padding)  # type: ignore[arg-type]
        for index, length in enumerate(lengths):
            before, free = self.pages.pool.refcounts(), self.pages.available
            key, value = self.states(batch, length)
            if batch * self.pages.blocks(length) > free:
                with pytest.raises(OutOfPages, match=rf"{free} of {self.number} are free"):
                    cache.update(key, value, index)
                assert cache.get_seq_length() == 0
                mirror.clear()
                return
            found = cache.update(key, value, index)
            assert found[0] is key
            assert found[1] is value
            assert self.pages.pool.refcounts() != before
            starts = [0] * batch
            if mirror.attached:
                starts = padding
                cache.layers[index].begin(starts, tokens, length, length < tokens)
            zero = torch.zeros(HEADS)
            mirror.rows[index] = [
                [[key[b, :, n], value[b, :, n], zero.clone()] for n in range(starts[b], length)]
                for b in range(batch)
            ]
        mirror.seen = tokens

    def needed(self, mirror: Mirror, spans: list[list[tuple[int, int]]]) -> int:
        """Pages that writing these tokens takes, row by row: those that are missing, and a copy of each that has
        another user at that moment."""
        users = Counter(dict(enumerate(self.pages.pool.refcounts())))
        total = 0
        for layer, own in zip(mirror.cache.layers, spans, strict=True):
            for row, (begin, end) in zip(layer.blocks.rows, own, strict=True):
                for block in {token // self.page_size for token in range(begin, end)}:
                    if block >= len(row):
                        total += 1
                    elif users[row[block]] > 1:
                        users[row[block]] -= 1
                        total += 1
        return total

    @rule(mirror=caches, data=st.data(), new=st.sampled_from([1, 1, 1, 2, 5, 17, 40]))
    def append(self, mirror: Mirror, data: st.DataObject, new: int) -> None:
        if self.filled(mirror, data):
            self.extend(mirror, new)

    def extend(self, mirror: Mirror, new: int) -> None:
        cache = mirror.cache
        spans = [[(end, end + new) for end in layer.ends] for layer in cache.layers]
        states = [self.states(mirror.batch, new) for _ in range(LAYERS)]
        if self.needed(mirror, spans) > self.pages.available:
            before = self.everything()
            with pytest.raises(OutOfPages):
                cache.update(*states[0], 0)
            assert self.everything() == before
            return
        for index, (key, value) in enumerate(states):
            found = cache.update(key, value, index)
            for b, row in enumerate(mirror.rows[index]):
                row += [[key[b, :, n], value[b, :, n], torch.zeros(HEADS)] for n in range(new)]
                if not mirror.attached:
                    for i in (0, 1):
                        assert torch.equal(found[i][b], torch.stack([token[i] for token in row], dim=1))
            if mirror.attached:
                assert found[0] is key
        mirror.seen += new

    @rule(mirror=caches, data=st.data(), seed=st.integers(0, 100))
    def receive(self, mirror: Mirror, data: st.DataObject, seed: int) -> None:
        """Attention to the stored tokens is added up in the mass."""
        if not (mirror.attached and self.filled(mirror, data)):
            return
        for layer, rows in zip(mirror.cache.layers, mirror.rows, strict=True):
            masses = layer.masses()
            assert masses is not None
            (mass,) = masses
            assert mass is not None
            assert mass.shape[2] == layer.segments()[0].tokens
            for b, row in enumerate(rows):
                for n, token in enumerate(row):
                    mass[b, :, layer.starts[b] + n] += seed + n
                    token[2] = token[2] + seed + n

    @rule(mirror=caches, data=st.data())
    def compact(self, mirror: Mirror, data: st.DataObject) -> None:
        """Any tokens of any layers stay."""
        if not (mirror.attached and self.filled(mirror, data)):
            return
        cache = mirror.cache
        chosen = data.draw(st.lists(st.sampled_from(range(LAYERS)), min_size=1, unique=True))
        kept: dict[int, list[list[int]]] = {}
        for index in chosen:
            kept[index] = [
                sorted(data.draw(st.sets(st.sampled_from(range(len(row)))))) if row else []
                for row in mirror.rows[index]
            ]
        layers: list[PagedLayer] = [cache.layers[index] for index in chosen]
        most = [max(map(len, kept[index])) for index in chosen]
        places, counts = [], []
        for index, layer, width in zip(chosen, layers, most, strict=True):
            at = [
                [layer.starts[b] + n for n in row] + [-1] * (width - len(row))
                for b, row in enumerate(kept[index])
            ]
            places.append(torch.tensor(at, dtype=torch.int32).reshape(mirror.batch, width))
            counts.append(torch.tensor([len(row) for row in kept[index]], dtype=torch.int32))
        spans = [
            [(0, min(end, most[chosen.index(index)]) if index in chosen else 0) for end in layer.ends]
            for index, layer in enumerate(cache.layers)
        ]
        if self.needed(mirror, spans) > self.pages.available:
            before = self.everything()
            with pytest.raises(OutOfPages):
                cache._move(layers, places, counts)
            assert self.everything() == before
            return
        cache._move(layers, places, counts)
        for index, layer in zip(chosen, layers, strict=True):
            layer.compacted([len(row) for row in kept[index]], 0)
            layer.dropped = True
            mirror.rows[index] = [
                [row[n] for n in stay] for row, stay in zip(mirror.rows[index], kept[index], strict=True)
            ]

    @rule(mirror=caches, data=st.data())
    def crop(self, mirror: Mirror, data: st.DataObject) -> None:
        if not self.filled(mirror, data):
            return
        number = data.draw(st.integers(0, min(layer.tail for layer in mirror.cache.layers)))
        mirror.cache.crop(-number)
        mirror.seen -= number
        if not mirror.seen:
            mirror.clear()
        elif number:
            mirror.rows = [[row[:-number] for row in layer] for layer in mirror.rows]

    # -- rows

    @rule(mirror=caches, data=st.data(), repeat=st.booleans())
    def take_rows(self, mirror: Mirror, data: st.DataObject, repeat: bool) -> None:
        """Rows in another order, some of them several times; or each of them twice."""
        if not self.filled(mirror, data):
            return
        if repeat and mirror.batch < 3:
            order = [row for row in range(mirror.batch) for _ in range(2)]
            mirror.cache.batch_repeat_interleave(2)
        else:
            order = data.draw(st.lists(st.integers(0, mirror.batch - 1), min_size=1, max_size=4))
            mirror.cache.reorder_cache(torch.tensor(order))
        mirror.rows = [[[list(token) for token in layer[row]] for row in order] for layer in mirror.rows]
        if data.draw(st.booleans()):
            self.extend(mirror, 1)

    @rule(mirror=caches)
    def shrink(self, mirror: Mirror) -> None:
        mirror.cache.shrink()

    # -- what always holds

    @invariant()
    def the_pool_counts_what_the_tables_say(self) -> None:
        users = Counter(page for m in self.alive for layer in m.cache.layers for page in layer.blocks.ids)
        assert self.pages.pool.refcounts() == [users[page] for page in range(self.number)]

    @invariant()
    def a_row_has_the_pages_it_needs(self) -> None:
        for mirror in self.alive:
            for layer in mirror.cache.layers:
                assert [len(row) for row in layer.blocks.rows] == [
                    self.pages.blocks(end) for end in layer.ends
                ]

    @invariant()
    def everyone_holds_what_is_theirs(self) -> None:
        for mirror in self.alive:
            assert mirror.cache.get_seq_length() == mirror.seen
            for layer, rows in zip(mirror.cache.layers, mirror.rows, strict=True):
                assert layer.is_initialized == bool(rows)
                if rows and max(layer.ends):
                    self.check(layer, rows)

    def check(self, layer: PagedLayer, rows: list[list[list[Tensor]]]) -> None:
        (segment,) = layer.segments()
        assert segment.leftpad.tolist() == layer.starts
        assert segment.lens.tolist() == layer.ends
        for named, row in zip(segment.block_table.tolist(), layer.blocks.rows, strict=True):
            assert named[: len(row)] == row
        for part, states in enumerate(layer.buffer()):
            expected = torch.zeros_like(states)
            for b, row in enumerate(rows):
                if row:
                    tokens = torch.stack([token[part] for token in row])
                    expected[b, layer.starts[b] : layer.ends[b]] = tokens
            inside = torch.zeros(states.shape[:2], dtype=torch.bool)
            for b, (start, end) in enumerate(zip(layer.starts, layer.ends, strict=True)):
                assert end - start == len(rows[b])
                inside[b, start:end] = True
            assert torch.equal(states[inside], expected[inside])
            assert states.isfinite().all()
        if layer.mass is not None:
            mass = torch.zeros_like(layer.mass)
            for b, row in enumerate(rows):
                for n, token in enumerate(row):
                    mass[b, :, layer.starts[b] + n] = token[2]
            assert torch.equal(layer.mass, mass)

    def teardown(self) -> None:
        gone = [weakref.ref(mirror.cache) for mirror in self.alive]
        for mirror in self.alive:
            del mirror.cache
        assert all(one() is None for one in gone)
        assert self.pages.available == self.number


class HalfPrecision(Caches):
    """Pages of 32 tokens in bfloat16."""

    dtype, page_size, number = torch.bfloat16, 32, 24


_SETTINGS = settings(max_examples=50, stateful_step_count=40)
Caches.TestCase.settings = HalfPrecision.TestCase.settings = _SETTINGS
TestCaches = Caches.TestCase
TestHalfPrecision = HalfPrecision.TestCase
