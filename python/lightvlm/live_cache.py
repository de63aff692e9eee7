"""A CompactCache in a loop of decode steps that ask the host for nothing, so that a step can be captured and replayed.

Where each row's keys stand is on the device, in one tensor for all layers: a step writes its token at the ends it finds
there and moves them on. The host knows without asking: a step adds one token to every row (:meth:`LiveCache.advance`).
Between steps the host compacts and packs as it always does, and its bounds go into the same tensor. What a step reads
and writes keeps its address until a buffer is replaced, which :meth:`LiveCache.addresses` shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .contract.cache import CachePart
from .stored_layer import SLACK

if TYPE_CHECKING:
    from .cache import CompactCache
    from .cache_layer import CompactLayer
    from .stored_layer import StoredLayer

SPAN = 2048
"""Free places that a buffer starts with where more tokens may come; longer answers make it grow."""


@dataclass
class LiveLayer:
    """What a layer's part of a step needs on the device.

    bounds (2, B) int32: starts and ends.   before (B,) int32: ends before the step.   rows, at (B,) int64: where its
    token is written.
    queries (B, W, Hq, D): the last W queries, of which ``remembered`` at the end are real, or None.
    ahead: tokens that may still come.   stepping: whether a step is under way.
    """

    bounds: Tensor
    before: Tensor
    rows: Tensor
    at: Tensor
    queries: Tensor | None
    remembered: int
    ahead: int
    stepping: bool = False

    @property
    def expected(self) -> int:
        """Tokens to have room for now."""
        return min(self.ahead, SPAN)

    def write(self, layer: StoredLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store one token a row, (B, Hkv, 1, D); returns the buffers, (B, Hkv, capacity, D)."""
        place = (self.rows, self.at)
        layer.key_storage.index_put_(place, key[:, :, 0])
        layer.value_storage.index_put_(place, value[:, :, 0])
        return layer.key_storage.transpose(1, 2), layer.value_storage.transpose(1, 2)

    def remember(self, query: Tensor) -> None:
        """Take (B, 1, Hq, D) in, and the oldest out."""
        if self.queries is None:
            return
        if self.queries.shape[1] > 1:
            query = torch.cat([self.queries[:, 1:], query], dim=1)
        self.queries.copy_(query)


class LiveCache:
    """A filled CompactCache, live until :meth:`close`.

    Args:
        cache: filled on an attached model.
        ahead: steps that will come at most; buffers get room for them.
        heads: query heads of the decoder.
    """

    def __init__(self, cache: CompactCache, ahead: int, heads: int) -> None:
        first = cache.layers[0]
        batch, device = first.batch_size, first.key_storage.device
        self.cache = cache
        self.moved = False
        with torch.inference_mode(False):
            self._bounds = torch.empty(len(cache.layers), 2, batch, dtype=torch.int32, device=device)
            self._before = torch.empty(len(cache.layers), batch, dtype=torch.int32, device=device)
            self._at = torch.empty(len(cache.layers), batch, dtype=torch.int64, device=device)
            rows = torch.arange(batch, device=device)
        of_layers = (self._bounds, self._before, self._at)
        for layer, bounds, ends, at in zip(cache.layers, *of_layers, strict=True):
            before = layer.recent_queries()
            queries = None
            if layer.query_rows:
                shape = (batch, layer.query_rows, heads, layer.key_storage.shape[3])
                with torch.inference_mode(False):
                    queries = layer.key_storage.new_zeros(shape)
                if before.shape[1]:
                    queries[:, layer.query_rows - before.shape[1] :] = before
            layer.live = LiveLayer(bounds, ends, rows, at, queries, before.shape[1], ahead)
            layer._bounds = None
            layer.bounds()
            grows = layer.capacity is None and not layer.will_be_packed
            self._make_room(layer, max(1, min(ahead, self._room(layer))) if grows else 1)

    @contextmanager
    def step(self) -> Iterator[None]:
        """The device's part of a step: within, every layer is given one token a row."""
        self._before.copy_(self._bounds[:, 1])
        self._at.copy_(self._before)
        self._bounds[:, 1] += 1
        self._mark(True)
        try:
            yield
        finally:
            self._mark(False)

    def _mark(self, stepping: bool) -> None:
        for layer in self.cache.layers:
            assert layer.live is not None
            layer.live.stepping = stepping

    def check_room(self) -> None:
        """Raise a ValueError where a fixed capacity has no room for the token of a step."""
        for layer in self.cache.layers:
            layer.check_capacity(1)

    def _make_room(self, layer: CompactLayer, least: int) -> bool:
        """Move a layer that has fewer free places than that to larger buffers; whether it did not have them."""
        used = max(layer.ends)
        short = layer.key_storage.shape[1] < used + least and layer.key_storage.shape[1] != layer.capacity
        if short:
            layer._resize(used + self._room(layer))
        return short

    def advance(self) -> bool:
        """The host's part of a step that the device has been given: count its token, pack, compact where it is time,
        and make room for the next. Returns whether anything was compacted; :attr:`moved` then says whether buffers may
        have been replaced.
        """
        counted = []
        for layer in self.cache.layers:
            assert layer.live is not None
            layer.ends = [end + 1 for end in layer.ends]
            counted.append(layer.ends)
            layer.seen += 1
            layer.tail += 1
            layer.live.remembered = min(layer.query_rows, layer.live.remembered + 1)
            layer.live.ahead = max(0, layer.live.ahead - 1)
        compacted = self.cache.step(1)
        self.moved = compacted
        for layer, ends in zip(self.cache.layers, counted, strict=True):
            if layer.ends is not ends:
                layer.bounds()  # goes to the device
                self.moved = True
            self.moved |= self._make_room(layer, 1)
        return compacted

    def _room(self, layer: CompactLayer) -> int:
        """Free places that a buffer which is used up should get."""
        assert layer.live is not None
        ahead, held, policy = layer.live.ahead, max(layer.ends), self.cache.plan.cache
        if isinstance(policy, CachePart) and type(policy).budget is not CachePart.budget:
            ahead = min(ahead, max(0, policy.budget(layer.seen + ahead) - held) + policy.interval)
        return max(SLACK, min(ahead, max(SPAN, held)))

    def take_back(self) -> None:
        """Forget a step that did not get to its end: what the host counts is what stands."""
        for layer in self.cache.layers:
            layer._bounds = None
            layer.bounds()

    def addresses(self) -> tuple[object, ...]:
        """Where everything lies that a step reads or writes of the cache. While it stays, so does a captured step."""
        found: list[object] = []
        for layer in self.cache.layers:
            assert layer.live is not None
            tensors = [layer.key_storage, layer.value_storage, layer.mass, layer.live.queries]
            if layer.packed is not None:
                for segment in layer.packed.segments():
                    tensors += [getattr(segment, item.name) for item in dataclasses.fields(segment)]
                tensors += layer.packed.masses()
            found += [(x.data_ptr(), x.shape) if isinstance(x, Tensor) else x for x in tensors]
        return tuple(found)

    def close(self) -> None:
        """Back to a cache as any other. Harmless when called twice."""
        for layer in self.cache.layers:
            if layer.live is None:
                continue
            queries = layer.recent_queries()
            layer.live = None
            layer._bounds = None
            layer._queries = [queries] if queries.shape[1] else []
