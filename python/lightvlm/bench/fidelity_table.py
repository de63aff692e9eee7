"""The table of ``lightvlm bench fidelity``: by budget, the best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .fidelity_rows import REFERENCES, Row

if TYPE_CHECKING:
    from rich.table import Table

_BUDGETS = ("flops", "keep", "side", "kv", "bits")
"""Order of budgets; others come after them."""
_TOKENS = "tokens: of an image, in the last layer / mean over layers; prefill, own work: over the full model's prefill"
_POINTS = "- method: accuracy minus that method's at the same budget, in points, ± half of the 95 % interval"
_MARKS = {
    "overhead_listed": ("!", "own work above 3 % of the full model's prefill"),
    "off_target": ("~", "no nearer to the budget"),
    "stepped_aside": (
        "-",
        "the plan, or a part of it, stepped aside: what is not marked otherwise measures nothing",
    ),
}


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Rows by budget, largest target first, then by accuracy, best first; what was not run comes last."""

    def place(row: Row) -> tuple[Any, ...]:
        budget = row.get("budget", "")
        rank = -1 if not budget else _BUDGETS.index(budget) if budget in _BUDGETS else len(_BUDGETS)
        return rank, budget, -row.get("target", 0.0), -row.get("accuracy", -1.0), row["method"]

    return sorted(rows, key=place)


def table(result: dict[str, Any]) -> Table:
    """One line a row, a section a budget."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows = ordered(result["rows"])
    used = [
        f"{sign} {meaning}" for name, (sign, meaning) in _MARKS.items() if any(row.get(name) for row in rows)
    ]
    compared = [name for name in REFERENCES if any(f"over_{name}" in row for row in rows)]
    title = f"{rows[0]['case']}\n{result['device']}, torch {result['torch']}, {result['commit']}"
    made = Table(
        title=title,
        caption="\n".join([_TOKENS, _POINTS, *used, *result.get("notes", [])]),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("budget", "method", "knob"):
        made.add_column(name, overflow="fold")
    made.add_column("accuracy", justify="right", min_width=16)
    for name in (
        "retained",
        *(f"- {name}" for name in compared),
        "tokens",
        "FLOPs",
        "KV",
        "prefill",
        "own",
        "",
    ):
        made.add_column(name, justify="right")
    last: Any = None
    for row in rows:
        budget = (row.get("budget"), row.get("target"))
        if last is not None and budget != last:
            made.add_section()
        made.add_row(*_line(row, compared, show_budget=budget != last))
        last = budget
    return made


def _line(row: Row, compared: Sequence[str], show_budget: bool) -> list[str]:
    budget = f"{row['budget']} {row['target']:g}" if show_budget and "budget" in row else ""
    if "skipped" in row:
        return [budget, row["method"], "", row["skipped"]]
    known = ("keep", "tau", "bits", "side")
    knob = next(
        (f"{name} {row[name]:.3g}" for name in known if name in row and name != row.get("budget")), ""
    )
    return [
        budget,
        row["method"],
        knob,
        f"{row['accuracy'] * 100:.1f} [{row['low'] * 100:.1f} {row['high'] * 100:.1f}]",
        f"{row['retained']:.1%}",
        *(_difference(row.get(f"over_{name}")) for name in compared),
        f"{row['final_image_tokens']:.0f}/{row['image_tokens']:.0f}",
        f"{row['flops_share']:.3f}",
        f"{row['kv_share']:.3f}",
        f"{row['prefill_seconds'] / row['baseline_prefill_seconds']:.2f}",
        f"{row['overhead']:.1%}" if "overhead" in row else "",
        "".join(sign for name, (sign, _) in _MARKS.items() if row.get(name)),
    ]


def _difference(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean'] * 100:+.1f} ±{(found['high'] - found['low']) * 50:.1f}"
