"""``lightvlm bench decode --generate N``: answers of N tokens, with a full cache and with one that is compacted.

Weights and prompt are random, so the text means nothing; time and memory do not depend on it. Each candidate has a
process of its own, whose peak of memory is then its own. Beside the figures stands the KL divergence of the compacted
model's next tokens from the full one's (`lightvlm.divergence`); a random model says little there, `bench fidelity` asks
a trained one.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from ..kl import divergence
from ..methods.decode_compaction import DecodeCompaction
from ..plan import Plan
from ..trial import Clock, cache_bytes, put
from .decode_steps import vocabulary
from .decoder import GEOMETRIES, build_model
from .isolate import Send, in_processes
from .jobs import failed, problem, skipped
from .memory import in_use, peak, reset_peak, storage_bytes

Row = dict[str, Any]
_SILENCE = 6 * 3600.0  # seconds that an answer may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this mode."""
    parser.add_argument(
        "--generate", type=int, metavar="N", help="generate N tokens after a prompt, instead of steps"
    )
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="with --generate")
    parser.add_argument("--decode-keep", type=float, default=0.35, help="share that compaction keeps")
    parser.add_argument(
        "--kl-tokens", type=int, default=256, help="tokens of the answer along which KL is measured; 0: none"
    )
    parser.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each candidate of --generate in a process of its own",
    )


def check(args: argparse.Namespace) -> None:
    """Raise a ValueError unless the options of this mode make sense."""
    if args.generate is None:
        return
    for name, least in (("generate", 2), ("prompt_tokens", 1), ("kl_tokens", 0)):
        if getattr(args, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}"
            )
    if not 0 < args.decode_keep < 1:
        raise ValueError(f"--decode-keep must be between 0 and 1, got {args.decode_keep}")


@dataclass(frozen=True)
class Settings:
    """What every process has to know."""

    geometry: str
    layers: int | None
    vocabulary: int
    dtype: str
    device: str
    threads: int | None
    prompt: int
    new: int
    kl_tokens: int
    keep: float

    def plan(self) -> Plan:
        """LightVLM's part for the cache, alone."""
        return Plan(cache=DecodeCompaction(self.keep))


@dataclass(frozen=True)
class Answer:
    """A job: rows of a batch, and how the cache is held: "dynamic", "static" or "compaction"."""

    batch: int
    cache: str

    @property
    def name(self) -> str:
        """For people."""
        return (
            "lightvlm, compaction" if self.cache == "compaction" else f"transformers sdpa, {self.cache} cache"
        )


def run(args: argparse.Namespace) -> list[Row]:
    """The rows of all batches."""
    settings = Settings(
        args.geometry, args.layers, vocabulary(args), args.dtype, args.device, args.threads,
        args.prompt_tokens, args.generate, min(args.generate, args.kl_tokens), args.decode_keep,
    )  # fmt: skip
    rows: list[Row] = []
    for batch in args.batch:
        jobs = [Answer(batch, cache) for cache in ("dynamic", "static", "compaction")]
        found = _in_processes(settings, jobs) if args.isolate else _here(settings, jobs)
        rows += _compared(_case(settings, batch), jobs, found)
    return rows


def _case(settings: Settings, batch: int) -> str:
    depth = settings.layers or GEOMETRIES[settings.geometry][1]
    asked = f"{batch} x ({settings.prompt} + {settings.new} generated) tokens"
    return f"{settings.geometry}, {depth} layers, {asked}, {settings.dtype}"


def _here(settings: Settings, jobs: Sequence[Answer]) -> dict[int, Row]:
    found: dict[int, Row] = {}

    def send(kind: str, number: int, content: Any) -> None:
        if kind == "row":
            found[number] = content

    for number, job in enumerate(jobs):
        work(settings, [(number, job)], send)
    return found


def _in_processes(settings: Settings, jobs: Sequence[Answer]) -> dict[int, Row]:
    found: dict[int, Row] = {}
    messages = in_processes(
        functools.partial(work, settings), jobs, group=lambda job: job.cache, silence=_SILENCE
    )
    for kind, number, content in messages:
        if kind == "row":
            found[number] = content
        elif kind in ("problem", "dropped"):
            found[number] = failed("", "", content)
    return found


def work(settings: Settings, jobs: list[tuple[int, Answer]], send: Send) -> None:
    """Does the first job and asks for another process for the rest (see `isolate.Work`)."""
    number, job = jobs[0]
    send("begin", number, None)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        send("row", number, _measured(settings, job))
    except Exception as error:  # one candidate's trouble is its row
        send("row", number, problem("", "", error))
    send("restart", number, None)


def _measured(settings: Settings, job: Answer) -> Row:
    """The figures of one answer, in a process that has done nothing else."""
    device = torch.device(settings.device)
    model: Any = build_model(
        settings.geometry,
        settings.layers,
        getattr(torch, settings.dtype),
        settings.device,
        settings.vocabulary,
    )
    model.generation_config.eos_token_id = None
    ids = torch.randint(
        8, settings.vocabulary, (job.batch, settings.prompt), generator=torch.Generator().manual_seed(1)
    )
    inputs: Any = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    plan = settings.plan() if job.cache == "compaction" else None
    options: dict[str, Any] = {"min_new_tokens": settings.new, "return_dict_in_generate": True}
    if job.cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    with Clock(model) as clock, put(model, plan) as handle:
        short = {name: value[:, :16] for name, value in inputs.items()}
        clock.generate(cast(Any, short), 2, **(options | {"min_new_tokens": 2}))  # warm-up
        before = in_use(device)
        highest = _peak_of(device)
        result, prefill, total = clock.generate(inputs, settings.new, **options)
        most = peak(device) if highest else None
    stored = settings.prompt + settings.new - 1  # the last token is not fed back
    row: Row = {
        "seconds": total,
        "prefill_seconds": prefill,
        "milliseconds_per_token": 1e3 * (total - prefill) / (settings.new - 1),
        "peak_memory": most,
        "memory_before": before,
        "peak_growth": most - before if most is not None and before is not None else None,
        "kv_bytes_used": _used(result.past_key_values, job, stored),
        "kv_bytes_allocated": storage_bytes(result.past_key_values),
        "compactions": handle.report().compactions if handle is not None else 0,
        "runs": [total],
    }
    del result
    if plan is not None and settings.kl_tokens:
        row["kl"] = divergence(model, inputs, plan, new_tokens=settings.kl_tokens).to_dict()
    return row


def _used(cache: Any, job: Answer, stored: int) -> int:
    if job.cache != "static":
        return cache_bytes(cache, job.batch * stored)
    layers = cache.layers
    each = sum(x[0, :, 0].numel() * x.element_size() for one in layers for x in (one.keys, one.values))
    return int(each * job.batch * stored)


def _peak_of(device: torch.device) -> bool:
    try:
        reset_peak(device)
    except OSError:
        return False
    return True


def _compared(case: str, jobs: Sequence[Answer], found: dict[int, Row]) -> list[Row]:
    """The rows, each beside the faster of transformers' two."""
    done = {number: row for number, row in found.items() if "seconds" in row}
    rivals = {number: row for number, row in done.items() if jobs[number].cache != "compaction"}
    rows = []
    for number, job in enumerate(jobs):
        row = found[number] | {"case": case, "method": job.name}
        if rivals and number in done:
            fastest = min(rivals, key=lambda one: rivals[one]["seconds"])
            baseline = rivals[fastest]
            row |= {
                "baseline": jobs[fastest].name,
                "baseline_seconds": baseline["seconds"],
                "ratio": baseline["seconds"] / row["seconds"],
                "kv_bytes_baseline": baseline["kv_bytes_allocated"],
                "kv_ratio": baseline["kv_bytes_allocated"] / row["kv_bytes_allocated"],
            }
        elif number in done:
            row = skipped(job.name, case, "has no baseline, which could not be measured")
        rows.append(row)
    return rows
