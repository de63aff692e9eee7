"""The table of ``lightvlm bench fidelity``: by budget, the best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .fidelity_rows import REFERENCES, Row

if TYPE_CHECKING:
    from rich.table import Table

_BUDGETS = ("flops", "keep", "side", "kv", "bits")
"""Order of budgets; others come after them."""
_KNOBS = ("side", "keep", "tau", "bits")
_LEGEND = (
    "in percent; kept: accuracy over the full model's; tokens: of an image, in the last layer/mean over layers",
    "time: of the prefill, own: of the method's own work, over the full model's prefill",
    "-method: accuracy minus that method's at the same budget, in points, ± half of the 95 % interval",
)
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
        caption="\n".join([*_LEGEND, *used, *result.get("notes", [])]),
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    made.add_column("budget", min_width=10)
    made.add_column("method", overflow="fold")
    made.add_column("knob", justify="right")
    made.add_column("accuracy", justify="right", min_width=16)
    shares = ("tokens", "FLOPs", "KV", "time", "own", "")
    for name in ("kept", *(f"-{name}" for name in compared), *shares):
        made.add_column(name, justify="right", no_wrap=True)
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
    knob = next((f"{row[name]:.3g}" for name in _KNOBS if name in row and name != row.get("budget")), "")
    return [
        budget,
        row["method"],
        knob,
        f"{_percent(row['accuracy'])} [{_percent(row['low'])} {_percent(row['high'])}]",
        _percent(row["retained"]),
        *(_difference(row.get(f"over_{name}")) for name in compared),
        f"{row['final_image_tokens']:.0f}/{row['image_tokens']:.0f}",
        _percent(row["flops_share"]),
        _percent(row["kv_share"]),
        _percent(row["prefill_share"]),
        _percent(row["overhead"]) if "overhead" in row else "",
        "".join(sign for name, (sign, _) in _MARKS.items() if row.get(name)),
    ]


def _percent(share: float) -> str:
    return "100" if share == 1 else f"{share * 100:.1f}"


def _difference(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean'] * 100:+.1f}±{(found['high'] - found['low']) * 50:.1f}"
