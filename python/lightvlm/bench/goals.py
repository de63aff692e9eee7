"""What the project means to reach, case by case, so that each row of ``bench ops`` says whether it does.

A goal belongs to an op and a device, and to the cases whose parameters it names. It limits one figure of the row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Value = int | float | str
CPU, H200 = "cpu", "NVIDIA H200"


@dataclass(frozen=True)
class Goal:
    """figure: a field of the row.   limit: at most so many microseconds; of any other figure, at least so much.

    where: parameter -> its value, or (lowest, highest). Beside the case's own (`cases.Case`): bytes, what it moves, and
    cached, batch times tokens.
    """

    op: str
    device: str
    figure: str
    limit: float
    where: Mapping[str, Value | tuple[float, float]]

    def covers(self, parameters: Mapping[str, Value]) -> bool:
        """Whether a case with these parameters is meant. One without a parameter that `where` names is not."""
        for name, wanted in self.where.items():
            found = parameters.get(name)
            if found is None:
                return False
            if isinstance(wanted, tuple):
                if not isinstance(found, int | float) or not wanted[0] <= found <= wanted[1]:
                    return False
            elif found != wanted:
                return False
        return True

    def text(self) -> str:
        """As a table shows it."""
        sign = "<=" if self.figure == "microseconds" else ">="
        unit = {"microseconds": " us", "ratio": " x"}.get(self.figure, f" {self.figure.replace('_', ' ')}")
        return f"{sign} {self.limit:g}{unit}"

    def met(self, row: Mapping[str, Any]) -> bool | None:
        """Whether the row reaches it; None where the row lacks the figure."""
        found = row.get(self.figure)
        if found is None:
            return None
        return bool(found <= self.limit if self.figure == "microseconds" else found >= self.limit)


_2K, _8K, _32K = (1900, 2048), (8000, 8192), (32000, 32768)
_ONE = {"batch": 1}
_LARGE = (64 << 20, math.inf)  # bytes that no cache holds
# In one pass: with a softmax of its own the floor alone is 25 us.
_MANY_ROWS: dict[str, Value | tuple[float, float]] = {
    "window": 128,
    "lse": "given",
    "tokens": _8K,
    "model": "7b",
    **_ONE,
}

GOALS = (
    Goal("importance", H200, "microseconds", 5.0, {"window": (1, 16), "tokens": _8K, **_ONE}),
    Goal("importance", H200, "microseconds", 23.0, _MANY_ROWS),
    Goal("select", H200, "microseconds", 6.0, {"tokens": _8K, "rows": (1, 132)}),
    Goal("select_diverse", H200, "microseconds", 400.0, {"tokens": _2K, **_ONE}),
    # With gather_tokens, whose share is 7 us.
    Goal("merge_tokens", H200, "microseconds", 25.0, {"tokens": _2K, "model": "7b", **_ONE}),
    Goal("compact_kv_", H200, "share_of_memcpy", 0.75, {"layers": (2, math.inf), "bytes": _LARGE}),
    Goal("decode_attention", H200, "share_of_floor", 0.75, {"bits": "4", "cached": (64000, math.inf)}),
    Goal("decode_attention", H200, "share_of_floor", 0.60, {"bits": "4/2", "cached": (64000, math.inf)}),
    Goal("importance", CPU, "ratio", 2.5, {"lse": "given", "tokens": (1000, math.inf)}),
    Goal("select", CPU, "ratio", 3.0, {"tokens": _8K, "rows": 1}),
    Goal("select", CPU, "ratio", 6.0, {"tokens": _8K, "rows": 112}),
    Goal("select_diverse", CPU, "ratio", 3.0, {}),
    Goal("merge_tokens", CPU, "ratio", 1.3, {"dtype": "bfloat16"}),
    Goal("merge_tokens", CPU, "ratio", 1.1, {"dtype": "float32"}),
    Goal("compact_kv_", CPU, "ratio", 2.0, {"bytes": _LARGE}),
    Goal("decode_attention", CPU, "ratio", 2.0, {"bits": "4", "tokens": _32K}),
    Goal("decode_attention", CPU, "ratio", 1.3, {"bits": "4", "tokens": _8K}),
    Goal("append_attend_", CPU, "ratio", 1.0, {"tokens": (1000, math.inf)}),
    # `bench attention`: at most 2 % of the backend's time, at most 3 % of the call's; decoding no slower than SDPA.
    Goal("flash_attn_func", CPU, "ratio", 0.98, {"tokens": (1000, math.inf)}),
    Goal("importance_window", CPU, "ratio", 0.97, {"tokens": (8000, math.inf)}),
    Goal("flash_attn_with_kvcache", CPU, "ratio", 1.0, {"tokens": (1000, math.inf)}),
    Goal("flash_attn_with_kvcache_in_turn", CPU, "ratio", 1.0, {"tokens": (1000, math.inf)}),
)


def goal_of(op: str, device: str, parameters: Mapping[str, Value], moved: int = 0) -> Goal | None:
    """The goal of a case, the first that covers it.

    device: "cpu", or the name that torch gives a GPU.   moved: bytes.
    """
    known = {**parameters, "bytes": moved}
    if "bits" in known:
        known["bits"] = str(known["bits"])
    if isinstance(batch := known.get("batch"), int) and isinstance(tokens := known.get("tokens"), int):
        known["cached"] = batch * tokens
    for goal in GOALS:
        if goal.op == op and goal.device == device and goal.covers(known):
            return goal
    return None
