"""What tests of the cache's state share: a run that reads it, a policy that does as told, the bytes kept alive."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from lightvlm import CompactCache, Plan
from lightvlm.methods.base import CachePart
from lightvlm.transcript import Transcript
from torch import Tensor


class Reader:
    """Stands in for the run of an attached model: a cache asks it only for its plan, and whether it reads."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def reads(self, cache: CompactCache) -> bool:
        return True

    def writes(self, *args: object) -> bool:
        return False


@dataclass(frozen=True)
class Told(CachePart):
    """Scores by mass, or by ``rows`` queries.

    kept: layer's id -> places of each row that stay, or for each row those of each head, in 16 bits.   room: the budget
    of packed layers.
    """

    interval: int
    recent: int
    kept: dict[Any, list[Any]]
    room: list[int] = dataclasses.field(default_factory=lambda: [0])
    demoting: bool = False
    rows: int = 0

    @property
    def demotes(self) -> bool:  # type: ignore[override]
        return self.demoting

    @property
    def wants_mass(self) -> bool:
        return self.rows == 0

    def budget(self, logical: int) -> int:
        return self.room[0]

    def choose(self, layer: Any, leftpad: list[int]) -> tuple[Tensor, Tensor, list[int]] | None:
        rows = self.kept.get(id(layer))
        if rows is None:
            return None
        per_head = any(isinstance(place, list) for row in rows for place in row)
        counts = [len(row[0]) if per_head else len(row) for row in rows]
        longest = max(counts)

        def padded(places: list[int]) -> list[int]:  # what stands past the count is not read
            return places + [-7] * (longest - len(places))

        index = [[padded(head) for head in row] if per_head else padded(row) for row in rows]
        return torch.tensor(index, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32), counts


def tensors_of(thing: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Every tensor that an object of the cache keeps alive, however deep."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(
        thing, type | Transcript
    ):  # what later questions need is not keys and values
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        inner = list(thing)
    elif type(thing).__module__.startswith(("lightvlm", "transformers")):
        inner = list(vars(thing).values())
    else:
        return []
    return [tensor for one in inner for tensor in tensors_of(one, seen)]


def bytes_alive(cache: CompactCache) -> int:
    """Bytes of the memory behind them, each piece once."""
    pieces = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors_of(cache)}
    return sum(pieces.values())
