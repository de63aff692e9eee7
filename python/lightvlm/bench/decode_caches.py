"""Caches of any length without a prompt: random keys and values, put where each kind of cache keeps them.

A cache is what a prompt of that many tokens would have left: transformers' dynamic and static one, and a CompactCache
of an attached run, packed as the run packs it. All layers get the same keys and values, in storage of their own.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightvlm_ext import ops
from lightvlm_ext.ops import Selection

from ..decode_step import DecodeStep
from ..methods.kv_precision import KVPrecision
from ..methods.zipvl import ZipVLPrefill
from ..plan import Plan
from ..runtime import Run, attach
from ..stored_attention import attend_stored
from .cases._case import require
from .cases.decode_attention import exactly

if TYPE_CHECKING:
    from ..cache import CompactCache
    from ..cache_layer import CompactLayer

HIGH_SHARE = 0.4
"""Of the tokens of a 4/2-bit cache, those that get 4."""
BITS = ("16", "8", "4", "2", "4/2")
# Largest error of a step's logits over their largest: what another order of sums costs in 16 bits, layer after layer.
# Of fewer than 8 bits the logits say nothing; there keys and values are looked at, and attention over them.
_LOGITS = {"16": 0.1, "8": 0.2}
_STORED = {8: 0.02, 4: 0.25, 2: 1.0}
"""Largest root mean square of what is wrong with stored numbers, over their own; those of others are at 1.4."""


@dataclass(frozen=True)
class Candidate:
    """A way to hold a cache, and to decode on it.

    kind: "dynamic" or "static" of transformers, or "compact".   bits: of a compact one.   loop: whether its steps are
    those of lightvlm.generate, on a GPU a CUDA graph; otherwise calls of the model.
    """

    kind: str
    bits: str = "16"
    loop: bool = False

    @property
    def name(self) -> str:
        """For people."""
        if self.kind != "compact":
            return f"transformers sdpa, {self.kind} cache"
        return f"lightvlm, {self.bits} bits" + (", decode loop" if self.loop else "")

    @property
    def plan(self) -> Plan | None:
        """What is attached while it is used."""
        if self.kind != "compact":
            return None
        if self.bits == "4/2":
            return Plan(prefill=ZipVLPrefill(), precision=KVPrecision(bits=4, low_bits=2))
        return Plan(precision=KVPrecision(bits=int(self.bits)))

    def share(self) -> float:
        """Of 16 bits, about: for planning."""
        if self.kind != "compact" or self.bits == "16":
            return 1.0
        bits = 4 * HIGH_SHARE + 2 * (1 - HIGH_SHARE) if self.bits == "4/2" else float(self.bits)
        return (bits + 0.5) / 16

    def most(self) -> float:
        """The same at the most, while it is being filled: a prompt is stored in 16 bits before it is packed."""
        return 1.0 if self.share() == 1.0 else 1.0 + self.share()


def candidates(bits: Sequence[str], loop: bool = False) -> list[Candidate]:
    """transformers' two caches, then ours; each with the decode loop, too, where it is asked for."""
    found = [Candidate("dynamic"), Candidate("static")]
    for one in bits:
        found.append(Candidate("compact", one))
        if loop:
            found.append(Candidate("compact", one, loop=True))
    return found


@dataclass(frozen=True)
class States:
    """Keys and values (B, Hkv, N, D) of a layer."""

    key: Tensor
    value: Tensor

    @classmethod
    def random(cls, batch: int, tokens: int, config: Any, dtype: torch.dtype, device: str) -> States:
        """Normally distributed."""
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads, tokens, width)
        generator = torch.Generator(device).manual_seed(2)
        key, value = (torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(2))
        return cls(key, value)

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.key.nbytes + self.value.nbytes


class Decoding:
    """A model's decode steps on a cache of a candidate's kind.   room: tokens that will be decoded at most."""

    def __init__(self, candidate: Candidate, model: Any, states: States, room: int) -> None:
        self.candidate, self.model = candidate, model
        self.batch, _, self.tokens, _ = states.key.shape
        self.done = 0
        self._run: Run
        self._loop: DecodeStep | None = None
        self._room = room
        self.cache: Any = self._fill(states, room)
        self._token = torch.full((self.batch, 1), 7, device=model.device)

    def _fill(self, states: States, room: int) -> Any:
        from transformers import DynamicCache, StaticCache

        config = self.model.config.get_text_config(decoder=True)
        layers = range(config.num_hidden_layers)
        cache: Any
        if self.candidate.kind == "compact":
            return self._fill_compact(config, states)
        if self.candidate.kind == "static":
            cache = StaticCache(config, max_cache_len=self.tokens + room)
        else:
            cache = DynamicCache(config=config)
        for layer in layers:
            cache.update(states.key, states.value, layer)
        return cache

    def _fill_compact(self, config: Any, states: States) -> CompactCache:
        from ..cache import CompactCache

        assert self.candidate.plan is not None
        cache = CompactCache(config, self.candidate.plan)
        with attach(self.model, self.candidate.plan) as run, run.reading(cache):
            cache.begin(run, [0] * self.batch)
            for index, layer in enumerate(cache.layers):
                cache.update(states.key, states.value, index)
                layer.begin([0] * self.batch, self.tokens, self.tokens, False)
            selection = some_tokens(self.batch, self.tokens, states.key.device)
            selections = dict.fromkeys(range(len(cache.layers)), selection)
            cache.pack_prompt(selections if self.candidate.bits == "4/2" else None)
        return cache

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """While steps are taken: the candidate's plan is on the model."""
        if self.candidate.plan is None:
            yield
            return
        if self._loop is not None:  # a graph outlives the hooks, its run comes back with it
            self._run._put_on()
            try:
                yield
            finally:
                self._run.detach()
            return
        with attach(self.model, self.candidate.plan) as run:
            self.cache.run = weakref.ref(run)
            self._run = run
            if self.candidate.loop:
                self._loop = DecodeStep(run, self.cache, positions=self._positions(), ahead=self._room)
            yield

    def step(self) -> Tensor:
        """One token a row through the whole decoder, as generate() calls it; logits (B, V)."""
        if self._loop is not None:
            self.done += 1
            return self._loop.step(self._token)
        output = self.model(
            input_ids=self._token,
            position_ids=self._positions(),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        self.done += 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def _positions(self) -> Tensor:
        """Of the next token, on three axes."""
        return torch.full((3, self.batch, 1), self.tokens + self.done, device=self.model.device)

    def make_ready_to_pack(self) -> None:
        """Append so many random tokens that the next :meth:`pack` packs a block of each layer."""
        part = self.cache.plan.precision
        for index, layer in enumerate(self.cache.layers):
            shape = (self.batch, layer.key_storage.shape[2], part.interval, layer.key_storage.shape[3])
            like = layer.key_storage
            key, value = (torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(2))
            with self._run.reading(self.cache):
                self.cache.update(key, value, index)

    def pack(self) -> None:
        """What a run does after a step: pack generated tokens if there are enough."""
        self.cache.step(0)

    def read_bytes(self) -> int:
        """Of keys and values that a step reads."""
        if self.candidate.kind == "compact":
            return int(self.cache.kv_bytes_used)
        layers = self.cache.layers
        of_one = sum(x[0, :, 0].numel() * x.element_size() for one in layers for x in (one.keys, one.values))
        return of_one * self.batch * (self.tokens + self.done)


def check(decoding: Decoding, logits: Tensor, wanted: Tensor, states: States) -> float:
    """The largest error of a step's logits over their largest, after a look at what is packed and at attention over it.

    Raises:
        AssertionError: something is more wrong than the candidate's bits account for.
    """
    candidate = decoding.candidate
    if candidate.kind == "compact":
        for layer in (decoding.cache.layers[0], decoding.cache.layers[-1]):
            if layer.packed is not None:
                _check_stored(decoding, layer, states)
                _check_packed(layer, decoding.model)
    error = float((logits.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    limit = _LOGITS.get(candidate.bits, float("inf"))
    require(
        error <= limit, f"{candidate.name}: logits are off by {error:.2g}, more than {limit} of the largest"
    )
    return error


def _check_stored(decoding: Decoding, layer: CompactLayer, states: States) -> None:
    """The packed tokens of the first row are the states', but for what the bits cost."""
    part: Any = decoding.cache.plan.precision
    assert layer.packed is not None
    chosen = some_tokens(1, decoding.tokens, states.key.device).inverse[0] >= 0
    middle = torch.arange(part.sinks, decoding.tokens - part.recent, device=states.key.device)
    tokens = [middle[chosen[middle]], middle[~chosen[middle]]] if part.separates else [middle]
    for one, at in zip(layer.packed.prompt, tokens, strict=True):
        segment = one.packed
        pair = ops.dequantize_kv(segment, torch.float32)
        for name, found, all_states in zip(("keys", "values"), pair, (states.key, states.value), strict=True):
            wanted = all_states[0].transpose(0, 1)[at].float()
            error = float(
                (found[0, : len(at)] - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            )
            limit = _STORED[segment.bits]
            require(
                error <= limit, f"{name} in {segment.bits} bits are off by {error:.2g}, more than {limit}"
            )


def _check_packed(layer: CompactLayer, model: Any) -> None:
    """Attention over a packed layer is that over the numbers that its codes stand for, in the first and last row."""
    assert layer.packed is not None
    config = model.config.get_text_config(decoder=True)
    batch, _, _, width = layer.key_storage.shape
    generator = torch.Generator(layer.key_storage.device).manual_seed(3)
    query = torch.randn(
        batch, config.num_attention_heads, 1, width,
        dtype=layer.key_storage.dtype, device=layer.key_storage.device, generator=generator,
    )  # fmt: skip
    found = attend_stored(query, layer, None)
    rows = sorted({0, batch - 1})
    exact = exactly(query.transpose(1, 2), layer.segments(), rows)
    fine = 1e-4 if query.dtype == torch.float32 else 2e-2
    error = (found[rows] - exact).abs().max()
    require(bool(error <= fine * exact.abs().max()), f"attention over a packed layer is off by {error:.2g}")


def some_tokens(batch: int, tokens: int, device: torch.device) -> Selection:
    """HIGH_SHARE of the tokens, drawn at random; in every row the same."""
    count = int(HIGH_SHARE * tokens)
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(4))[:count]
    index = drawn.sort().values
    inverse = torch.full((tokens,), -1)
    inverse[index] = torch.arange(count)
    padded = torch.nn.functional.pad(index, (0, tokens - count), value=-1)
    rows = (x.expand(batch, -1).to(device, torch.int32) for x in (padded, inverse))
    index, inverse = (x.contiguous() for x in rows)
    return Selection(index, torch.full((batch,), count, dtype=torch.int32, device=device), inverse)
