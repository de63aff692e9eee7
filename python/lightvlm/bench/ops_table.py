"""The table that ``lightvlm bench ops`` and ``lightvlm bench attention`` print."""

from __future__ import annotations

from typing import Any

from rich.table import Table

_FIGURES = ("us", "baseline us", "ratio", "GB/s", "TFLOP/s", "of floor")


def table(result: dict[str, Any]) -> Table:
    """One line for each row; a row without figures says why it has none."""
    made = Table(title=f"{result['kind']} on {result['device']}, torch {result['torch']}, {result['commit']}")
    made.add_column("op")
    made.add_column("case", overflow="fold")
    for name in _FIGURES:
        made.add_column(name, justify="right")
    made.add_column("baseline or reason", overflow="fold")
    made.add_column("goal")
    for row in result["rows"]:
        made.add_row(*_cells(row))
    return made


def _cells(row: dict[str, Any]) -> list[str]:
    why = row.get("error") or row.get("skipped")
    if why:
        return [row["method"], row["case"], *[""] * len(_FIGURES), why, ""]
    case = row["case"]
    if "cache" in row:
        case += f" | {row['cache']}, {row['mode']}"
    goal = row.get("goal", "")
    if goal:
        goal += {True: ": met", False: ": missed", None: ""}[row["goal_met"]]
    share = row.get("share_of_floor")
    return [
        row["method"],
        case,
        _number(row["seconds"] * 1e6),
        _number(row["baseline_seconds"] * 1e6),
        _number(row["ratio"]),
        _number(row.get("gigabytes_per_second")),
        _number(row.get("teraflops")),
        "" if share is None else f"{share:.0%}",
        row["baseline"],
        goal,
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
