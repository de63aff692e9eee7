"""The demo's measurements: the same prompts through the full model and through every plan, timed alike.

The full model is plain transformers with nothing attached. Every case first answers all questions once, untimed, which
warms up and gives answers and report; then each batch goes through all cases in turn, once a round, in an order
that rotates. A batch counts with its fastest round, since what disturbs a run only ever makes it slower.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .methods import LightVLM, Random
from .plan import Plan
from .report import Report
from .runtime import Run, attach

if TYPE_CHECKING:
    from transformers import BatchFeature

KEEPS = (0.35, 0.15, 0.03)
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Case:
    """A way to run the model: a plan, or None for the full model."""

    method: str
    keep: float
    plan: Plan | None


def cases() -> list[Case]:
    """The full model, then LightVLM and random dropping at the same layers and counts."""
    found = [Case("full", 1.0, None)]
    found += [Case("lightvlm", keep, LightVLM(keep=keep)) for keep in KEEPS]
    return found + [Case("random", keep, Random(keep=keep)) for keep in KEEPS]


def long_cases() -> list[Case]:
    """Cases of a long answer: the full cache, a compacted one, and that after a reduced prefill."""
    return [
        Case("full", 1.0, None),
        Case("compaction only", 1.0, LightVLM(keep=1.0)),
        Case("lightvlm", 0.35, LightVLM(keep=0.35)),
    ]


@dataclass
class Outcome:
    """What a case did. ``kv_bytes``: valid keys and values after the prompts, all questions; seconds, all questions:
    ``prefill`` up to the first token (vision tower included), ``total`` up to the last."""

    answers: list[list[int]] = field(default_factory=list)
    report: Report | None = None
    kv_bytes: int = 0
    prefill: float = 0.0
    total: float = 0.0


class Clock:
    """Times generate() calls of a model: its first forward is the prompt's, for the full model as for any plan."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.kv_bytes = 0
        self._first: float | None = None
        self._valid = 0

    def __enter__(self) -> Clock:
        self._handle = self.model.register_forward_hook(self._after)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def generate(self, inputs: BatchFeature, tokens: int, **options: Any) -> tuple[Any, float, float]:
        """generate()'s result, greedy, at most ``tokens`` new tokens, and the seconds to its first and last token."""
        self._first, self._valid = None, int(inputs["attention_mask"].sum())
        _synchronise(self.model)
        start = time.perf_counter()
        result = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, **options)
        _synchronise(self.model)
        end = time.perf_counter()
        assert self._first is not None
        return result, self._first - start, end - start

    def _after(self, module: Any, args: Any, output: Any) -> None:
        if self._first is None:
            _synchronise(self.model)
            self._first = time.perf_counter()
            self.kv_bytes = cache_bytes(output.past_key_values, self._valid)


def cache_bytes(cache: Any, tokens: int) -> int:
    """Bytes of the valid keys and values of a cache; a plain one holds ``tokens`` valid ones, the rest is padding."""
    if hasattr(cache, "kv_bytes_used"):
        return int(cache.kv_bytes_used)
    each = [
        (layer.keys.nbytes + layer.values.nbytes) // layer.keys[:, 0, :, 0].numel() for layer in cache.layers
    ]
    return tokens * sum(each)


def allocated_bytes(cache: Any) -> int:
    """Bytes of the buffers that hold a cache's keys and values."""
    if hasattr(cache, "kv_bytes_allocated"):
        return int(cache.kv_bytes_allocated)
    storages = [x.untyped_storage() for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def put(model: Any, plan: Plan | None, **options: Any) -> contextlib.AbstractContextManager[Run | None]:
    """The plan attached to the model, or the model as it is."""
    return contextlib.nullcontext() if plan is None else attach(model, plan, **options)


@torch.inference_mode()
def ask(
    model: Any,
    batches: Sequence[BatchFeature],
    trials: Sequence[Case],
    rounds: int,
    advance: Callable[[], None],
) -> list[Outcome]:
    """Put all batches through all cases; ``advance`` is called ``len(trials) * len(batches) * (rounds + 1)`` times."""
    outcomes = [Outcome() for _ in trials]
    fastest = [[(float("inf"), float("inf"))] * len(batches) for _ in trials]
    with Clock(model) as clock:
        for case, outcome in zip(trials, outcomes, strict=True):
            with put(model, case.plan) as handle:
                for inputs in batches:
                    tokens, _, _ = clock.generate(inputs, ANSWER_TOKENS)
                    outcome.answers += tokens[:, inputs["input_ids"].shape[1] :].tolist()
                    outcome.kv_bytes += clock.kv_bytes
                    advance()
            outcome.report = handle.report() if handle is not None else None
        for turn, which in _turns(rounds, len(batches), len(trials)):
            with put(model, trials[which].plan):
                _, prefill, total = clock.generate(batches[turn], ANSWER_TOKENS)
            best = fastest[which][turn]
            fastest[which][turn] = min(best[0], prefill), min(best[1], total)
            advance()
    for outcome, best_of in zip(outcomes, fastest, strict=True):
        outcome.prefill, outcome.total = (sum(times) for times in zip(*best_of, strict=True))
    return outcomes


def _turns(rounds: int, batches: int, trials: int) -> Iterable[tuple[int, int]]:
    """(batch, case) in the order they are timed."""
    for turn in range(rounds):
        for batch in range(batches):
            for step in range(trials):
                yield batch, (step + turn + batch) % trials


@torch.inference_mode()
def answer_at_length(
    model: Any,
    inputs: BatchFeature,
    tokens: int,
    rounds: int,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Answers of exactly ``tokens`` tokens with a full cache and with compacted ones; what they hold at the end.

    ``advance`` is called ``3 * (rounds + 1)`` times.
    """
    trials = long_cases()
    valid = int(inputs["attention_mask"].sum()) + len(inputs["input_ids"]) * (tokens - 1)
    rows: list[dict[str, Any]] = [{"method": case.method, "keep": case.keep} for case in trials]
    seconds = [float("inf")] * len(trials)
    with Clock(model) as clock:
        for case in trials:
            with put(model, case.plan):
                clock.generate(inputs, 4, min_new_tokens=4)
            advance()
        for _, which in _turns(rounds, 1, len(trials)):
            with put(model, trials[which].plan) as handle:
                result, prefill, total = clock.generate(
                    inputs, tokens, min_new_tokens=tokens, return_dict_in_generate=True
                )
            seconds[which] = min(seconds[which], (total - prefill) / (tokens - 1))
            cache = result.past_key_values
            rows[which] |= {
                "kv_bytes_used": cache_bytes(cache, valid),
                "kv_bytes_allocated": allocated_bytes(cache),
                "milliseconds_per_token": 1e3 * seconds[which],
                "compactions": handle.report().compactions if handle is not None else 0,
            }
            advance()
    longest = int(inputs["input_ids"].shape[1])
    return {"batch": len(inputs["input_ids"]), "prompt_tokens": longest, "new_tokens": tokens, "rows": rows}


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
