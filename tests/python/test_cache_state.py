"""A CompactCache in 16 bits against plain lists of tokens, over every order of what can be done to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lightvlm import CompactCache, Plan
from python.stored import Reader, Told, bytes_alive
from torch import Tensor
from transformers import LlamaConfig

LAYERS, HEADS, WIDTH = 3, 2, 4
RECENT = 2
CONFIG = LlamaConfig(
    hidden_size=16, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=WIDTH, num_hidden_layers=LAYERS
)
TOKEN_BYTES = 2 * HEADS * WIDTH * 4


@dataclass(frozen=True)
class Token:
    """key, value (Hkv, D); mass (Hkv,), what it received."""

    key: Tensor
    value: Tensor
    mass: Tensor


@dataclass
class Row:
    """A row of a layer: padding in front, then tokens."""

    padding: int
    tokens: list[Token] = field(default_factory=list)


@dataclass
class Layer:
    """What a layer of the cache must hold. tail: tokens at the end of every row that are consecutive.   queries: all
    that were shown to it and not cropped, (B, T, Hq, D)."""

    rows: list[Row] = field(default_factory=list)
    queries: Tensor | None = None
    seen: int = 0
    tail: int = 0
    ragged: bool = False


class DenseCache(RuleBasedStateMachine):
    """Rows are lists; whatever moves in the buffers must be found where the lists say."""

    @initialize(
        capacity=st.sampled_from([None, 24]), rows=st.sampled_from([3, 0]), seed=st.integers(0, 2**20)
    )
    def make(self, capacity: int | None, rows: int, seed: int) -> None:
        """``rows``: queries that the cache remembers; 0: it adds up the attention that tokens receive."""
        self.capacity, self.query_rows = capacity, rows
        self.random = torch.Generator().manual_seed(seed)
        self.kept: dict[Any, list[Any]] = {}
        plan = Plan(cache=Told(interval=1, recent=RECENT, kept=self.kept, rows=rows))
        self.run = Reader(plan)
        self.cache = CompactCache(CONFIG, plan, capacity=capacity)
        self.layers = [Layer() for _ in range(LAYERS)]
        self.leftpad: list[int] = []
        self.fixed: list[int] = []
        self.noted = 0  # rows of the batch when the addresses were taken down

    @property
    def filled(self) -> bool:
        return bool(self.layers[0].rows)

    @property
    def batch(self) -> int:
        return len(self.layers[0].rows)

    @property
    def held(self) -> int:
        """Places that the longest row of a layer takes."""
        return max((row.padding + len(row.tokens) for layer in self.layers for row in layer.rows), default=0)

    def states(self, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hkv, S, D)."""
        key, value = torch.randn(2, batch, HEADS, tokens, WIDTH, generator=self.random)
        return key, value

    def numbers(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.random)

    # -- tokens

    @precondition(lambda self: not self.filled)
    @rule(
        data=st.data(),
        batch=st.integers(1, 3),
        length=st.integers(1, 9),
        padded=st.booleans(),
        shorter=st.booleans(),
    )
    def prompt(self, data: Any, batch: int, length: int, padded: bool, shorter: bool) -> None:
        """A prompt, of which later layers may get a part only."""
        pads = [data.draw(st.integers(0, length - 1)) if padded else 0 for _ in range(batch)]
        self.leftpad = [pad - min(pads) for pad in pads]
        self.cache.begin(self.run, self.leftpad)  # type: ignore[arg-type]
        counts, tail = [length - pad for pad in self.leftpad], length
        for index, layer in enumerate(self.layers):
            shortened = shorter and index > 0 and data.draw(st.booleans())
            if shortened:  # something of every row, of which the last ``tail`` are not touched
                tail = data.draw(st.integers(0, min(*counts, tail)))
                counts = [data.draw(st.integers(max(1, tail), count)) for count in counts]
            ragged = shortened or (index > 0 and self.layers[index - 1].ragged)
            stored = max(counts) if ragged else length
            starts = [stored - count for count in counts]
            key, value = self.states(batch, stored)
            self.cache.update(key, value, index)
            self.cache.layers[index].begin(starts, length, tail if ragged else length, ragged)
            layer.rows = [Row(start) for start in starts]
            for b, row in enumerate(layer.rows):
                row.tokens = self.tokens(key[b, :, starts[b] :], value[b, :, starts[b] :])
            layer.seen, layer.tail, layer.ragged = length, tail if ragged else length, ragged
        self.note_addresses()

    def tokens(self, key: Tensor, value: Tensor) -> list[Token]:
        """Keys and values (Hkv, S, D) as tokens that have received nothing."""
        return [
            Token(key[:, at].clone(), value[:, at].clone(), torch.zeros(HEADS)) for at in range(key.shape[1])
        ]

    @precondition(lambda self: self.filled)
    @rule(new=st.integers(1, 6))
    def append(self, new: int) -> None:
        if self.capacity is not None and self.held + new > self.capacity:
            states = self.states(self.batch, new)
            with pytest.raises(
                ValueError, match=f"capacity of the cache is 24 tokens; this step needs {self.held + new}"
            ):
                self.cache.update(*states, 0)
            return
        for index, layer in enumerate(self.layers):
            key, value = self.states(self.batch, new)
            self.cache.update(key, value, index)
            for b, row in enumerate(layer.rows):
                row.tokens += self.tokens(key[b], value[b])
            layer.seen, layer.tail = layer.seen + new, layer.tail + new
            query = torch.randn(self.batch, new, 4, WIDTH, generator=self.random)
            self.cache.layers[index].remember_queries(query, 0.5)
            if self.query_rows:
                before = [] if layer.queries is None else [layer.queries]
                layer.queries = torch.cat([*before, query], dim=1)
        self.kept.clear()
        assert self.cache.step(new) is False

    @precondition(lambda self: self.filled and not self.query_rows)
    @rule()
    def attend(self) -> None:
        """Every valid place of every layer receives something."""
        for index, layer in enumerate(self.layers):
            masses = self.cache.layers[index].masses()
            assert masses is not None
            (mass,) = masses
            assert mass is not None
            for b, row in enumerate(layer.rows):
                more = self.numbers(HEADS, len(row.tokens))
                mass[b, :, row.padding : row.padding + len(row.tokens)] += more
                row.tokens = [replace(one, mass=one.mass + more[:, at]) for at, one in enumerate(row.tokens)]

    @precondition(lambda self: self.filled)
    @rule(data=st.data())
    def compact(self, data: Any) -> None:
        """Any tokens may go but the last RECENT of a row, in any of the layers."""
        self.kept.clear()
        for index, layer in enumerate(self.layers):
            if not data.draw(st.booleans()):
                continue
            chosen = []
            for row in layer.rows:
                free = max(0, len(row.tokens) - RECENT)
                flags = data.draw(st.lists(st.booleans(), min_size=free, max_size=free))
                left = [at for at in range(len(row.tokens)) if at >= free or flags[at]]
                row.tokens = [row.tokens[at] for at in left]
                chosen.append([row.padding + at for at in left])
                row.padding = 0
            self.kept[id(self.cache.layers[index])] = chosen
            layer.ragged = True
            layer.tail = min(layer.tail, RECENT, *(len(row.tokens) for row in layer.rows))
        assert self.cache.step(1) is bool(self.kept)
        self.kept.clear()

    @precondition(lambda self: self.filled)
    @rule(data=st.data())
    def compact_heads(self, data: Any) -> None:
        """Every head keeps tokens of its own, as many as the others, and the last RECENT of a row."""
        self.kept.clear()
        for index, layer in enumerate(self.layers):
            if not data.draw(st.booleans()):
                continue
            chosen: list[list[list[int]]] = []
            for row in layer.rows:
                free = max(0, len(row.tokens) - RECENT)
                number = data.draw(st.integers(0, free))
                heads = [
                    sorted(data.draw(st.permutations(range(free)))[:number])
                    + list(range(free, len(row.tokens)))
                    for _ in range(HEADS)
                ]
                row.tokens = [
                    Token(
                        *(
                            torch.stack([getattr(row.tokens[at], name)[head] for head, at in enumerate(own)])
                            for name in ("key", "value", "mass")
                        )
                    )
                    for own in zip(*heads, strict=True)
                ]
                chosen.append([[row.padding + at for at in own] for own in heads])
                row.padding = 0
            self.kept[id(self.cache.layers[index])] = chosen
            layer.ragged = True
            layer.tail = min(layer.tail, RECENT, *(len(row.tokens) for row in layer.rows))
        assert self.cache.step(1) is bool(self.kept)
        self.kept.clear()

    @precondition(lambda self: self.filled)
    @rule(data=st.data(), old=st.booleans())
    def crop(self, data: Any, old: bool) -> None:
        """``old``: as transformers 5.0 says it, by the number of tokens to be left."""
        most = min(layer.tail for layer in self.layers)
        gone = min(most, data.draw(st.sampled_from([most, most // 2, 0, 1, 2])))
        seen = self.layers[0].seen
        if old and gone == seen:  # there 0 tokens left and 0 tokens removed would be the same number
            return
        self.cache.crop(seen - gone if old else -gone)
        for layer in self.layers:
            for row in layer.rows:
                short = max(0, gone - len(row.tokens))  # rows may be cropped into their padding
                del row.tokens[max(0, len(row.tokens) - gone) :]
                row.padding -= short
            layer.seen, layer.tail = layer.seen - gone, layer.tail - gone
            if layer.queries is not None:
                # of those before the last three, the cache does not know any
                shown, known = layer.queries.shape[1], min(3, layer.queries.shape[1])
                layer.queries = layer.queries[:, shown - known : max(shown - known, shown - gone)]
        self.leftpad = [min(pad, seen - gone) for pad in self.leftpad]

    @precondition(lambda self: self.filled)
    @rule(more=st.integers(1, 3))
    def crop_too_much(self, more: int) -> None:
        most = min(layer.tail for layer in self.layers)
        with pytest.raises(ValueError, match=f"cannot crop {most + more} tokens: only the last {most} are"):
            self.cache.crop(-most - more)

    # -- rows

    def select(self, rows: list[int]) -> None:
        for layer in self.layers:
            layer.rows = [Row(layer.rows[row].padding, list(layer.rows[row].tokens)) for row in rows]
            layer.queries = None if layer.queries is None else layer.queries[rows]
        self.leftpad = [self.leftpad[row] for row in rows]
        self.note_addresses()

    @precondition(lambda self: self.filled)
    @rule(data=st.data(), reorder=st.booleans(), dtype=st.sampled_from([torch.int64, torch.int32]))
    def select_rows(self, data: Any, reorder: bool, dtype: torch.dtype) -> None:
        most = self.batch if reorder else 4
        rows = data.draw(
            st.lists(st.integers(0, self.batch - 1), min_size=self.batch if reorder else 1, max_size=most)
        )
        indices = torch.tensor(rows, dtype=dtype)
        (self.cache.reorder_cache if reorder else self.cache.batch_select_indices)(indices)
        self.select(rows)

    @precondition(lambda self: self.filled and self.batch <= 2)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats: int) -> None:
        rows = [row for row in range(self.batch) for _ in range(repeats)]
        self.cache.batch_repeat_interleave(repeats)
        self.select(rows)

    @precondition(lambda self: self.filled)
    @rule(
        wrong=st.sampled_from([[-1], [0, 9], [], [[0]], [0.0], [True], "repeat"]),
        into=st.sampled_from(["batch_select_indices", "reorder_cache"]),
    )
    def select_wrong_rows(self, wrong: Any, into: str) -> None:
        if wrong == "repeat":
            with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
                self.cache.batch_repeat_interleave(0)
            return
        with pytest.raises(ValueError, match="indices must "):
            getattr(self.cache, into)(torch.tensor(wrong) if wrong else torch.tensor([], dtype=torch.int64))

    # -- the whole cache

    @precondition(lambda self: self.filled)
    @rule()
    def wrong_states(self) -> None:
        """States that do not fit the first layer change none."""
        good, _ = self.states(self.batch, 1)
        more, wide = self.states(self.batch + 1, 1)[0], good.expand(-1, -1, -1, WIDTH)[..., : WIDTH - 1]
        for key, message in (
            (more, f"key_states has {self.batch + 1} rows, the cache has {self.batch}"),
            (
                wide,
                "key_states has 2 heads of 3 channels in torch.float32, the cache 2 of 4 in torch.float32",
            ),
            (good.half(), "key_states has 2 heads of 4 channels in torch.float16"),
        ):
            if self.capacity is None or self.held < self.capacity:
                with pytest.raises(ValueError, match=message):
                    self.cache.update(key, good, 0)

    @precondition(lambda self: self.filled)
    @rule(what=st.sampled_from(["shrink", "shrink", "copy", "copy", "reset"]))
    def whole(self, what: str) -> None:
        getattr(self, what)()

    def shrink(self) -> None:
        self.cache.shrink()
        if self.filled and self.capacity is None:
            for layer, wanted in zip(self.cache.layers, self.layers, strict=True):
                assert layer.key_storage.shape[1] == max(row.padding + len(row.tokens) for row in wanted.rows)

    def reset(self) -> None:
        self.cache.reset()
        self.layers = [Layer() for _ in range(LAYERS)]
        self.leftpad = []

    def copy(self) -> None:
        """A copy stays as it is, whatever becomes of the original."""
        before, self.cache = self.cache, copy.deepcopy(self.cache)
        for layer in before.layers:
            for one in (layer.key_storage, layer.value_storage, layer.mass):
                if one is not None:
                    one.fill_(float("nan"))
        before.reset()
        # the copied plan is told by a list of its own
        part = self.cache.plan.cache
        assert isinstance(part, Told)
        self.kept = part.kept
        self.noted = 0
        self.note_addresses()

    # -- what must hold

    def addresses(self) -> list[int]:
        return [
            one.data_ptr()
            for layer in self.cache.layers
            for one in (layer.key_storage, layer.value_storage, layer.mass)
            if one is not None
        ]

    def note_addresses(self) -> None:
        """Where a capacity is set, tensors stay where they are for as long as the number of rows stays."""
        if self.capacity is not None and self.batch != self.noted:
            self.fixed, self.noted = self.addresses(), self.batch

    @invariant()
    def tokens_are_where_the_lists_say(self) -> None:
        for layer, wanted in zip(self.cache.layers, self.layers, strict=True):
            assert layer.is_initialized is self.filled
            if not self.filled:
                assert (layer.keys, layer.values, layer.mass) == (None, None, None)
                continue
            assert layer.starts == [row.padding for row in wanted.rows]
            assert layer.ends == [row.padding + len(row.tokens) for row in wanted.rows]
            assert layer.bounds()[0].tolist() == layer.starts
            assert layer.bounds()[1].tolist() == layer.ends
            assert layer.keys is not None
            assert layer.values is not None
            assert (layer.mass is None) is bool(self.query_rows)
            queries = (
                wanted.queries[:, -3:] if wanted.queries is not None else torch.empty(self.batch, 0, 1, WIDTH)
            )
            assert torch.equal(layer.recent_queries(), queries) or (
                layer.recent_queries().numel() == queries.numel() == 0
            )
            for b, row in enumerate(wanted.rows):
                places = slice(layer.starts[b], layer.ends[b])
                for at, one in enumerate(row.tokens):
                    assert torch.equal(layer.keys[b, :, places][:, at], one.key)
                    assert torch.equal(layer.values[b, :, places][:, at], one.value)
                    if layer.mass is not None:
                        assert torch.equal(layer.mass[b, :, places][:, at], one.mass)
                if layer.mass is not None:  # what comes to these places later has received nothing
                    assert not layer.mass[b, :, layer.ends[b] :].any()
                    assert not layer.mass[b, :, : layer.starts[b]].any()

    @invariant()
    def lengths_are_right(self) -> None:
        assert self.cache.get_seq_length() == self.layers[0].seen
        assert self.cache.ragged is any(layer.ragged for layer in self.layers)
        assert self.cache.leftpad == self.leftpad
        for layer, wanted in zip(self.cache.layers, self.layers, strict=True):
            longest = max((row.padding + len(row.tokens) for row in wanted.rows), default=0)
            assert (layer.seen, layer.tail, layer.ragged) == (wanted.seen, wanted.tail, wanted.ragged)
            assert layer.held == longest
            assert layer.get_mask_sizes(3) == (longest + 3, 0)
            assert layer.get_max_length() == (-1 if self.capacity is None else 24)
            assert layer.batch_size == (len(wanted.rows) if self.filled else -1)

    @invariant()
    def bytes_are_right(self) -> None:
        tokens = sum(len(row.tokens) for layer in self.layers for row in layer.rows)
        seen = sum(layer.seen * len(layer.rows) for layer in self.layers)
        assert self.cache.kv_bytes_used == tokens * TOKEN_BYTES
        assert self.cache.kv_bytes_full == seen * TOKEN_BYTES
        assert self.cache.kv_bytes_allocated == bytes_alive(self.cache)

    @invariant()
    def addresses_stay(self) -> None:
        if self.capacity is not None and self.filled:
            assert self.addresses() == self.fixed


DenseCache.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestDenseCache = DenseCache.TestCase
