"""What ``bench ops`` has to do, one job after the other: the cases of one op for some sizes.

On a GPU a job has one number of tokens, one batch and one model, so that what does not fit into memory costs one row
and not a run; jobs with few tokens come first, so that what time does not allow is the largest of every op.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cases import CASES, Case, Sizes
from .measure import Bench, measure
from .memory import is_out_of_memory

Row = dict[str, Any]

TIME_IS_OVER = "the time for the whole run was over"


@dataclass(frozen=True)
class Job:
    """The cases of `op` for `sizes`."""

    op: str
    sizes: Sizes

    def __str__(self) -> str:
        tokens = "its own numbers of" if self.sizes.tokens is None else _words(self.sizes.tokens)
        return f"{tokens} tokens, batch {_words(self.sizes.batches)} ({_words(self.sizes.models)})"

    def parameters(self) -> dict[str, int | float | str]:
        """Model, tokens and batch, where there is one of each."""
        found: dict[str, int | float | str] = {}
        if len(self.sizes.models) == 1:
            found["model"] = self.sizes.models[0]
        if self.sizes.tokens is not None and len(self.sizes.tokens) == 1:
            found["tokens"] = self.sizes.tokens[0]
        if len(self.sizes.batches) == 1:
            found["batch"] = self.sizes.batches[0]
        return found


class DeviceLost(Exception):
    """The device, or torch's use of it, is not what it was: the process has to end."""


def split(ops: Sequence[str], sizes: Sizes) -> list[Job]:
    """One job for each op and combination of sizes, the smallest first; sizes.tokens has to be given."""
    combined = itertools.product(sizes.tokens or (), sizes.batches, sizes.models)
    return [
        Job(op, replace(sizes, tokens=(tokens,), batches=(batch,), models=(model,)))
        for tokens, batch, model in sorted(combined, key=lambda one: one[0] * one[1])
        for op in ops
    ]


def run_job(job: Job, bench: Bench, seen: set[tuple[str, str]], deadline: float) -> Iterator[Row]:
    """The rows of a job's cases, in their order; what could not be measured has "skipped" or "error" for a figure.

    seen: (op, case) that were measured before, and are not again.   deadline: by time.monotonic.

    Raises:
        DeviceLost: after the row that says why.
    """
    cases = CASES[job.op](job.sizes)
    while True:
        if time.monotonic() > deadline:
            yield skipped(job.op, str(job), TIME_IS_OVER)
            return
        found = _next_case(job, cases)
        if found is None:
            return
        if not isinstance(found, Case):
            yield found
            _check(bench)
            return
        if (job.op, found.name) in seen:
            continue
        seen.add((job.op, found.name))
        case = replace(found, parameters={**job.parameters(), **found.parameters})
        yield from _measured(job.op, case, bench)
        del found, case
        _check(bench)


def skipped(op: str, case: str, reason: str) -> Row:
    """A row without figures, and why."""
    return {"case": case, "method": op, "skipped": reason}


def failed(op: str, case: str, problem: str) -> Row:
    """A row of what went wrong."""
    return {"case": case, "method": op, "error": problem}


def _next_case(job: Job, cases: Iterator[Case]) -> Case | Row | None:
    try:
        return next(cases, None)
    except Exception as error:  # one op's trouble is a row, whatever it is
        return problem(job.op, str(job), error)


def _measured(op: str, case: Case, bench: Bench) -> list[Row]:
    try:
        return measure(op, case, bench)
    except Exception as error:
        return [problem(op, case.name, error)]


def problem(op: str, case: str, error: Exception) -> Row:
    """A row of an error; too little memory is a reason and none."""
    if is_out_of_memory(error):
        return skipped(op, case, "needs more memory than there is")
    lines = str(error).strip().splitlines()
    return failed(op, case, f"{type(error).__name__}: {' '.join(lines)[:500]}")


def _check(bench: Bench) -> None:
    """Gives memory back, and finds out whether the device still works."""
    if bench.cuda is None:
        return
    if bench.cuda.lost:
        raise DeviceLost("a capture failed, and torch's allocator with it")
    gc.collect()
    try:
        bench.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLost(str(error)) from None


def _words(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
