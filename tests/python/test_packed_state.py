"""A packed CompactCache against the slow model of one, over every order of what can be done to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lightvlm import CompactCache, Plan
from lightvlm.methods.kv_precision import KVPrecision
from lightvlm.packed_store import GrowingKV
from lightvlm.stored_attention import attend_stored
from python.slow_packed import BLOCK, SlowLayer, Token
from python.stored import Reader, Told, bytes_alive
from torch import Tensor
from transformers import LlamaConfig

from lightvlm_ext import ops, reference
from lightvlm_ext.ops import KVSegment, PackedKV

LAYERS, HEADS, QUERIES, WIDTH = 2, 2, 4, 32
SCALE = 0.3
NEVER = 10**9
CONFIG = LlamaConfig(
    hidden_size=128,
    num_attention_heads=QUERIES,
    num_key_value_heads=HEADS,
    head_dim=WIDTH,
    num_hidden_layers=LAYERS,
)
STORED = [
    {"bits": 4, "interval": 64},
    {"bits": 8, "low_bits": 2, "interval": 128, "tau": 0.3},
    {"bits": 4, "low_bits": 2, "interval": 64, "sinks": 0},
    {"bits": 2, "interval": 64},
]


class PackedCache(RuleBasedStateMachine):
    """Sinks 2, recent 6, unless the plan says otherwise."""

    @initialize(
        options=st.sampled_from(STORED),
        demotes=st.booleans(),
        capacity=st.sampled_from([None, 420]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        seed=st.integers(0, 2**20),
    )
    def make(
        self, options: dict[str, Any], demotes: bool, capacity: int | None, dtype: torch.dtype, seed: int
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.capacity, self.dtype, self.demotes = capacity, dtype, demotes
        self.part = KVPrecision(**{"sinks": 2, "recent": 6, **options})
        self.room = [0]
        policy = Told(interval=NEVER, recent=1, kept={}, room=self.room, demoting=demotes)
        plan = Plan(cache=policy, precision=self.part)
        self.run = Reader(plan)
        self.cache = CompactCache(CONFIG, plan, capacity=capacity)
        self.layers: list[SlowLayer] = []
        self.seen = self.serial = 0
        self.leftpad: list[int] = []

    @property
    def batch(self) -> int:
        return len(self.leftpad)

    @property
    def rough(self) -> float:
        """Relative error of masses: where the query has 16 bits, the weights that are added up have 11."""
        return 1e-5 if self.dtype == torch.float32 else 2**-10

    @property
    def levels(self) -> tuple[int, ...]:
        return self.part.levels(0, LAYERS)

    @property
    def held(self) -> int:
        return max(layer.padding[b] + len(layer.row(b)) for layer in self.layers for b in range(self.batch))

    def states(self, tokens: int) -> Tensor:
        """Keys and values (2, B, Hkv, S, D) with channels of their own size and offset."""
        x = torch.randn(2, self.batch, HEADS, tokens, WIDTH, generator=self.random)
        channels = torch.rand(2, 1, HEADS, 1, WIDTH, generator=self.random)
        return (x * channels + 2 * channels).to(self.dtype)

    def tokens(self, states: Tensor, b: int) -> list[Token]:
        """Of a row of (2, B, Hkv, S, D); the same serial numbers in every row and layer."""
        found = []
        for at in range(states.shape[3]):
            exact = states[:, b, :, at].double()
            found.append(
                Token(self.serial + at, exact, exact, torch.zeros_like(exact), torch.zeros(HEADS).double())
            )
        return found

    # -- tokens

    @precondition(lambda self: not self.layers)
    @rule(
        data=st.data(),
        batch=st.integers(1, 2),
        length=st.sampled_from([200, 75, 30, 3]),
        chosen=st.booleans(),
    )
    def prompt(self, data: Any, batch: int, length: int, chosen: bool) -> None:
        pads = [0] + [data.draw(st.sampled_from([0, 1, length // 2, length - 1])) for _ in range(batch - 1)]
        self.leftpad, self.seen = pads, length
        self.cache.begin(self.run, pads)  # type: ignore[arg-type]
        selections = {}
        for index in range(LAYERS):
            states = self.states(length)
            self.cache.update(states[0], states[1], index)
            self.cache.layers[index].begin(pads, length, length, False)
            rows = [self.tokens(states[:, :, :, pad:], b) for b, pad in enumerate(pads)]
            for pad, row in zip(pads, rows, strict=True):
                for token in row:
                    token.serial += pad
            layer = SlowLayer(list(pads), rows, tail=length)
            if chosen:
                scores = torch.rand(batch, length, generator=self.random)
                selections[index] = ops.select(scores, keep=length // 2)
                mine = [
                    {at for at in range(length) if row[at] >= 0} for row in selections[index].inverse.tolist()
                ]
            layer.pack(self.part, self.levels, mine if chosen else None, 1)
            self.layers.append(layer)
        self.cache.pack_prompt(selections if chosen else None)
        self.serial += length

    @precondition(lambda self: self.layers)
    @rule(new=st.sampled_from([1, 3, 12, 64, 70, 130]))
    def step(self, new: int) -> None:
        """New tokens attend to all that is stored, and are stored; what has become old is packed."""
        if self.capacity is not None and self.held + new >= self.capacity:
            if self.held + new > self.capacity:
                states = self.states(new)
                with pytest.raises(
                    ValueError,
                    match=f"capacity of the cache is 420 tokens; this step needs {self.held + new}",
                ):
                    self.cache.update(states[0], states[1], 0)
            return
        for index, layer in enumerate(self.layers):
            states = self.states(new)
            self.cache.update(states[0], states[1], index)
            for b, row in enumerate(layer.buffer):
                row += self.tokens(states, b)
            layer.tail += new
            query = torch.randn(self.batch, QUERIES, new, WIDTH, generator=self.random).to(self.dtype)
            self.check_attention(index, query)
            self.cache.layers[index].remember_queries(query.transpose(1, 2), SCALE)
            layer.last_query = query[:, :, -1] if self.part.separates else None
            layer.pack_generated(self.part, self.levels, SCALE)
        self.seen, self.serial = self.seen + new, self.serial + new
        assert self.cache.step(new) is False

    def check_attention(self, index: int, query: Tensor) -> None:
        found = attend_stored(query, self.cache.layers[index], SCALE)
        new = query.shape[2]
        assert found.shape == (self.batch, new, QUERIES, WIDTH)
        for b in range(self.batch):
            layer = self.layers[index]
            out, weights = layer.attend(b, query[b], SCALE)
            tokens = layer.row(b)
            error = (found[b].double() - out).abs().max()
            if self.dtype == torch.float32:
                assert error <= 1e-5 * out.abs().max()
            else:  # what plain torch makes of the same keys and values in this precision
                keys, values = (
                    torch.stack([x.held[i] for x in tokens], dim=1)[None].to(self.dtype) for i in (0, 1)
                )
                mask = torch.ones(new, len(tokens), dtype=torch.bool).tril(len(tokens) - new)
                plain = F.scaled_dot_product_attention(
                    query[b : b + 1], keys, values, attn_mask=mask, scale=SCALE, enable_gqa=True
                )[0].transpose(0, 1)
                assert error <= 4 * (plain.double() - out).abs().max() + 2**-8 * out.abs().max()
            sinks = len(layer.sinks[b]) if layer.sinks and layer.packed else 0
            for at, token in enumerate(tokens):
                if at >= sinks:
                    token.mass = token.mass + weights[-8:, :, at].sum(0)

    @precondition(lambda self: self.layers)
    @rule(data=st.data())
    def crop(self, data: Any) -> None:
        """Within what is certainly consecutive, and beyond, which is refused."""
        most = min(layer.tail for layer in self.layers)
        with pytest.raises(
            ValueError, match=f"cannot crop {most + 1} tokens: only the last {most} are all still in"
        ):
            self.cache.crop(-most - 1)
        gone = data.draw(st.integers(0, min(most, 9)))
        if gone >= self.seen:
            return
        self.cache.crop(-gone)
        for layer in self.layers:
            for b, row in enumerate(layer.buffer):
                short = max(0, gone - len(row))
                del row[max(0, len(row) - gone) :]
                layer.padding[b] -= short
            layer.tail -= gone
            layer.last_query = layer.last_query if not gone else None
        self.seen -= gone
        self.leftpad = [min(pad, self.seen) for pad in self.leftpad]

    @precondition(lambda self: any(layer.packed for layer in self.layers))
    @rule(data=st.data(), room=st.integers(0, 260))
    def evict(self, data: Any, room: int) -> None:
        """Masses are whole numbers, so that every mean is exact; many of them equal."""
        for layer, slow in zip(self.cache.layers, self.layers, strict=True):
            most = data.draw(st.sampled_from([1, 30, 1000]))
            assert layer.packed is not None
            for tensor, rows in zip(layer.packed.masses(), slow.segments, strict=True):
                if tensor is None:
                    continue
                for b, row in enumerate(rows):
                    numbers = torch.randint(most + 1, (HEADS, len(row)), generator=self.random)
                    tensor[b, :, : len(row)] = numbers
                    for at, token in enumerate(row):
                        token.mass = numbers[:, at].double()
        self.room[0] = room
        self.cache.since_compaction = NEVER
        evicted = [layer.evict([room] * self.batch, self.demotes) for layer in self.layers]
        assert self.cache.step(0) is any(evicted)
        assert self.cache.since_compaction == 0

    # -- rows, and the whole cache

    @precondition(lambda self: self.layers)
    @rule(data=st.data())
    def select_rows(self, data: Any) -> None:
        rows = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3))
        self.cache.batch_select_indices(torch.tensor(rows))
        for layer in self.layers:
            layer.select(rows)
        self.leftpad = [self.leftpad[row] for row in rows]

    @precondition(lambda self: self.layers)
    @rule(what=st.sampled_from(["shrink", "shrink", "copy", "copy", "reset"]))
    def whole(self, what: str) -> None:
        getattr(self, what)()

    def shrink(self) -> None:
        before = self.cache.kv_bytes_allocated
        self.cache.shrink()
        assert self.cache.kv_bytes_allocated <= before
        for layer, slow in zip(self.cache.layers if self.capacity is None else [], self.layers, strict=False):
            for segment, rows in zip(
                layer.packed.segments() if layer.packed is not None else [], slow.segments, strict=False
            ):
                if not isinstance(segment, KVSegment):
                    assert segment.tokens == max(map(len, rows))

    def reset(self) -> None:
        self.cache.reset()
        self.layers, self.leftpad, self.seen = [], [], 0

    def copy(self) -> None:
        before, self.cache = self.cache, copy.deepcopy(self.cache)
        for layer in before.layers:
            layer.key_storage.fill_(float("nan"))
            for segment in layer.packed.segments() if layer.packed is not None else []:
                (segment.key if isinstance(segment, KVSegment) else segment.key_codes).fill_(1)
        part = self.cache.plan.cache
        assert isinstance(part, Told)
        self.room = part.room

    # -- what must hold

    @invariant()
    def content_is_within_the_bounds(self) -> None:
        for layer, slow in zip(self.cache.layers, self.layers, strict=False):
            assert (layer.packed is not None) is slow.packed
            segments = layer.packed.segments() if layer.packed is not None else []
            masses = layer.packed.masses() if layer.packed is not None else []
            assert len(segments) == len(masses) == len(slow.segments)
            for segment, mass, rows in zip(segments, masses, slow.segments, strict=True):
                assert segment.lens is not None
                assert segment.lens.tolist() == list(map(len, rows))
                if isinstance(segment, KVSegment):
                    pair = torch.stack([segment.key, segment.value]).double()
                else:
                    pair = torch.stack(reference.dequantize_kv(segment, torch.float64))
                for b, row in enumerate(rows):
                    check_tokens(row, pair[:, b], None if mass is None else mass[b], self.rough)
            assert layer.starts == slow.padding
            assert layer.ends == [pad + len(row) for pad, row in zip(slow.padding, slow.buffer, strict=True)]
            assert layer.mass is not None
            pair = torch.stack([layer.key_storage, layer.value_storage]).double()
            for b, (row, start, end) in enumerate(zip(slow.buffer, layer.starts, layer.ends, strict=True)):
                check_tokens(row, pair[:, b, start:end], layer.mass[b, :, start:end], self.rough)
                assert not layer.mass[b, :, end:].any()

    @invariant()
    def unpacked_is_in_order(self) -> None:
        for layer, slow in zip(self.cache.layers, self.layers, strict=False):
            assert layer.complete is (not slow.dropped and slow.in_order)
            if not (layer.complete and slow.packed):
                continue
            found = torch.stack(layer.unpacked(self.cache.leftpad))
            assert found.shape == (2, self.batch, HEADS, self.seen, WIDTH)
            for b in range(self.batch):
                tokens = slow.row(b)
                assert [token.serial for token in tokens] == sorted(token.serial for token in tokens)
                held = torch.stack([token.held for token in tokens], dim=2)
                mine = found[:, b, :, self.seen - len(tokens) :].double()
                exact = held.to(self.dtype).double()
                assert (mine - exact).abs().max() <= held.abs().max() * torch.finfo(self.dtype).eps
                assert not found[:, b, :, : self.seen - len(tokens)].any()

    @invariant()
    def numbers_are_right(self) -> None:
        assert self.cache.kv_bytes_allocated == bytes_alive(self.cache)
        assert self.cache.get_seq_length() == self.seen
        assert self.cache.leftpad == self.leftpad
        size = 4 if self.dtype == torch.float32 else 2
        each, used = 2 * HEADS * WIDTH * size, 0
        for layer, slow in zip(self.cache.layers, self.layers, strict=False):
            assert layer.tail == slow.tail
            assert layer.held == max(pad + len(slow.row(b)) for b, pad in enumerate(slow.padding))
            used += each * sum(
                len(row) for rows in (slow.sinks if slow.packed else [], slow.buffer) for row in rows
            )
            grown = [(bits, rows, len(rows[0]) // BLOCK) for bits, rows in slow.generated.items()]
            for bits, rows, blocks in [*((bits, rows, 1) for bits, rows in slow.prompt), *grown]:
                for row in rows:
                    used += len(row) * HEADS * (2 * WIDTH * bits // 8 + 4)
                    used += HEADS * WIDTH * 12 * (blocks if row else 0)
        assert self.cache.kv_bytes_used == used
        assert self.cache.kv_bytes_full == self.seen * self.batch * LAYERS * each


def check_tokens(tokens: list[Token], found: Tensor, mass: Tensor | None, rough: float) -> None:
    """Content (2, N, Hkv, D) and masses (Hkv, N) that begin with these tokens'; masses up to a relative error."""
    if not tokens:
        return
    now = found[:, : len(tokens)].transpose(0, 1)
    allowed = torch.stack([torch.zeros_like(x.held) if x.allowed is None else x.allowed for x in tokens])
    # tokens that were not packed since have not changed by a bit
    assert ((now - torch.stack([token.held for token in tokens])).abs() <= allowed).all()
    for at, token in enumerate(tokens):
        if token.allowed is not None:
            token.error, token.held, token.allowed = token.error + token.allowed, now[at], None
    exact, error = (torch.stack([getattr(token, name) for token in tokens]) for name in ("exact", "error"))
    assert ((now - exact).abs() <= error).all()
    if mass is not None:
        wanted = torch.stack([token.mass for token in tokens], dim=1)
        assert torch.allclose(mass[:, : len(tokens)].double(), wanted, rtol=rough, atol=1e-6)


PackedCache.TestCase.settings = settings(max_examples=60, stateful_step_count=24)
TestPackedCache = PackedCache.TestCase


def test_storage_that_grows_is_seen_to_grow() -> None:
    """Whoever holds the segment of generated tokens finds those that are added, as long as there is room for them."""
    key, value = torch.randn(2, 1, 4 * BLOCK, HEADS, WIDTH)
    held: PackedKV | None = None
    storage, wanted = GrowingKV(), ops.quantize_kv(key, value, bits=4, block=BLOCK)
    for first in range(0, 4 * BLOCK, BLOCK):
        part = slice(first, first + BLOCK)
        storage.append(key[:, part], value[:, part], 4, None, room=4 * BLOCK)
        held = held or storage.packed
        assert held is not None
        assert held.lens is not None
        assert held.lens.tolist() == [first + BLOCK]
        found, expected = (ops.dequantize_kv(one, torch.float32) for one in (held, wanted))
        end = first + BLOCK
        assert torch.equal(found[0][:, :end], expected[0][:, :end])
        assert torch.equal(found[1][:, :end], expected[1][:, :end])
        assert not found[0][:, end:].any()
    assert held is storage.packed
