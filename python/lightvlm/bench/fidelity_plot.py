"""The picture of ``lightvlm bench fidelity``: accuracy over what is left of the FLOPs, and of the KV cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fidelity_rows import Row

# Okabe and Ito's colours, without the yellow, which is faint on white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P")  # one fewer than colours, so that pairs of the two differ for long
_LINES = ("-", "--", ":")
_LABEL_HEIGHT = 0.042  # of a panel
_DODGE = 0.003  # of a panel's range, between two lines
_PANELS = {
    "flops_share": (
        "decoder prefill FLOPs, share of the full model's",
        ("prefill", "attention", "smaller image"),
    ),
    "kv_share": ("KV cache, share of the full model's bytes", ("cache", "precision")),
}


@dataclass(frozen=True)
class Line:
    """One method in a panel: points by falling share, and half-widths of their intervals."""

    name: str
    shares: list[float]
    retained: list[float]
    below: list[float]
    above: list[float]


def check(path: Path) -> None:
    """Raise before anything is measured for a picture that cannot be written.

    Raises:
        ImportError: no matplotlib.   ValueError: another ending, or a folder that is not there.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'lightvlm[demo]'")
    if path.suffix != ".png":
        raise ValueError(f"--plot must end in .png, got {path}")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--plot: {path.resolve().parent} is no folder")


def lines(rows: Sequence[Row], share: str) -> list[Line]:
    """A line for each method of a panel; rows in which the plan stepped aside measure nothing and are left out."""
    full = next(row["accuracy"] for row in rows if row["method"] == "full")
    wanted = [
        row
        for row in rows
        if row["family"] in _PANELS[share][1] and "accuracy" in row and not row.get("stepped_aside")
    ]
    found = []
    for name in dict.fromkeys(row["method"] for row in wanted):
        mine = sorted((row for row in wanted if row["method"] == name), key=lambda row: -row[share])
        found.append(
            Line(
                name,
                [row[share] for row in mine],
                [row["accuracy"] / full for row in mine],
                [(row["accuracy"] - row["low"]) / full for row in mine],
                [(row["high"] - row["accuracy"]) / full for row in mine],
            )
        )
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the PNG: a panel of FLOPs, and one of the cache where a method works on that.

    Less work is on the right, where the lines part and their names stand.

    Raises:
        ValueError: no row has anything to show.
    """
    from matplotlib.figure import Figure

    panels = {share: found for share in _PANELS if (found := lines(rows, share))}
    if not panels:
        raise ValueError("--plot: there is no method to show")
    figure = Figure(figsize=(8.5 * len(panels), 6.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (share, found) in zip(axes, panels.items(), strict=True):
        _panel(axis, found, _PANELS[share][0])
    figure.suptitle(rows[0]["case"], fontsize=10)
    figure.savefig(path, dpi=130, facecolor="white")


def _panel(axis: Any, found: Sequence[Line], label: str) -> None:
    smallest = min(min(line.shares) for line in found)
    span = max(1.0 - smallest, 0.1)
    axis.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
    axis.plot([1.0], [1.0], marker="*", markersize=11, color="0.3", clip_on=False)
    # or intervals at equal budgets hide each other
    aside = [_DODGE * span * (number - (len(found) - 1) / 2) for number in range(len(found))]
    for number, line in enumerate(found):
        axis.errorbar(
            [share - aside[number] for share in line.shares], line.retained, yerr=[line.below, line.above],
            color=_colour(number), marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_LINES[number // len(_COLOURS) % len(_LINES)],
            markersize=4.5, linewidth=1.3, elinewidth=0.7, capsize=2, alpha=0.9,
        )  # fmt: skip
    axis.set_xlim(1.0 + 0.03 * span, smallest - 0.42 * span)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)
    spots = _apart([(line.retained[-1] - low) / (high - low) for line in found])
    for number, (line, spot) in enumerate(zip(found, spots, strict=True)):
        axis.annotate(
            line.name, xy=(line.shares[-1] - aside[number], line.retained[-1]),
            xytext=(smallest - 0.08 * span, low + spot * (high - low)), color=_colour(number), fontsize=8.5,
            va="center", arrowprops={"arrowstyle": "-", "color": _colour(number), "linewidth": 0.4, "alpha": 0.6},
        )  # fmt: skip
    axis.set_xlabel(f"{label} (less to the right; lines are drawn slightly apart)")
    axis.set_ylabel("accuracy retained, 95 % interval")
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights in a panel (0 to 1), moved as little as it takes for labels not to overlap: pairs that do are pushed
    apart until none is left, lowest first."""
    order = sorted(range(len(heights)), key=lambda at: heights[at])
    placed = list(heights)
    below = -_LABEL_HEIGHT
    for at in order:
        placed[at] = below = max(placed[at], below + _LABEL_HEIGHT)
    above = 1.0 + _LABEL_HEIGHT
    for at in reversed(order):
        placed[at] = above = min(placed[at], above - _LABEL_HEIGHT)
    return placed
