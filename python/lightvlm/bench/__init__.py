"""``lightvlm bench KIND``: one module of this package per kind, imported only when it is asked for.

A kind's module has ``add_arguments(parser)`` and ``run(args) -> dict`` (the JSON object of ``lightvlm bench``). It may
have ``table(result) -> rich.table.Table``; without one, :func:`show` prints the fields that every row has. And it may
have ``exit_status(result) -> int``, where a result can be bad news.
The command line adds ``--json`` and ``--debug``. Bad values raise ValueError or TypeError naming the argument;
progress goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..terminal import print_table

if TYPE_CHECKING:
    from rich.table import Table

KINDS = {
    "ops": "each native op against the fastest other way to the same result",
    "decoder": "prefill of a decoder of real geometry, with a plan and without",
    "fidelity": "accuracy of the reference VLM under a method, over what is left of the work",
    "decode": "decode steps of a whole decoder on long caches in few bits, or whole answers; time, bytes and bound",
    "sparse": "prefill in which only some tokens attend (ZipVL), against full attention",
    "attention": "flash-attn's functions on this package's backends: their overhead, importance, decoding steps",
    "compare": "two results of a benchmark: what got slower, what got faster",
}
"""Kind -> what it measures. The name is also the module's."""


class Benchmark(Protocol):
    """What a kind's module provides."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the kind's own options."""

    def run(self, args: argparse.Namespace) -> dict[str, Any]:
        """Measure; returns {"kind", "device", "torch", "commit", "rows": [...]}."""


def load(kind: str) -> Benchmark:
    """The module of a kind.

    Raises:
        ValueError: no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return cast(Benchmark, importlib.import_module(f"{__name__}.{kind}"))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark of ``args.kind``."""
    return load(args.kind).run(args)


def show(result: dict[str, Any]) -> None:
    """Print a result as a table: the module's own, or one column for each field that all rows have."""
    own = getattr(load(result["kind"]), "table", None)
    print_table(own(result) if own is not None else _shared_columns(result))


def exit_status(result: dict[str, Any]) -> int:
    """The exit status that a result stands for: the module's own, or 0."""
    own = getattr(load(result["kind"]), "exit_status", None)
    return own(result) if own is not None else 0


def _shared_columns(result: dict[str, Any]) -> Table:
    from rich.table import Table

    rows = result["rows"]
    shared = [name for name, value in rows[0].items() if not isinstance(value, list | dict)] if rows else []
    names = [name for name in shared if all(name in row for row in rows)]
    made = Table(title=f"{result['kind']} on {result['device']}, torch {result['torch']}, {result['commit']}")
    for name in names:
        made.add_column(name, justify="right" if isinstance(rows[0][name], int | float) else "left")
    for row in rows:
        made.add_row(*(_cell(row[name]) for name in names))
    return made


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
