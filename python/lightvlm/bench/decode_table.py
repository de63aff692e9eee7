"""The table that ``lightvlm bench decode`` prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table

_MIB = 1 << 20


def table(result: dict[str, Any]) -> Table:
    """One line for each row; a row without figures says why it has none."""
    made = Table(title=f"decode on {result['device']}, torch {result['torch']}, {result['commit']}")
    for name, width in (("case", 26), ("method", 16)):
        made.add_column(name, overflow="fold", min_width=width)
    for name in ("ms", "baseline ms", "ratio", "KV MiB", "KV ratio", "of bound", "KL"):
        made.add_column(name, justify="right")
    made.add_column("baseline or reason", overflow="fold")
    for row in result["rows"]:
        made.add_row(row["case"], row["method"], *_figures(row))
    return made


def _figures(row: dict[str, Any]) -> list[str]:
    why = row.get("error") or row.get("skipped")
    if why:
        return [""] * 7 + [why]
    stored, share, kl = row.get("kv_bytes_allocated"), row.get("share_of_bound"), row.get("kl")
    if share is None:
        share = row.get("share_of_floor")
    mean = kl.get("mean") if isinstance(kl, dict) else kl
    return [
        _number(row["seconds"] * 1e3),
        _number(row["baseline_seconds"] * 1e3),
        _number(row["ratio"]),
        _number(stored / _MIB if stored is not None else None),
        _number(row.get("kv_ratio")),
        "" if share is None else f"{share:.0%}",
        _number(mean),
        row["baseline"],
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
