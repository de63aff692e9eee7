"""Where generated tokens stand after a prompt whose tokens were numbered anew.

A method may number the tokens that stay 0, 1, 2, ... from a stage on, as if the prompt had been that short. The model
knows nothing of it and counts on from the whole prompt, so layers behind the stage get rotary tables of their own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .models.base import Adapter

Shifts = list[tuple[int, Tensor]]
"""From each layer on, ascending: how far (B,) int64 a token stands from where the model puts it."""


def decoder_positions(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Positions (B, S) or (axes, B, S) that a call of the decoder computes with; None: no tokens."""
    if args:
        kwargs = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments
        kwargs = {**kwargs, **kwargs.get("kwargs", {})}
    positions = kwargs.get("position_ids")
    if positions is not None:
        return positions[-3:] if positions.dim() == 3 else positions  # a fourth axis in front is a mask's
    tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs.get("input_ids")
    if tokens is None:
        return None
    cache = kwargs.get("past_key_values")
    seen = cache.get_seq_length() if cache is not None else 0
    return torch.arange(seen, seen + tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)


class ShiftedTables:
    """Rotary tables of one call for the layers behind a stage, made where they are first asked for."""

    def __init__(self, adapter: Adapter, shifts: Shifts, positions: Tensor) -> None:
        self._adapter, self._shifts, self._positions = adapter, shifts, positions
        self._made: dict[int, Any] = {}

    def at(self, layer: int, hidden: Tensor) -> Any:
        """position_embeddings of a layer; None: the model's own."""
        passed = sum(first <= layer for first, _ in self._shifts)
        if not passed:
            return None
        if passed not in self._made:
            shift = self._shifts[passed - 1][1].to(self._positions.device)
            self._made[passed] = self._adapter.rotary_tables(hidden, self._positions + shift[:, None])
        return self._made[passed]


def select_rows(shifts: Shifts, indices: Tensor) -> Shifts:
    """The shifts of the rows ``indices`` (B',) of the batch."""
    return [(layer, shift.index_select(0, indices.to(shift.device))) for layer, shift in shifts]
