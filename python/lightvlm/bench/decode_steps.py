"""Decode steps of a whole decoder on caches of one size, candidates in turn: see `decode.py`."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..kl import kl_divergence
from . import floors
from .decode_caches import Candidate, Decoding, States, candidates, check
from .decoder import GEOMETRIES, build_model, synchronise
from .jobs import TIME_IS_OVER, problem, skipped
from .measure import paired
from .memory import available, in_use, storage_bytes
from .timing import Effort, in_turns

Row = dict[str, Any]

VOCABULARY = 151936  # Qwen2.5's
_FREE = 0.85  # of what memory is available, so much is planned with
_PACKINGS = 3
_SLOW = 0.5  # seconds of a step that is timed alone


def vocabulary(args: argparse.Namespace) -> int:
    """What --vocabulary says, or the geometry's."""
    return args.vocabulary or (1024 if args.geometry == "tiny" else VOCABULARY)


def depth(args: argparse.Namespace) -> int:
    """Layers of the decoder that is measured."""
    return int(args.layers or GEOMETRIES[args.geometry][1])


def room(args: argparse.Namespace) -> int:
    """Tokens that are decoded on a cache: the one that is checked, a round to warm up, and the rounds."""
    return int(1 + (args.rounds + 1) * args.steps)


def sizes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(tokens, batch), the smallest first, so that time cuts the largest."""
    return sorted(itertools.product(args.tokens, args.batch), key=lambda size: size[0] * size[1])


@torch.inference_mode()
def steps(args: argparse.Namespace, ceilings: floors.Ceilings, deadline: float) -> Iterator[Row]:
    model = build_model(args.geometry, args.layers, getattr(torch, args.dtype), args.device, vocabulary(args))
    config = model.config.get_text_config(decoder=True)
    for tokens, batch in sizes(args):
        case = f"{args.geometry}, {depth(args)} layers, {batch} x {tokens} tokens, {args.dtype}"
        if time.monotonic() > deadline:
            yield skipped("decode step", case, TIME_IS_OVER)
            continue
        try:
            states = States.random(batch, tokens, config, getattr(torch, args.dtype), args.device)
            yield from _Size(args, ceilings, model, case, states).rows()
        except Exception as error:  # one size's trouble is a row
            yield problem("decode step", case, error)
        states = None  # type: ignore[assignment]


class _Size:
    """All candidates on caches of one size."""

    def __init__(
        self, args: argparse.Namespace, ceilings: floors.Ceilings, model: Any, case: str, states: States
    ) -> None:
        self.args, self.ceilings, self.model, self.case, self.states = args, ceilings, model, case, states
        self.device = torch.device(args.device)
        self.found: dict[str, Row] = {}
        self.times: dict[str, list[float]] = {}
        self._wanted: torch.Tensor | None = None

    def rows(self) -> Iterator[Row]:
        """One row a candidate."""
        listed = candidates(self.args.bits, self.args.loop)
        dense, room = self.states.nbytes * depth(self.args), _FREE * available(self.device)
        # a layer that is copied, and what is not packed yet of a cache that is being filled
        spare = 4 * self.states.nbytes
        together = dense + spare + sum(dense * one.share() for one in listed) <= room
        fitting = [one for one in listed if dense * one.most() + spare <= room]
        if not fitting or fitting[0] is not listed[0]:  # the first is what all are checked against
            yield skipped("decode step", self.case, "needs more memory than there is")
            return
        for group in [listed] if together else [[one] for one in fitting]:
            self._measure(group)
        rivals = [name for name in self.times if name.startswith("transformers")]
        fastest = min(rivals, key=lambda name: statistics.median(self.times[name]))
        for one in listed:
            if one.name in self.times:
                yield self._row(one.name, fastest, rivals, together)
            else:
                yield skipped(one.name, self.case, "needs more memory than there is")

    def _measure(self, group: list[Candidate]) -> None:
        """Fill, check and time caches that are in memory together."""
        decodings = {one.name: self._prepared(one) for one in group}
        first = {name: self.found[name].pop("first_seconds") for name in decodings}
        steps = {name: 1 if first[name] > _SLOW else self.args.steps for name in decodings}
        for name, decoding in decodings.items():
            if steps[name] > 1:  # what is slow was warm after the step that was checked
                self._time(decoding, steps[name])
        effort = Effort(self.args.rounds, self.args.case_seconds)
        rounds = effort.for_calls(sum(first[name] * steps[name] for name in decodings))
        times: dict[str, list[float]] = {name: [] for name in decodings}
        for _, name in in_turns(list(decodings), rounds):
            times[name].append(self._time(decodings[name], steps[name]))
        self.times |= times
        for name, decoding in decodings.items():
            self.found[name]["decoded_tokens"] = decoding.done
            if (
                decoding.candidate.kind == "compact"
                and decoding.candidate.bits != "16"
                and not decoding.candidate.loop
            ):
                self.found[name]["packing_seconds"] = self._packing(decoding)

    def _time(self, decoding: Decoding, steps: int) -> float:
        """Seconds of a step, of so many one after the other."""
        with decoding.ready():
            synchronise(self.args.device)
            start = time.perf_counter()
            for _ in range(steps):
                decoding.step()
            synchronise(self.args.device)
        return (time.perf_counter() - start) / steps

    def _prepared(self, candidate: Candidate) -> Decoding:
        before = in_use(self.device)
        decoding = Decoding(candidate, self.model, self.states, room(self.args))
        after = in_use(self.device)
        growth = after - before if before is not None and after is not None else None
        stored = storage_bytes(decoding.cache)
        on_gpu = self.device.type == "cuda"
        with decoding.ready():
            start = time.perf_counter()
            logits = decoding.step()
            synchronise(self.args.device)
            first = time.perf_counter() - start
        if self._wanted is None:  # the dynamic cache comes first
            self._wanted = logits
        error = check(decoding, logits, self._wanted, self.states)
        self.found[candidate.name] = {
            "bits": candidate.bits,
            "first_seconds": first,
            "logits_error": error,
            "kl": float(kl_divergence(self._wanted, logits).mean()),
            "kv_bytes_allocated": growth if on_gpu else stored,
            "kv_bytes_stored": stored,
            "kv_bytes_resident": None if on_gpu else growth,
            "bound_bytes": decoding.read_bytes() + self._weight_bytes(),
        }
        return decoding

    def _packing(self, decoding: Decoding) -> float:
        times = []
        for _ in range(_PACKINGS):
            with decoding.ready():
                decoding.make_ready_to_pack()
                synchronise(self.args.device)
                start = time.perf_counter()
                decoding.pack()
                synchronise(self.args.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _weight_bytes(self) -> int:
        """Weights that a step reads: all layers, and the head; of the embedding only a row."""
        decoder = self.model.model.language_model
        parts = [*decoder.layers.parameters(), *decoder.norm.parameters(), *self.model.lm_head.parameters()]
        return sum(one.nbytes for one in parts)

    def _row(self, name: str, fastest: str, rivals: list[str], together: bool) -> Row:
        found, seconds = self.found[name], statistics.median(self.times[name])
        baseline = statistics.median(self.times[fastest])
        dense = self.found["transformers sdpa, dynamic cache"]["kv_bytes_allocated"]
        bound = found["bound_bytes"] / self.ceilings.bytes_per_second(found["bound_bytes"])
        row = {
            "case": self.case,
            "method": name,
            "baseline": fastest,
            "seconds": seconds,
            "baseline_seconds": baseline,
            "ratio": paired(self.times[fastest], self.times[name]),
            "baselines": {rival: statistics.median(self.times[rival]) for rival in rivals},
            **found,
            "kv_bytes_baseline": dense,
            "kv_ratio": dense / found["kv_bytes_allocated"],
            "weight_bytes": self._weight_bytes(),
            "bound_seconds": bound,
            "share_of_bound": bound / seconds,
            "in_turns": together,
            "runs": self.times[name],
        }
        if "packing_seconds" in row:
            row["seconds_with_packing"] = seconds + row["packing_seconds"] / 128
        return row
