"""One decode step that asks the host for nothing: one token a row through the decoder, its head, and a live cache.

On a GPU the step is captured in a CUDA graph and replayed, so that a token costs one launch of the host. Compaction and
packing happen between steps; the graph is captured anew only where they replaced a buffer. Elsewhere the same function
runs as it is.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightvlm_ext import OpCall, observe

from .cache import CompactCache
from .live_cache import LiveCache
from .paged_cache import PagedCompactCache
from .statistics import Timer

if TYPE_CHECKING:
    from .runtime import Run

Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], object]]]
"""Captures a function without running it: (what it will have returned, the replay)."""


_streams: dict[torch.device, Any] = {}
"""Where captures run, one stream a device: cuBLAS keeps a workspace for each stream that it has seen."""


def capture_cuda(device: torch.device, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
    """Capture with torch.cuda.CUDAGraph, in a memory pool of its own."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = _streams.setdefault(device, torch.cuda.Stream(device))
        # other threads go on using the device; the outer context brings the stream back where a capture fails
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            out = function()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return out, replay


def capture_on(device: torch.device) -> Capture | None:
    """What captures a step on a device; None: nothing does."""
    return functools.partial(capture_cuda, device) if device.type == "cuda" else None


class DecodeStep:
    """Decode steps on a filled cache; a context manager, at whose end the cache is one as any other again.

    >>> with DecodeStep(run, cache, positions=positions) as decode:
    ...     logits = decode.step(tokens)

    Args:
        run: attached to the model.
        cache: filled through that run, so that where each row's keys stand is known.
        positions: of the next token, as the decoder takes them: (B, 1), or (axes, B, 1), int64. Default: behind the
            tokens seen, padding left out.
        ahead: steps that will come at most; more are possible, at the cost of moving buffers.
        capture: what captures the step; None: it is run as it is. Default: a CUDA graph on a GPU, None elsewhere.

    Raises:
        ValueError: the cache cannot be stepped like that (:func:`why_not`), or positions or capture are not as said;
            nothing is changed.
    """

    def __init__(
        self,
        run: Run,
        cache: CompactCache,
        *,
        positions: Tensor | None = None,
        ahead: int = 1024,
        capture: Capture | str | None = "auto",
    ) -> None:
        reason = why_not(run, cache)
        if reason is not None:
            raise ValueError(f"cache cannot be stepped: {reason}")
        adapter, layer = run._adapter, cache.layers[0]
        device = layer.key_storage.device
        if isinstance(capture, str):
            if capture != "auto":
                raise ValueError(f'capture must be "auto", None or a function, got {capture!r}')
            capture = capture_on(device)
        rows = layer.batch_size
        if positions is not None and positions.shape[-2:] != (rows, 1):
            raise ValueError(f"positions must end in ({rows}, 1), got {tuple(positions.shape)}")
        self._run, self._cache, self._capture = run, cache, capture
        self._decoder, self._head = adapter.decoder, adapter.model.get_output_embeddings()
        with torch.inference_mode(False):  # they are written at every step, in that mode or not
            if positions is None:
                seen = [layer.seen - pad for pad in cache.leftpad]
                positions = torch.tensor(seen, device=device)[:, None]
            self._positions = positions.clone()
            self._tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            # Four axes: transformers takes such a mask as it is, and a live cache says itself what is valid.
            self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self._replay: Callable[[], object] | None = None
        self._retired: Callable[[], object] | None = None
        self._calls: Counter[str] = Counter()
        self._loaded = False
        self._said: list[Tensor] = []
        self.logits = torch.empty(0)
        """(B, V) in the model's dtype: of the last step, until the next."""
        self._live = LiveCache(cache, ahead, int(adapter.decoder.config.num_attention_heads))
        self._addresses = self._live.addresses()

    def __enter__(self) -> DecodeStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the cache be used as any other. Harmless when called twice."""
        self._replay = self._retired = None
        self._live.close()
        if self._said and self._cache.transcript is not None:
            self._cache.transcript.add_decoded(torch.cat(self._said, dim=1), self._positions)
            self._said = []
            self._run._stats.add_later(False, self._cache.transcript.nbytes)
        self._run._stats.add_cache(self._cache)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one token a row, (B, 1) or (B,) integers; they stay until the next step.

        Raises:
            ValueError: not a token for each row, a fixed capacity of the cache is used up, or the run is detached;
                nothing is changed.
        """
        if not self._run.attached:
            raise ValueError("the run is detached, and with it nobody reads the cache")
        rows = self._tokens.shape[0]
        if tuple(tokens.shape) not in ((rows,), (rows, 1)) or tokens.is_floating_point():
            raise ValueError(f"tokens must be ({rows}, 1) integers, got {tuple(tokens.shape)} {tokens.dtype}")
        self._live.check_room()
        self._tokens.copy_(tokens.reshape(-1, 1))
        timer, stats = Timer(self._tokens.device), self._run._stats
        if self._capture is not None and self._replay is None and self._loaded:
            self._take(self._capture)
        if self._replay is not None:
            self._replay()
            stats.replays += 1
            stats.add_calls(self._calls)
        else:
            try:
                with observe(stats.add_op):
                    self.logits = self._compute()
            except BaseException:
                self._live.take_back()
                raise
            self._loaded = True
        if self._cache.transcript is not None:
            self._said.append(self._tokens.clone())
        with observe(stats.add_op):  # while the device is at work
            stats.compactions += self._live.advance()
        if (
            self._capture is not None
            and self._live.moved
            and self._addresses != (now := self._live.addresses())
        ):
            # kept until the next capture, which waits for the device: it may be running
            self._retired, self._replay = self._replay or self._retired, None
            self._addresses, self._loaded = now, False
        stats.add_time("decode", timer.stop())
        return self.logits

    def _compute(self) -> Tensor:
        """The device's part: all that a graph holds."""
        with self._run.reading(self._cache), self._live.step():
            hidden = self._decoder(
                input_ids=self._tokens,
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
            )[0]
            logits: Tensor = self._head(hidden)[:, -1]
            self._positions += 1
            return logits

    def _take(self, capture: Capture) -> None:
        """Capture the step, after one on the same buffers that was run as it is and has loaded all that it needs."""
        calls: list[OpCall] = []
        try:
            with observe(calls.append):
                self.logits, self._replay = capture(self._compute)
        except Exception as error:  # whatever it is, the step can still be run as it is
            self._capture = None
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._run._stats.step_aside(f"the decode step cannot be captured: {reason}")
            return
        self._retired = None
        self._calls = Counter(call.name for call in calls)
        self._run._stats.captures += 1


def why_not(run: Run, cache: object) -> str | None:
    """Why a cache cannot be stepped on the device alone; None where it can."""
    if not run.attached:
        return "the run is detached"
    if not isinstance(cache, CompactCache):
        return f"a {type(cache).__name__} holds the keys, not a CompactCache"
    if isinstance(cache, PagedCompactCache):
        return "its keys are in pages, which grow by the host's hand"
    if any(not layer.is_initialized for layer in cache.layers):
        return "it is empty"
    if cache.run is None or cache.run() is not run:
        return "another run filled it, or none"
    if len(cache.leftpad) != cache.layers[0].batch_size:
        return "the padding of its rows is not known"
    if any(layer.live is not None for layer in cache.layers):
        return "it is being stepped already"
    if len({layer.key_storage.device for layer in cache.layers}) > 1:
        return "its layers are on several devices"
    return None
