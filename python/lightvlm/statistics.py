"""What a run adds up for its report."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .flops import attention_flops, attention_width, layer_flops, linear_weights
from .layout import BatchLayout
from .models.base import Adapter
from .report import Report
from .session import Prefill
from .sparse_attention import SparsePrefill

if TYPE_CHECKING:
    from lightvlm_ext import OpCall

_PENDING = 4096
"""Times that may wait to be asked for; the older half of them is long known by then."""
_OWN_WORK = "own work"


class Timer:
    """Time of what a device is given from here to :meth:`stop`, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[Any, Any] | None = None
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._stream = stream
            self._events[0].record(stream)
        self._started = time.perf_counter()

    def stop(self) -> Callable[[], float]:
        """End the measurement; returns what gives its seconds, and waits for them where they are a GPU's."""
        if self._events is None:
            seconds = time.perf_counter() - self._started
            return lambda: seconds
        start, end = self._events
        end.record(self._stream)

        def elapsed() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return elapsed


class Statistics:
    """Sums over the prompts and steps of a run."""

    def __init__(self, adapter: Adapter) -> None:
        layers = len(adapter.layers)
        self._layers = layers
        self._weights = [linear_weights(layer) for layer in adapter.layers]
        self._width = attention_width(adapter)
        self._rows = self._image_rows = 0
        self._tokens = [0] * layers
        self._image_tokens = 0
        self._image_kept = [0] * layers
        self._flops = self._full_flops = 0
        self._bytes = (0, 0, 0)
        self._times: list[tuple[str, Callable[[], float]]] = []
        self._seconds: dict[str, float] = {}
        self._at_own_work = False
        self._own_op_seconds = 0.0
        self._op_calls: Counter[str] = Counter()
        self._op_seconds: dict[str, float] = {}
        self._attending = [0] * layers
        self._could_attend = 0
        self._attention_flops = self._full_attention_flops = 0
        self._sparse: list[tuple[int, list[int], torch.Tensor]] = []
        self._aside: Counter[str] = Counter()
        self.compactions = self.captures = self.replays = 0
        self._reread = self._later_bytes = 0
        self.errors: list[str] = []

    def step_aside(self, reason: str) -> None:
        self._aside[reason] += 1

    def add_later(self, anew: bool, nbytes: int) -> None:
        """Count a call that had the conversation read anew, and say how many bytes are kept for the next."""
        self._reread += anew
        self._later_bytes = nbytes

    def add_time(self, phase: str, seconds: Callable[[], float]) -> None:
        """Add a call's time to a phase; on a GPU it is known once the device got there, so it is asked for last."""
        self._times.append((phase, seconds))
        if len(self._times) > _PENDING:
            self._settle(len(self._times) // 2)

    def _settle(self, count: int) -> None:
        for phase, seconds in self._times[:count]:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds()
        del self._times[:count]

    @contextlib.contextmanager
    def own_work(self, device: torch.device) -> Iterator[None]:
        """Count what runs inside as the method's own work at prefill; inside another such block it counts once."""
        if self._at_own_work:
            yield
            return
        self._at_own_work, timer = True, Timer(device)
        try:
            yield
        finally:
            self._at_own_work = False
            self.add_time(_OWN_WORK, timer.stop())

    def add_op(self, call: OpCall, prompt: bool = False) -> None:
        """Count a call of an op; ``prompt``: it was made while a prompt was read."""
        self._op_calls[call.name] += 1
        if call.seconds is None:
            return
        self._op_seconds[call.name] = self._op_seconds.get(call.name, 0.0) + call.seconds
        if prompt and not self._at_own_work:
            self._own_op_seconds += call.seconds

    def add_calls(self, calls: Counter[str]) -> None:
        """Count calls that a captured step makes by itself."""
        self._op_calls.update(calls)

    def add_prompt(self, layout: BatchLayout, prefill: Prefill | None) -> None:
        self._rows += len(layout.rows)
        with_image = [bool(row.image_sizes) for row in layout.rows]
        self._image_rows += sum(with_image)
        self._image_tokens += sum(sum(row.image_sizes) for row in layout.rows)
        for index, weights in enumerate(self._weights):
            rows = prefill.tokens_at(index).rows if prefill is not None else layout.rows
            self._flops += sum(layer_flops(weights, self._width, row.tokens) for row in rows)
            self._full_flops += sum(layer_flops(weights, self._width, row.tokens) for row in layout.rows)
            self._tokens[index] += sum(row.tokens for row in rows)
            self._image_kept[index] += sum(sum(row.image_sizes) for row in rows)

    def add_sparse(self, prompt: SparsePrefill) -> None:
        """Count the tokens that attended; how many they were is asked of the device later."""
        self._could_attend += sum(prompt.tokens)
        self._sparse += [(layer, prompt.tokens, chosen.count) for layer, chosen in prompt.selections.items()]
        full = sum(attention_flops(self._width, count) for count in prompt.tokens)
        for layer in range(self._layers):
            if layer not in prompt.selections:
                self._attending[layer] += sum(prompt.tokens)
                self._attention_flops += full
                self._full_attention_flops += full
        if len(self._sparse) > _PENDING:
            self._settle_sparse(len(self._sparse) // 2)

    def _settle_sparse(self, number: int) -> None:
        for layer, tokens, counts in self._sparse[:number]:
            found = counts.tolist()
            self._attending[layer] += sum(found)
            spent = sum(attention_flops(self._width, count) for count in found)
            full = sum(attention_flops(self._width, count) for count in tokens)
            self._flops += spent - full
            self._attention_flops += spent
            self._full_attention_flops += full
        del self._sparse[:number]

    def add_cache(self, cache: Any) -> None:
        if type(cache).__name__ in ("CompactCache", "PagedCompactCache"):
            self._bytes = (cache.kv_bytes_used, cache.kv_bytes_allocated, cache.kv_bytes_full)
        elif type(cache).__name__ == "DynamicCache":
            stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            self._bytes = (stored, stored, stored)

    def report(self) -> Report:
        """Everything so far; waits for the device."""
        self._settle(len(self._times))
        self._settle_sparse(len(self._sparse))
        rows, images = max(1, self._rows), max(1, self._image_rows)
        kept = sum(self._image_kept)
        return Report(
            prefills=self._rows,
            tokens_per_layer=[count / rows for count in self._tokens],
            image_tokens=self._image_tokens / images,
            image_tokens_kept=[count / images for count in self._image_kept],
            image_keep_share=kept / (self._layers * self._image_tokens) if self._image_tokens else 1.0,
            attending_share=[count / self._could_attend for count in self._attending if self._could_attend],
            attention_flops_share=(
                self._attention_flops / self._full_attention_flops if self._full_attention_flops else 1.0
            ),
            flops_share=self._flops / self._full_flops if self._full_flops else 1.0,
            kv_bytes_used=self._bytes[0],
            kv_bytes_allocated=self._bytes[1],
            kv_bytes_full=self._bytes[2],
            kv_compression=self._bytes[2] / self._bytes[0] if self._bytes[0] else 1.0,
            reread=self._reread,
            later_bytes=self._later_bytes,
            seconds={phase: seconds for phase, seconds in self._seconds.items() if phase != _OWN_WORK},
            own_seconds=self._seconds.get(_OWN_WORK, 0.0) + self._own_op_seconds,
            op_calls=dict(self._op_calls),
            op_seconds=dict(self._op_seconds),
            compactions=self.compactions,
            graph={"captures": self.captures, "replays": self.replays} if self.captures else {},
            stepped_aside=dict(self._aside),
            errors=list(self.errors),
        )
